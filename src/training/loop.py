"""The one training loop: epochs, steps, validation, saving, resuming.

Letters: B batch (all subjects together), b one subject's part of it, V voxels."""

import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import utils
from disk.checkpoints import RUN_KEYS, load_checkpoint, require_keys, save_checkpoint
from disk.files import archive_hash, save_json
from models import freeze_trunk, load_trunk, restore
from nsd.components import basis_in, maker_in
from training.settings import Wandb
from training.tracking import Dashboard, Tracker, load_rows

HOW_ADAMW_RUNS = {"params", "fused", "foreach", "capturable", "differentiable"}  # not what it computes
STEPS_BETWEEN_VOTES = 20  # how often several processes ask each other whether to stop


# --- the loop -----------------------------------------------------------------------------------------------------


@dataclass
class Position:
    """How far a training is."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next one
    sums: dict = field(default_factory=dict)  # their logs, added up
    best: float = float("inf")  # the lowest validation value of the objective's judge


POSITION = tuple(Position.__dataclass_fields__)  # its keys in a checkpoint


class Alarm:
    """Says when so many seconds have passed since it was set."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.set()

    def set(self):
        self.rings_at = time.monotonic() + self.seconds

    def rings(self):
        return time.monotonic() >= self.rings_at


@dataclass
class Pace:
    """How fast an epoch's steps were."""

    seconds: float = 0.0
    waited: float = 0.0  # of them for data
    trials: int = 0

    def rates(self):
        return {"train/samples_per_s": self.trials / self.seconds,
                "train/data_wait_pct": 100 * self.waited / self.seconds}


def fit(run, model, objective, loop):
    """Train `model` on `run`, one epoch after the other; leave last.pth, best.pth, metrics.jsonl, config.json behind.

    run: training.runs.Run; loop: training.settings.Loop.
    objective(model, batch, progress, generator, team) -> (scalar loss, {name: scalar tensor}); `batch` is that of
    `to_device`, progress = epoch / epochs in [0, 1). objective.judge names the validation value whose minimum is
    best.pth; an objective that has `kept` has tensors of that validation put into it.

    Every step draws from (seed, epoch, step) alone, so a run that is resumed, after an epoch or in the middle of one,
    repeats an uninterrupted one. It is saved every so many epochs, and minutes. SIGTERM and Ctrl-C end it after the
    current step, saved; raises utils.Interrupted. Raises UserError, and saves nothing, when the loss is not finite.
    """
    team, at = run.team, Position()
    state = load_start(run, model, loop)
    resumed = state is not None
    model.to(team.device)
    if resumed and state["epoch"] >= loop.num_epochs:
        return
    optimizer, schedule = make_optimizer(model, loop, len(run.train))
    net = team.prepare(model, optimizer, loop.batch_size, loop.compile)
    if resumed:
        at = go_on(state, team, optimizer, schedule)
        run.say(f"resumed after epoch {at.epoch}" + f", step {at.step}" * (at.step > 0))
        del state  # it holds the moments once more
    tracker = start_records(run, loop, at.epoch, resumed)
    train, val = (make_loader(batches, loop.num_workers, team) for batches in (run.train, run.val))
    alarm, pace = Alarm(60 * loop.ckpt_minutes), Pace()
    with utils.StopSignals() as stop, progress_bar(run, loop, at) as bar:
        def pausing():
            return stop.received is not None or alarm.rings()

        while at.epoch < loop.num_epochs:
            train_epoch(run, net, objective, loop, at, schedule, train, pausing, tracker, bar, pace)
            require_finite(run, model, loop, at)
            if at.step == len(run.train):
                logs, pace = pace.rates() | {"train/lr": schedule.get_last_lr()[0]}, Pace()
                finish_epoch(run, model, net, objective, loop, at, val, tracker, bar, logs)
            stopping, late = team.any(stop.received is not None), team.any(alarm.rings())
            ended = at.step == 0 and (at.epoch % loop.ckpt_every == 0 or at.epoch == loop.num_epochs)
            if stopping or late or ended:
                save_last(run, model, objective, optimizer, schedule, at, loop)
                alarm.set()
            if stopping:
                tracker.finish()
                team.any(False)  # no process exits while the main one writes: launchers end all when one ends
                raise utils.Interrupted(f"{run.folder / 'last.pth'} holds epoch {at.epoch}, step {at.step}; run it "
                                        "again with --resume to go on", stop.received or signal.SIGTERM)
    conclude(run, objective, tracker)


