"""The processes that work together: one, or those that `accelerate launch` started (DDP, DeepSpeed ZeRO-2).

A joint batch is what one process alone would train on. Of its B rows, row j belongs to process j mod `size`: it reads
that row, runs the network on it, and `join` puts all rows together again, in the order of one process. Rows of voxels
are joined only where trials are mixed. Random numbers that belong to rows (MixCo, the prior's noise) are drawn for the
joint batch by every process from one seed, so that the number of processes does not change what is computed; only
dropout masks differ.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: defaults of its functions would hold it for good (run_cli)

import utils

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class Team:
    """The processes of a training. Without arguments: this process alone, on the CPU, in float32."""

    def __init__(self, device="cpu", rank=0, size=1, accelerator=None, precision=torch.float32):
        self.device, self.rank, self.size = torch.device(device), rank, size
        self.accelerator, self.precision = accelerator, precision
        self.is_main = rank == 0
        self.net = self.optimizer = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.scale = self.scaler.get_scale()

    @classmethod
    def assemble(cls, device="auto", precision="auto", patience=None):
        """Join the processes the launcher started, or stay alone.

        device: as utils.pick_device; a launcher with several processes gives each its own. precision: fp32, bf16, fp16
        or auto, which is fp32 on a CPU, bf16 on a GPU that has it, else fp16. patience: timedelta for which a process
        waits for another; None is PyTorch's, minutes.

        On a GPU float32 matrix products, which are few beside those under autocast, round their factors to TF32.
        """
        if "LOCAL_RANK" not in os.environ:
            accelerator, device, rank, size = None, utils.pick_device(device), 0, 1
        else:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import InitProcessGroupKwargs

            # a DeepSpeed plugin remembers the model before: every network gets a fresh one, in the same process group
            AcceleratorState._reset_state()
            deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
            on_cpu = utils.pick_device(device).type == "cpu"
            accelerator = Accelerator(cpu=on_cpu and not deepspeed, mixed_precision="no",
                                      kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)])
            device, rank, size = accelerator.device, accelerator.process_index, accelerator.num_processes
        if torch.device(device).type == "cuda":
            torch.set_float32_matmul_precision("high")
        team = cls(device, rank, size, accelerator, pick_precision(precision, torch.device(device)))
        if team.deepspeed and team.precision == torch.float16:
            raise utils.UserError("--precision fp16: DeepSpeed runs here in fp32 or bf16 only; give --precision bf16 "
                                  "or fp32, or launch with scripts/accelerate/ddp.yaml")
        return team

    @property
    def deepspeed(self):
        return self.accelerator is not None and self.accelerator.state.deepspeed_plugin is not None

    def __str__(self):
        how = "DeepSpeed, " if self.deepspeed else ""
        return f"{how}{self.size} process{'es' * (self.size > 1)}, {self.device.type}, " \
               f"{str(self.precision).removeprefix('torch.')}"

    def print(self, *words):
        if self.is_main:
            print(*words, flush=True)

    def wait(self):
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    # --- rows of the joint batch ----------------------------------------------------------------------------------

    def take(self, rows, offset=0):
        """Return this process's rows of (n, ...), which start at row `offset` of the joint batch."""
        return rows[(self.rank - offset) % self.size::self.size]

    def take_voxels(self, voxels):
        """Return this process's rows of {subject: (b, V)}, the subjects one after the other."""
        taken, offset = {}, 0
        for subject, rows in voxels.items():
            taken[subject] = self.take(rows, offset)
            offset += len(rows)
        return taken

    def join(self, rows, n, offset=0):
        """Gather all processes' rows, (n, ...) in the joint batch's order; the gradient reaches its own rows only.

        Every process computes the same loss from it. Its gradient with respect to the network is the sum over the
        processes; `step` makes that sum out of the launcher's mean.
        """
        if self.size == 1 or n == 0:
            return rows
        padded = rows.new_zeros(-(-n // self.size), *rows.shape[1:])
        padded[:len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        in_turn = [parts[(offset + turn) % self.size] for turn in range(self.size)]
        joint = torch.stack(in_turn, dim=1).flatten(0, 1)[:n].clone()  # (n/size, size, ...) -> (n, ...)
        joint[(self.rank - offset) % self.size::self.size] = rows
        return joint

    def join_voxels(self, batch):
        """Gather all processes' rows of a batch's voxels: {subject: (b, V)} of the joint batch, as `join` does."""
        if self.size == 1:
            return batch["voxels"]
        joint, offset = {}, 0
        for subject, rows in batch["voxels"].items():
            joint[subject] = self.join(rows, batch["sizes"][subject], offset)
            offset += batch["sizes"][subject]
        return joint

    def any(self, flag):
        """Say whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes)
        return votes.item() > 0

    # --- one network and its optimizer ----------------------------------------------------------------------------

    def prepare(self, model, optimizer, batch_size, compiled=False):
        """Put the network under the launcher's regime; returns what to call forward on. Weights are loaded before."""
        model.to(self.device)
        self.model, self.net, self.optimizer = model, model, optimizer
        if compiled:
            self.net = torch.compile(model)
        if self.deepspeed:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = -(-batch_size // self.size)
            config["gradient_clipping"] = 0.0  # or DeepSpeed clips to a norm of one, and trains something else
            # autocast, as everywhere else here, instead of a network whose weights are bf16; DeepSpeed then also sums
            # the gradients of its matrix products in bf16
            if self.precision != torch.float32:
                config["torch_autocast"] = {"enabled": True, "dtype": str(self.precision).removeprefix("torch.")}
            self.net, wrapper = self.accelerator.prepare(self.net, optimizer)
            self.optimizer = wrapper.optimizer
        elif self.accelerator is not None:
            self.net = self.accelerator.prepare_model(self.net)
        return self.net

    def autocast(self):
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def step(self, loss, groups):
        """Make a step of the optimizer down the joint loss. groups: learning rates and momenta, as in param_groups.

        Returns False where fp16's gradients overflowed, so that the step was left out.
        """
        loss = loss * self.size  # launchers average gradients over processes; ours add up (see `join`)
        if self.deepspeed:
            for group, wanted in zip(self.optimizer.param_groups, groups, strict=True):
                group["lr"], group["betas"] = wanted["lr"], wanted["betas"]
            self.net.backward(loss)
            self.net.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        before, self.scale = self.scale, self.scaler.get_scale()  # which is halved then, and then alone
        return self.scale >= before

    # --- checkpoints that any launcher can read -------------------------------------------------------------------

    def optimizer_state(self):
        """Return AdamW's moments by parameter name, whole, and its step count. Every process must call it.

        {"step": int, "exp_avg": {name: tensor}, "exp_avg_sq": {name: tensor}, "scaler": dict}
        """
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self.deepspeed:
            from deepspeed.utils import safe_get_full_optimizer_state as moment

            flat = self.optimizer.optimizer.state
            self._link_moments()
            named = named if flat else []
            moments = {key: {name: moment(p, key).cpu() for name, p in named} for key in MOMENTS}
            steps = [state["step"] for state in flat.values()]
        else:
            states = self.optimizer.state
            moments = {key: {name: states[p][key] for name, p in named if p in states} for key in MOMENTS}
            steps = [state["step"] for state in states.values()]
        return {"step": int(steps[0]) if steps else 0, **moments, "scaler": self.scaler.state_dict()}

    def load_optimizer_state(self, saved):
        """Set what `optimizer_state` returned, under this or any other launcher."""
        named = [(name, p) for name, p in self.model.named_parameters() if name in saved["exp_avg"]]
        if self.deepspeed:
            from deepspeed.utils import safe_set_full_optimizer_state as set_moment

            inner = self.optimizer.optimizer  # AdamW, or DeepSpeed's own, which counts in integers
            for flat in self.optimizer.single_partition_of_fp32_groups:
                device = flat.device if inner.defaults.get("fused") else "cpu"
                step = saved["step"]
                if isinstance(inner, torch.optim.AdamW):
                    step = torch.tensor(float(step), device=device)
                inner.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
            self._link_moments()
            for name, p in named:
                for key in MOMENTS:
                    set_moment(p, saved[key][name].to(self.device), key)
        else:
            fused = self.optimizer.defaults.get("fused")
            for name, p in named:
                step = torch.tensor(float(saved["step"]), device=p.device if fused else "cpu")
                moments = {key: saved[key][name].to(p.device).clone() for key in MOMENTS}
                self.optimizer.state[p] = {"step": step, **moments}
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
            self.scale = self.scaler.get_scale()

    def _link_moments(self):
        """Tell DeepSpeed again where the moments of each parameter lie.

        It does so itself after the first step of the first parameter group only, when those of the second are not
        there yet (0.19.8, stage_1_and_2.py).
        """
        self.optimizer._hp_optimizer_states_linked = False
        if self.optimizer.optimizer.state:
            self.optimizer._lazy_init_hp_params_optimizer_state()


ALONE = Team()


def pick_precision(name, device):
    """Return the torch.dtype of --precision on a device."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return dtypes[name]
