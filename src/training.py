"""The one training loop, and what a run is made of.

A train script opens a run (`open_run`: which trials, which targets, which folder), builds its network and objective,
and hands the three to `fit`. `fit_ridge` is the linear baseline on the same run.
"""

import argparse
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import options
import utils
from distributed import Team
from losses import pct_correct, similarities
from models import RidgeModel, load_trunk, restore

RIDGE_ALPHAS = np.logspace(-1, 7, 17)  # each target picks its own; betas are z-scored, so these suit any subject
RIDGE_COLUMNS = 2048  # targets solved at once: bounds the memory
HOW_ADAMW_RUNS = {"params", "fused", "foreach", "capturable", "differentiable"}  # not what it computes
PROGRESS = ("epoch", "step", "sums", "best")  # of a checkpoint: epochs done, steps of the next one and their logs
STEPS_BETWEEN_VOTES = 20  # how often several processes ask each other whether to stop


def get_parser(doc):
    """The flags that the train scripts share; defaults are MindEye2's."""
    parser = options.Parser(doc)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_compute(parser)
    options.add_precision(parser)
    options.add_tracking(parser)
    stage = parser.add_argument_group("stage")
    stage.add_argument("--multi_subject", action=argparse.BooleanOptionalAction, default=False,
                       help="pretrain on all subjects but --subj")
    stage.add_argument("--multisubject_ckpt", metavar="RUN",
                       help="fine-tune from this pretraining run: a name, or `auto` for that of --subj and the feature")
    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=["network", "ridge"], default="network",
                         help="ridge: the linear baseline, fitted at once to --subj's repeat-averaged responses")
    network.add_argument("--n_blocks", type=options.whole, default=4, metavar="N", help="residual MLP blocks")
    network.add_argument("--dropout", type=float, default=0.15, metavar="P")
    network.add_argument("--prior_depth", type=options.whole, default=6, metavar="N",
                         help="layers of the diffusion prior (c and g; z has none)")
    optimum = add_loop(parser)
    optimum.add_argument("--clip_scale", type=float, default=1.0, metavar="W", help="weight of the contrast")
    optimum.add_argument("--prior_scale", type=float, default=30.0, metavar="W",
                         help="weight of the prior's MSE (c and g)")
    optimum.add_argument("--mixup_pct", type=float, default=0.33, metavar="FRACTION", help="of the epochs, with MixCo")
    return parser


def add_loop(parser):
    """Flags of the loop itself: what `fit` reads, and what is validated on. Returns the group of the optimisation."""
    optimum = parser.add_argument_group("optimisation")
    optimum.add_argument("--batch_size", type=options.whole, default=42, metavar="TRIALS",
                         help="over all subjects and all processes")
    optimum.add_argument("--num_epochs", type=options.whole, default=30, metavar="N")
    optimum.add_argument("--max_lr", type=float, default=3e-4, metavar="LR", help="peak of the one-cycle schedule")
    optimum.add_argument("--val_fraction", type=float, default=options.VAL_FRACTION, metavar="FRACTION",
                         help="of the training images")
    keeping = parser.add_argument_group("keeping")
    keeping.add_argument("--ckpt_every", type=options.whole, default=1, metavar="EPOCHS")
    keeping.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                         help="continue the run if its folder holds a checkpoint")
    keeping.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start it again")
    keeping.add_argument("--num_workers", type=options.whole, default=2, metavar="N", help="data loader processes")
    keeping.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                         help="torch.compile the network: slow to start, faster on a GPU")
    return optimum


# what may differ between a run and its continuation: how it is run, not what it computes
NOT_SCIENCE = {"root", "data_path", "device", "precision", "compile", "resume", "overwrite", "num_workers",
               "ckpt_every", "wandb_log", "wandb_project", "dry_run", "feat", "tag"}