def train_epoch(run, net, objective, loop, at, schedule, loader, pausing, tracker, bar, pace):
    """Train the rest of an epoch from `at`, or until `pausing()` says so in any process; moves `at`, adds to `pace`."""
    team = run.team
    torch.nn.Module.train(net)  # not net.train(): DeepSpeed's leaves its own `training` as it was
    run.train.set_epoch(at.epoch)
    loader.sampler.first = at.step
    generator = torch.Generator(team.device)
    before = started = time.perf_counter()
    with math_attention(team.device):
        for item in loader:
            pace.waited += time.perf_counter() - before
            generator.manual_seed(utils.derive_seed(loop.seed, at.epoch, at.step))
            utils.seed_everything(utils.derive_seed(loop.seed, at.epoch, at.step, team.rank))
            batch = to_device(item, team.device)
            with team.autocast():
                loss, logs = objective(net, batch, at.epoch / loop.num_epochs, generator, team)
            if team.step(loss, schedule.optimizer.param_groups):
                schedule.step()
            logs = {"loss": loss.detach(), **logs}
            add(at.sums, logs, len(batch["image_ids"]))
            pace.trials += len(batch["image_ids"])
            at.step += 1
            tracker.log_step(logs | {"lr": schedule.get_last_lr()[0]}, at.epoch * len(run.train) + at.step)
            bar.update()
            if team.size == 1 or at.step % STEPS_BETWEEN_VOTES == 0:
                if at.step < len(run.train) and team.any(pausing()):
                    break
            before = time.perf_counter()
    pace.seconds += time.perf_counter() - started


def require_finite(run, model, loop, at):
    """Raise UserError when the loss of the epoch's steps, or a weight, is not finite: nothing more may be saved."""
    if np.isfinite(float(at.sums["loss"])) and all(p.isfinite().all() for p in model.parameters()):
        return
    # the schedule of an unfinished run is of its own --max_lr: with another it cannot be gone on with
    raise utils.UserError(f"{run.name}: the loss became NaN or infinite in epoch {at.epoch + 1}, at --max_lr "
                          f"{loop.max_lr:g}; start over with a lower one: --max_lr {loop.max_lr / 3:.1g} --overwrite")


def finish_epoch(run, model, net, objective, loop, at, loader, tracker, bar, further_logs):
    """Validate, log, keep the best; moves `at` to the next epoch. loader: of the validation's batches."""
    logs = average(at.sums, "train", objective) | further_logs
    logs |= validate(run, net, objective, loader, at.epoch / loop.num_epochs, loop.seed)
    at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
    tracker.log_epoch(logs, at.epoch)
    bar.set_postfix(loss=f"{logs['train/loss']:.3f}", val=f"{logs['val/loss']:.3f}")
    run.say(f"epoch {at.epoch} of {loop.num_epochs}: loss {logs['train/loss']:.4f}, "
            f"validation {logs['val/loss']:.4f}", show=False)
    if logs[f"val/{objective.judge}"] < at.best:
        at.best = logs[f"val/{objective.judge}"]
        save(run, "best.pth", model, at, **getattr(objective, "kept", {}))


@torch.no_grad()
def validate(run, net, objective, loader, progress, seed):
    """Return the objective's logs over the validation trials, val/..., with the same random numbers in every epoch."""
    team = run.team
    torch.nn.Module.train(net, False)
    sums, generator = {}, torch.Generator(team.device)
    with math_attention(team.device):
        for step, item in enumerate(loader):
            generator.manual_seed(utils.derive_seed(seed, step))
            batch = to_device(item, team.device)
            with team.autocast():
                loss, logs = objective(net, batch, progress, generator, team)
            add(sums, {"loss": loss, **logs}, len(batch["image_ids"]))
    return average(sums, "val", objective)


