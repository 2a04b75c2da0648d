"""The one training loop: epochs, steps, validation, saving, resuming."""

import signal
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from disk.checkpoints import RUN_KEYS, load_checkpoint, save_checkpoint
from disk.files import save_json
from models import load_trunk, restore
from training.tracking import Tracker

HOW_ADAMW_RUNS = {"params", "fused", "foreach", "capturable", "differentiable"}  # not what it computes
PROGRESS = ("epoch", "step", "sums", "best")  # of a checkpoint: epochs done, steps of the next one and their logs
STEPS_BETWEEN_VOTES = 20  # how often several processes ask each other whether to stop


# --- the loop -----------------------------------------------------------------------------------------------------


def fit(run, model, objective):
    """Train `model` on `run`, one epoch after the other; leave last.pth, best.pth, metrics.jsonl, config.json behind.

    objective(model, batch, progress, generator, team) -> (scalar loss, {name: scalar tensor}); `batch` holds "voxels"
    {subject: (b, V)} and "target" (B, ...) on the device and "image_ids" (B,), progress = epoch / epochs in [0, 1).
    objective.judge names the validation value whose minimum is best.pth; an objective that has `kept` has tensors of
    that validation put into it.

    Every step draws from (seed, epoch, step) alone, so a run that is resumed, after an epoch or in the middle of one,
    repeats an uninterrupted one. SIGTERM and Ctrl-C end it after the current step, saved; raises utils.Interrupted.
    """
    args, team = run.args, run.team
    if run.pretrained is not None:
        source = load_checkpoint(run.pretrained)
        check_pretrained(run, source)
        copied = load_trunk(model, source["model"])
    last, state = run.folder / "last.pth", None
    if args.resume and not args.overwrite and last.exists():
        state = load_checkpoint(last, keys=(*RUN_KEYS, "optimizer", "schedule", *PROGRESS))
        if state["n_voxels"] != run.n_voxels:
            raise utils.UserError(f"{last}: was trained on {state['n_voxels']} (voxels), found {run.n_voxels}; put the "
                                  "same betas there, or --overwrite to train it again")
        restore(state, last, model)
    run.introduce()  # nothing is written before all that was given is found good
    if run.pretrained is not None:
        run.say(f"{len(copied)} tensors copied from {run.pretrained.parent.name} "
                f"({', '.join(sorted({key.split('.')[0] for key in copied}))}); the voxel encoder starts anew")
    model.to(team.device)
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=args.max_lr, fused=team.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.max_lr, total_steps=max(4, args.num_epochs * len(run.train)),  # fewer it can not do
        pct_start=min(0.5, 2 / args.num_epochs))
    net = team.prepare(model, optimizer, args.batch_size, args.compile)
    epoch, step, sums, best = 0, 0, {}, float("inf")  # epochs done, steps of the next one done and their logs
    if state is not None:
        team.load_optimizer_state(state["optimizer"])
        schedule.load_state_dict(state["schedule"]["clock"])
        for group, saved in zip(optimizer.param_groups, state["schedule"]["groups"], strict=True):
            group.update(saved)
        epoch, step, sums, best = (state[key] for key in PROGRESS)
        run.say(f"resumed after epoch {epoch}" + f", step {step}" * (step > 0))
        del state
    tracker = start_records(run, epoch)

    def save(file, **more):
        if team.is_main:
            save_checkpoint(run.folder / file, {
                "model": model.state_dict(), "model_args": model.model_args, "epoch": epoch, "best": best,
                "config": run.config, "subjects": list(run.n_voxels), "n_voxels": run.n_voxels, **more})

    def save_last():
        groups = [{key: group[key] for key in group.keys() - HOW_ADAMW_RUNS} for group in optimizer.param_groups]
        save("last.pth", optimizer=team.optimizer_state(), schedule={"clock": schedule.state_dict(), "groups": groups},
             step=step, sums=sums)

    loader = make_loader(run.train, args.num_workers, team)
    with utils.StopSignals() as stop, progress_bar(run, epoch, step) as bar:
        while epoch < args.num_epochs:
            sums, step, timing = train_epoch(run, net, objective, schedule, loader, epoch, step, sums, stop, bar)
            if step == len(run.train):
                logs = average(sums, "train", objective) | timing | {"train/lr": schedule.get_last_lr()[0]}
                if not np.isfinite(logs["train/loss"]):
                    raise utils.UserError(f"the loss became NaN in epoch {epoch + 1}; the last checkpoint is intact: "
                                          "lower --max_lr and use --resume, or look for NaN in the targets")
                logs |= validate(run, net, objective, epoch / args.num_epochs)
                epoch, step, sums = epoch + 1, 0, {}
                tracker.log(logs, step=epoch)
                bar.set_postfix(loss=f"{logs['train/loss']:.3f}", val=f"{logs['val/loss']:.3f}")
                run.say(f"epoch {epoch} of {args.num_epochs}: loss {logs['train/loss']:.4f}, "
                        f"validation {logs['val/loss']:.4f}", show=False)
                if logs[f"val/{objective.judge}"] < best:
                    best = logs[f"val/{objective.judge}"]
                    save("best.pth", **getattr(objective, "kept", {}))
            stopping = team.any(stop.received is not None)
            if stopping and not np.isfinite(float(sums.get("loss", 0))):
                raise utils.UserError(f"the loss became NaN in epoch {epoch + 1}; the last checkpoint is intact")
            if stopping or (step == 0 and (epoch % args.ckpt_every == 0 or epoch == args.num_epochs)):
                save_last()
            if stopping:
                tracker.finish()
                team.any(False)  # nobody leaves while the main process writes: launchers end all when one ends
                raise utils.Interrupted(f"{last} holds epoch {epoch}, step {step}; run it again with --resume to go on",
                                        stop.received or signal.SIGTERM)
    tracker.finish()