@dataclass
class Run:
    """One training: where it is kept, what it reads, how it is configured, who trains."""

    name: str
    feat: str
    folder: object
    config: dict
    args: argparse.Namespace
    team: Team
    tables: dict  # "train" and "val": {subject: trials}
    train: data.EpochBatches
    val: data.EpochBatches
    n_voxels: dict  # subject -> voxel count
    shapes: dict  # of one row of each target: {"target": (T, D)}
    pretrained: object = None  # checkpoint file of the pretraining run, or None
    target_statistics: tuple = ()  # mean (T, D) and standard deviation of the training images' targets

    @property
    def sizes(self):
        """Lines of the training and of the validation table, all subjects together."""
        return [sum(map(len, self.tables[part].values())) for part in ("train", "val")]

    def introduce(self):
        """Say what is trained on what."""
        n_train, n_val = self.sizes
        unit = "images" if self.feat == "gnet" else "trials"
        self.say(f"{n_train} training and {n_val} validation {unit} of {', '.join(self.n_voxels)}; target {self.feat} "
                 f"{self.shapes['target']}; {self.team}")

    def say(self, text, show=True):
        """Keep a line in the run's log.txt, and print it unless the progress bar shows the same."""
        if self.team.is_main:
            if show:
                print(f"{self.name}: {text}", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError), open(self.folder / "log.txt", "a") as file:  # a full disk: metrics.jsonl reports it
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def open_run(args, feat, **further):
    """Read what a run needs, before any work: trials, betas, targets, and the state of its folder.

    feat: 'c', 'z' or 'g_k'. further: names of other targets a batch shall hold, as tokens="g_12". Returns a Run, or
    None when the folder already holds this run, finished. Validation images are `--val_fraction` of the distinct
    training images; the test trials are never opened here.
    """
    utils.check_tracking(args.wandb_log)
    check_flags(args)
    if args.multi_subject and args.multisubject_ckpt:
        raise utils.UserError("--multi_subject and --multisubject_ckpt: pretraining and fine-tuning are two runs; "
                              "give one of the two")
    if args.model == "ridge" and (args.multi_subject or args.multisubject_ckpt):
        raise utils.UserError("--model ridge: has no pretraining; leave out --multi_subject and --multisubject_ckpt")
    paths = utils.Paths.from_args(args)
    stage = "pretrain" if args.multi_subject else "finetune" if args.multisubject_ckpt else "scratch"
    stage = "ridge" if args.model == "ridge" else stage
    name = utils.run_name(stage, args.subj, feat, args.hidden_dim, args.num_sessions, args.tag)
    claimed = claim(args, paths, feat, name, stage)
    if claimed is None:
        return None
    config, team = claimed

    pretrained = None
    if stage == "finetune":
        source = args.multisubject_ckpt
        if source == "auto":  # of the same tag where there is one
            names = [utils.run_name("pretrain", args.subj, feat, args.hidden_dim, tag=tag) for tag in (args.tag, "")]
            source = next((name for name in names if (paths.run(name) / "last.pth").exists()), names[-1])
        pretrained = utils.require(paths.run(source) / "last.pth", "--multisubject_ckpt: the pretrained run",
                                   "pretrain first (bash scripts/train.sh runs both stages)")

    # Pretraining uses every session of the other subjects; --num_sessions counts those of --subj.
    subjects = [s for s in data.subjects(paths) if s != args.subj] if args.multi_subject else [args.subj]
    if not subjects:
        raise utils.UserError(f"{paths.data_path}: no subject but {args.subj} has betas; --multi_subject needs others")
    num_sessions = None if args.multi_subject else args.num_sessions
    return gather_run(args, paths, feat, name, config, team, subjects, num_sessions, pretrained, further)