def add(sums, logs, n):
    """Add the logs of n trials. They stay tensors, so that nothing waits for the GPU."""
    for key, value in {**logs, "trials": 1}.items():
        sums[key] = sums.get(key, 0) + value * n


def average(sums, prefix, objective):
    """Return {prefix/name: float}, means over trials.

    An objective with `summarise` makes its scalars of the means itself.
    """
    means = {key: value / sums["trials"] for key, value in sums.items() if key != "trials"}
    means = getattr(objective, "summarise", dict)(means)
    return {f"{prefix}/{key}": float(value) for key, value in means.items()}


# --- starting, saving, going on -----------------------------------------------------------------------------------


def load_start(run, model, loop):
    """Put into `model` what training starts from: the pretrained trunk, or this run's last.pth with --resume.

    Returns the checkpoint that is resumed, or None. Introduces the run: nothing is written before all that was given
    is found good.
    """
    if run.pretrained is not None:
        source = load_checkpoint(run.pretrained)
        check_pretrained(run, source)
        check_network(run, source["model_args"], model.model_args)
        own = source["config"].get("stage") == "synthetic"  # then it has the subject's own voxel encoder
        copied = load_trunk(model, source["model"], voxel_encoders=own)
        if run.config.get("freeze_trunk"):
            freeze_trunk(model)
    last, state = run.folder / "last.pth", None
    if loop.resume and not loop.overwrite and last.exists():
        state = load_checkpoint(last, keys=(*RUN_KEYS, "epoch"))
        if state["epoch"] < loop.num_epochs:  # a finished run is not gone on with
            require_keys(state, last, ("optimizer", "schedule", *POSITION))
        if state["n_voxels"] != run.n_voxels:
            raise utils.UserError(f"{last}: was trained on {state['n_voxels']} (voxels), found {run.n_voxels}; put the "
                                  "same betas there, or --overwrite to train it again")
        others = {key: value for key, value in model.state_dict().items() if not key.startswith(run.keeps)}
        restore({**state, "model": state["model"] | others}, last, model)
    run.introduce()
    if run.pretrained is not None:
        run.say(f"{len(copied)} tensors copied from {run.pretrained.parent.name} "
                + ("(all of them)" if own else "(all but the voxel encoder, which starts from scratch)")
                + "; the voxel encoder alone is trained" * run.config.get("freeze_trunk", False))
    return state


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
    check_targets(run, source["config"].get("made_from", {}))
    if source["config"].get("stage") == "synthetic":
        check_simulated(run, source)
        return
    seen = [subj for subj in run.n_voxels if subj in source["n_voxels"] and same_person(run, source["config"], subj)]
    if seen:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: has seen {seen[0]}, wanted a run "
                              f"without it; pretrain with --subj {seen[0]} --multi_subject, or give `auto`")


def check_simulated(run, source):
    """Refuse a run on simulated trials whose GNet knows other trials than this run may, or that is of other voxels."""
    names = ("subj", "num_sessions", "val_fraction", "seed")
    differing = [f"{name} {source['config'][name]}, wanted {run.config[name]}" for name in names
                 if source["config"][name] != run.config[name]]
    if source["n_voxels"] != run.n_voxels:
        differing.append(f"voxels {source['n_voxels']}, wanted {run.n_voxels}")
    if differing:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: its simulated responses are of "
                              f"{'; '.join(differing)}; give the run of the same, or simulate anew")


def same_person(run, pretrained, subj):
    """Say whether a subject is the one of that name in the pretrained run (its config), which may be of other data.

    It is, if both runs lie in one root or were trained on the same responses.
    """
    known = [config.get("made_from", {}).get(f"betas of {subj}") for config in (run.config, pretrained)]
    return run.pretrained.parent.parent == run.folder.parent or None in known or known[0] == known[1]