def check_pretrained(run, source):
    """Refuse to fine-tune from a run of another feature, or from one that has seen the subject already."""
    found = source["config"]["feat"]
    if found != run.feat:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: is of {found}, wanted {run.feat}; "
                              f"give the run that pretrained {run.feat}, or `auto`")
    wanted = source["config"]["num_epochs"]
    if source["epoch"] < wanted:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: {source['epoch']} of {wanted} epochs "
                              "are done; finish it first (the same command with --resume)")
    seen = [subj for subj in run.n_voxels if subj in source["n_voxels"]]
    if seen:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: has seen {seen[0]}, wanted a run "
                              f"without it; pretrain with --subj {seen[0]} --multi_subject, or give `auto`")


def train_epoch(run, net, objective, schedule, loader, epoch, step, sums, stop, bar):
    """The steps `step`.. of an epoch, or until a signal.

    sums: of the logs of the steps before, weighted by trials. Returns the sums, the number of steps done and the rates
    of these steps.
    """
    team, args = run.team, run.args
    torch.nn.Module.train(net)  # not net.train(): DeepSpeed's leaves its own `training` as it was
    run.train.set_epoch(epoch)
    loader.sampler.first = step
    generator = torch.Generator(team.device)
    waited, n_trials, started = 0.0, 0, time.perf_counter()
    before = started
    with math_attention(team.device):
        for item in loader:
            waited += time.perf_counter() - before
            generator.manual_seed(utils.derive_seed(args.seed, epoch, step))
            utils.seed_everything(utils.derive_seed(args.seed, epoch, step, team.rank))
            batch = join_batch(item, team)
            with team.autocast():
                loss, logs = objective(net, batch, epoch / args.num_epochs, generator, team)
            team.step(loss, schedule.optimizer.param_groups)
            schedule.step()
            add(sums, {"loss": loss.detach(), **logs}, len(batch["target"]))
            n_trials += len(batch["target"])
            step += 1
            bar.update()
            if team.size == 1 or step % STEPS_BETWEEN_VOTES == 0:
                if step < len(run.train) and team.any(stop.received is not None):
                    break
            before = time.perf_counter()
    seconds = time.perf_counter() - started
    timing = {"train/samples_per_s": n_trials / seconds, "train/data_wait_pct": 100 * waited / seconds}
    return sums, step, timing