def check_flags(args):
    """Raise UserError for a value out of range, of those flags that the script has."""
    given = vars(args)
    for name in ("num_epochs", "ckpt_every", "batch_size", "hidden_dim", "n_blocks", "prior_depth", "trunk_width"):
        if name in given and given[name] < 1:
            raise utils.UserError(f"--{name} {given[name]}: wanted at least 1")
    for name in ("dropout", "mixup_pct", "val_fraction"):
        if name in given and (not 0 <= given[name] <= 1 or (name == "dropout" and given[name] == 1)):
            raise utils.UserError(f"--{name} {given[name]:g}: wanted a fraction from 0 to 1")
    if not 0 < args.max_lr < float("inf"):
        raise utils.UserError(f"--max_lr {args.max_lr:g}: wanted a number over 0")
    for name in ("num_workers", "pass_through", "l1", "clip_scale", "prior_scale"):
        if name in given and not 0 <= given[name] < float("inf"):
            raise utils.UserError(f"--{name} {given[name]:g}: wanted a number, 0 or more")


def claim(args, paths, feat, name, stage):
    """(config, team) of the run that is about to be trained, or None when its folder already holds it, finished."""
    config = settings_of(args, stage) | {"feat": feat, "run": name}
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        args.overwrite = False  # a requeued job goes on with what it began
    team = Team.assemble(args.device, args.precision)
    if finished(paths.run(name), config, args):
        team.print(f"{name}: finished before, kept (--overwrite trains it again)")
        return None
    return config, team


def settings_of(args, stage):
    """What decides the result of a run: the flags without how it is run, and without those that its stage ignores."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_SCIENCE}
    if stage == "pretrain":
        del config["num_sessions"]
    if stage == "gnet" and args.multi_subject:  # the same network, whoever's command trains it
        del config["subj"], config["num_sessions"]
    if stage == "ridge":
        config = {key: config[key] for key in ("subj", "num_sessions", "seed", "model", "val_fraction")}
    return config | {"stage": stage}


def gather_run(args, paths, feat, name, config, team, subjects, num_sessions, pretrained, further):
    """The Run of these subjects' trials; see open_run."""
    betas = {subj: data.open_betas(paths, subj) for subj in subjects}
    targets = {key: data.open_feature(paths, other) for key, other in {"target": feat, **further}.items()}
    tables = {"train": {}, "val": {}}
    for subj in subjects:
        tables["train"][subj], tables["val"][subj] = data.split_trials(paths, subj, num_sessions, args.val_fraction,
                                                                       args.seed)
        betas[subj].require(np.concatenate([tables[part][subj]["row"] for part in ("train", "val")]))
    run = make_run(args, paths.run(name), feat, config, team, tables, {"train": betas, "val": betas}, targets,
                   pretrained=pretrained)
    run.target_statistics = target_statistics(targets["target"], tables["train"], args.seed)
    return run


def make_run(args, folder, feat, config, team, tables, betas, targets, **more):
    """A Run of what was opened: tables and betas {"train", "val": {subject: ...}}, targets {name: Rows}.

    Seeds the random numbers, for the network that the script makes next.
    """
    loaders = [data.EpochBatches(tables[part], betas[part], targets, args.batch_size, args.seed, team.rank, team.size)
               for part in ("train", "val")]
    n_voxels = {subj: rows.shape[1] for subj, rows in betas["train"].items()}
    shapes = {key: rows.row_shape for key, rows in targets.items()}
    utils.seed_everything(utils.derive_seed(args.seed, 0))
    return Run(config["run"], feat, folder, config, args, team, tables, *loaders, n_voxels, shapes, **more)


def target_statistics(target, tables, seed, n=2000):
    """Mean over (at most `n`) training images' targets, and the standard deviation of what is left: (T, D), scalar."""
    images = np.unique(np.concatenate([table["image_id"] for table in tables.values()]))
    chosen = np.random.default_rng(seed).choice(images, min(n, len(images)), replace=False)
    rows = target[np.sort(chosen)].astype(np.float32)
    check_finite(target, rows)
    mean = rows.mean(axis=0)
    return mean, (rows - mean).std()


def check_finite(target, rows):
    """Raise UserError when rows that were read from the target's file are not finite."""
    if not np.isfinite(rows).all():
        raise utils.UserError(f"{target.path}: NaN or infinite values, wanted finite ones; write the feature again "
                              "(img2feat.py)")