def check_targets(run, made_from):
    """Refuse a pretrained run whose outputs mean something else than this run's targets: coefficients of another basis,
    features by another model. made_from: what it was trained on; what was not recorded then passes."""
    for what, found in run.config.get("made_from", {}).items():
        kind, _, feat = what.rpartition(" ")
        if kind not in ("components of", "feature") or what not in made_from:
            continue
        meaning, mend = (basis_in, f"take over those that it was trained on (delete {feat}_components.hdf5, then "
                         f"img2feat.py --feats {feat} --components_from ROOT)") if kind == "components of" else \
            (maker_in, f"make it by that model (img2feat.py --feats {feat} --overwrite)")
        known, found = meaning(made_from[what]), meaning(found)
        if None not in (known, found) and known != found:
            raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: was trained on {what} {known}, "
                                  f"wanted {found} as here: the same numbers mean something else; {mend}, or pretrain "
                                  "again")


def check_network(run, pretrained, wanted):
    """Refuse to fine-tune a network of other sizes than the pretrained one; both: model_args."""
    if pretrained["kind"] != wanted["kind"]:
        models = [{"components": "components"}.get(sizes["kind"], "mindeye2") for sizes in (pretrained, wanted)]
        differing = ["--model {}, here {}".format(*models)]
    else:
        differing = ["{} {}, here {}".format(*in_flags(key, found, wanted[key])) for key, found in pretrained.items()
                     if key not in ("n_voxels", "dropout") and found != wanted[key]]
    if differing:
        raise utils.UserError(f"--multisubject_ckpt {run.pretrained.parent.name}: was pretrained with "
                              f"{'; '.join(differing)}; give no such flag (the network is then as pretrained), or "
                              "another run")


def in_flags(key, *values):
    """Return the flag that a size of a network (model_args) is of, and its values as they lead there."""
    if key == "contrast":
        return "--clip_scale", *("above 0" if value else 0 for value in values)
    if key == "components":
        return key, *(" ".join(f"{feat}: {k}" for feat, k in value.items()) for value in values)
    return f"--{key}", *values


def go_on(state, team, optimizer, schedule):
    """Set optimizer and schedule to those of a run's last.pth; returns its Position."""
    team.load_optimizer_state(state["optimizer"])
    schedule.load_state_dict(state["schedule"]["clock"])
    for group, saved in zip(optimizer.param_groups, state["schedule"]["groups"], strict=True):
        group.update(saved)
    return Position(**{key: state[key] for key in POSITION})


def save_last(run, model, objective, optimizer, schedule, at, loop):
    """Write last.pth, from which `go_on` goes on; of a finished training its weights alone. Every process must call it.
    """
    kept = getattr(objective, "kept", {})
    if at.epoch == loop.num_epochs:
        save(run, "last.pth", model, at, **kept)
        return
    groups = [{key: group[key] for key in group.keys() - HOW_ADAMW_RUNS} for group in optimizer.param_groups]
    save(run, "last.pth", model, at, optimizer=run.team.optimizer_state(),
         schedule={"clock": schedule.state_dict(), "groups": groups}, step=at.step, sums=at.sums)


def save(run, file, model, at, **more):
    """Write a checkpoint of the run, if this is the main process."""
    if run.team.is_main:
        weights = {key: value for key, value in model.state_dict().items() if key.startswith(run.keeps)}
        save_checkpoint(run.folder / file, {
            "model": weights, "model_args": model.model_args, "epoch": at.epoch, "best": at.best,
            "config": run.config, "subjects": list(run.n_voxels), "n_voxels": run.n_voxels, **more})


def start_records(run, loop, epoch=0, resumed=False):
    """Write config.json and open the tracker, which keeps the rows of metrics.jsonl up to `epoch`.

    Other processes than the main one keep no records.
    """
    if not run.team.is_main:
        return Dashboard(run.folder, run.name, run.config, Wandb())
    save_json(run.folder / "config.json", run.config | {"git_commit": utils.git_commit()})
    asked = loop.wandb.of(run.config.get("stage"), run.feat, run.config.get("model"))
    n_steps = loop.num_epochs * len(run.train)
    tracker = Tracker(run.folder, run.name, run.config, asked, epoch, resumed, n_steps, run.lines)
    if run.pretrained is not None:
        tracker.uses("checkpoint", run.pretrained, archive_hash)
    return tracker