@torch.no_grad()
def validate(run, net, objective, progress):
    """The objective's logs over the validation trials, val/..., with the same random numbers in every epoch."""
    team = run.team
    torch.nn.Module.train(net, False)
    sums, generator = {}, torch.Generator(team.device)
    with math_attention(team.device):
        for step, item in enumerate(make_loader(run.val, 0, team)):
            generator.manual_seed(utils.derive_seed(run.args.seed, step))
            batch = join_batch(item, team)
            with team.autocast():
                loss, logs = objective(net, batch, progress, generator, team)
            add(sums, {"loss": loss, **logs}, len(batch["target"]))
    return average(sums, "val", objective)


def add(sums, logs, n):
    """Add the logs of n trials. Nothing is asked of the GPU: they stay tensors."""
    for key, value in {**logs, "trials": 1}.items():
        sums[key] = sums.get(key, 0) + value * n


def average(sums, prefix, objective):
    """{prefix/name: float}, means over trials; an objective with `summarise` makes its scalars of the means itself."""
    means = {key: value / sums["trials"] for key, value in sums.items() if key != "trials"}
    means = getattr(objective, "summarise", dict)(means)
    return {f"{prefix}/{key}": float(value) for key, value in means.items()}


class FromStep(torch.utils.data.Sampler):
    """The steps `first`.. of an epoch, in order."""

    def __init__(self, n_steps):
        self.n_steps, self.first = n_steps, 0

    def __iter__(self):
        return iter(range(self.first, self.n_steps))

    def __len__(self):
        return self.n_steps - self.first


def make_loader(batches, num_workers, team):
    """A loader that outlives an epoch. Its workers leave signals to the main process, which has a step to finish."""
    return DataLoader(batches, batch_size=None, sampler=FromStep(len(batches)), num_workers=num_workers,
                      pin_memory=team.device.type == "cuda", persistent_workers=num_workers > 0,
                      worker_init_fn=ignore_signals)


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def join_batch(item, team):
    """The joint batch on the device: what every process read of it, put together."""
    voxels, n = {}, 0
    for subj, rows in item["voxels"].items():
        voxels[subj] = team.join(rows.to(team.device, non_blocking=True), item["sizes"][subj], n)
        n += item["sizes"][subj]
    targets = {name: team.join(rows.to(team.device, non_blocking=True), n) for name, rows in item["targets"].items()}
    return {"voxels": voxels, "image_ids": item["image_ids"], **targets}


def start_records(run, epoch):
    """Write config.json and open the tracker; other processes than the main one keep no records."""
    if not run.team.is_main:
        return NoTracker()
    save_json(run.folder / "config.json", run.config | {"git_commit": utils.git_commit()})
    return Tracker(run.folder, run.name, run.config, run.args.wandb_log, run.args.wandb_project, epoch)


class NoTracker:
    def log(self, metrics, step):
        pass

    def finish(self):
        pass


def progress_bar(run, epoch, step):
    n_steps = len(run.train)
    return tqdm(desc=run.name, initial=epoch * n_steps + step, total=run.args.num_epochs * n_steps, unit="step",
                disable=not run.team.is_main, mininterval=0.5 if sys.stderr.isatty() else 30)


def math_attention(device):
    """On a CPU, plain matrix products: its fused attention is several times slower backwards on short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def weight_decay_groups(model, weight_decay=1e-2):
    """AdamW parameter groups: no decay on biases (of any shape) and on normalisation gains (of one dimension)."""
    named = [(p, p.ndim > 1 and not name.endswith("bias")) for name, p in model.named_parameters() if p.requires_grad]
    decayed, free = ([p for p, decays in named if decays is wanted] for wanted in (True, False))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