def finished(folder, config, args):
    """Whether `folder` holds this very run, complete. A different or an unfinished one needs the user's word."""
    checkpoint = folder / "last.pth"
    if args.overwrite or not checkpoint.exists():
        return False
    state = utils.load_checkpoint(checkpoint, hint="use --overwrite", keys=(*utils.RUN_KEYS, "epoch"))
    found = state["config"]
    differing = [f"{key} {found.get(key)} -> {config.get(key)}" for key in sorted(found.keys() | config.keys())
                 if found.get(key) != config.get(key)]
    if differing:
        raise utils.UserError(f"{folder}: holds a run with another configuration ({'; '.join(differing)}); "
                              "give the same flags, another --tag, or --overwrite to train it again")
    done = state["epoch"] >= args.num_epochs
    if not done and not args.resume:
        raise utils.UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts again")
    return done


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
        source = utils.load_checkpoint(run.pretrained)
        check_pretrained(run, source)
        copied = load_trunk(model, source["model"])
    last, state = run.folder / "last.pth", None
    if args.resume and not args.overwrite and last.exists():
        state = utils.load_checkpoint(last, keys=(*utils.RUN_KEYS, "optimizer", "schedule", *PROGRESS))
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
            utils.save_checkpoint(run.folder / file, {
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
    utils.save_json(run.folder / "config.json", run.config | {"git_commit": utils.git_commit()})
    return utils.Tracker(run.folder, run.name, run.config, run.args.wandb_log, run.args.wandb_project, epoch)


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


# --- the linear baseline ------------------------------------------------------------------------------------------


def fit_ridge(run):
    """Fit one ridge regression per value of the target, and leave last.pth, metrics.jsonl and config.json behind.

    Repeat-averaged responses (N, V) -> targets (N, F), each with the penalty that its leave-one-out error prefers
    (scikit-learn's RidgeCV). Validation images are left out, and scored: explained variance and retrieval.
    """
    from sklearn.linear_model import RidgeCV

    if run.team.size > 1:
        raise utils.UserError("--model ridge: runs in one process, found LAUNCH with several; leave LAUNCH empty")
    (subj,) = run.n_voxels
    betas, target = run.train.betas[subj], run.train.targets["target"]
    train, val = (data.average_repeats(betas, run.tables[part][subj]) for part in ("train", "val"))
    model = RidgeModel(run.n_voxels, run.shapes["target"])
    rows = target[train.image_ids].reshape(len(train.image_ids), -1)  # (N, F) as stored
    check_finite(target, rows)
    run.introduce()
    for start in tqdm(range(0, rows.shape[1], RIDGE_COLUMNS), desc=run.name, unit="block", delay=2):
        columns = slice(start, start + RIDGE_COLUMNS)
        solved = RidgeCV(RIDGE_ALPHAS, alpha_per_target=True).fit(train.betas, rows[:, columns].astype(np.float32))
        model.linear.weight.data[columns] = torch.as_tensor(solved.coef_)
        model.linear.bias.data[columns] = torch.as_tensor(solved.intercept_)
    tracker = start_records(run, None)
    truth = torch.from_numpy(target[val.image_ids].astype(np.float32))
    predicted = model.predict({subj: torch.from_numpy(val.betas)})["nsdgeneral"]
    similarity = similarities(predicted, truth)
    mean = torch.as_tensor(run.target_statistics[0])
    error, spread = (predicted - truth).square().sum(), (truth - mean).square().sum()
    tracker.log({"val/r2": float(1 - error / spread), "val/fwd_pct_correct": float(pct_correct(similarity)),
                 "val/bwd_pct_correct": float(pct_correct(similarity.T))}, step=1)
    tracker.finish()
    utils.save_checkpoint(run.folder / "last.pth", {
        "model": model.state_dict(), "model_args": model.model_args, "epoch": run.args.num_epochs,
        "config": run.config, "subjects": [subj], "n_voxels": run.n_voxels})