def conclude(run, objective, tracker):
    """Say how good the best epoch was on validation (metrics.jsonl), and where the run lies; close its records."""
    if not run.team.is_main:
        return
    key = f"val/{objective.judge}"
    rows = [row for row in load_rows(run.folder / "metrics.jsonl") if key in row]
    best = min(rows, key=lambda row: row[key])
    r2 = [f"{name.removeprefix('val/r2_')} {value:.3f}" for name, value in best.items() if name.startswith("val/r2_")]
    epoch = f" (epoch {best['step']} of {rows[-1]['step']})" if len(rows) > 1 else ""
    run.say(f"best on validation{epoch}: {objective.judge} {best[key]:.4f}" + f", R2 of {', '.join(r2)}" * bool(r2)
            + f"; {run.folder}")
    for file in filter(Path.exists, (run.folder / "last.pth", run.folder / "best.pth")):
        tracker.makes("checkpoint", file, archive_hash)
    tracker.finish()


# --- batches, optimizer, progress ---------------------------------------------------------------------------------


class FromStep(torch.utils.data.Sampler):
    """The steps `first`.. of an epoch, in order."""

    def __init__(self, n_steps):
        self.n_steps, self.first = n_steps, 0

    def __iter__(self):
        return iter(range(self.first, self.n_steps))

    def __len__(self):
        return self.n_steps - self.first


def make_loader(batches, num_workers, team):
    """Make a loader that outlives an epoch; its workers leave signals to the main process, which finishes a step."""
    num_workers = min(num_workers, len(batches))
    return DataLoader(batches, batch_size=None, sampler=FromStep(len(batches)), num_workers=num_workers,
                      pin_memory=team.device.type == "cuda", persistent_workers=num_workers > 0,
                      worker_init_fn=ignore_signals)


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(item, device):
    """Make what an objective gets of what this process has read of a joint batch (nsd.batches).

    {"voxels": {subject: (b, V)}, name of a target: (rows, ...)}, this process's rows, on the device;
    "image_ids" (B,) and "sizes" {subject: rows} of all processes' rows.
    """
    def move(rows):
        return {name: part.to(device, non_blocking=True) for name, part in rows.items()}

    return {"voxels": move(item["voxels"]), "image_ids": item["image_ids"], "sizes": item["sizes"],
            **move(item["targets"])}


def make_optimizer(model, loop, steps_per_epoch):
    """Make AdamW and its one-cycle schedule, which peaks after two epochs, or halfway through a shorter training."""
    # fused, a step takes a quarter of the time on a CPU, too
    optimizer = torch.optim.AdamW(parameter_groups(model, loop.weight_decay), lr=loop.max_lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups],
        total_steps=max(4, loop.num_epochs * steps_per_epoch),  # it needs at least four
        pct_start=min(0.5, 2 / loop.num_epochs))
    return optimizer, schedule


def progress_bar(run, loop, at):
    """Show a bar of all steps of the training, in the main process."""
    n_steps = len(run.train)
    return utils.progress(desc=run.name, initial=at.epoch * n_steps + at.step, total=loop.num_epochs * n_steps,
                          unit="step", disable=not run.team.is_main)


def math_attention(device):
    """Make attention plain matrix products on a CPU, whose fused attention is several times slower backwards."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def parameter_groups(model, weight_decay):
    """Return AdamW's parameter groups: no decay of biases (of any shape) and normalisation gains (one dimension).

    Nor of the parameters that a model lists in `paced`, [(parameters, peak learning rate)], which are groups of their
    own.
    """
    paced = [{"params": list(own), "weight_decay": 0.0, "lr": rate} for own, rate in getattr(model, "paced", [])]
    apart = {id(p) for group in paced for p in group["params"]}
    named = [(p, p.ndim > 1 and not name.endswith("bias")) for name, p in model.named_parameters()
             if p.requires_grad and id(p) not in apart]
    decayed, free = ([p for p, decays in named if decays is wanted] for wanted in (True, False))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}, *paced]
