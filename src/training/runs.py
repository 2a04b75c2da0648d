"""What a training is made of: trials, targets, folder, settings."""

import argparse
import os
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

import utils
from disk.checkpoints import RUN_KEYS, load_checkpoint
from disk.names import Paths, run_name
from nsd.batches import EpochBatches
from nsd.rows import open_betas, open_feature
from nsd.trials import list_subjects, split_trials
from training.team import Team
from training.tracking import check_tracking

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
    train: EpochBatches
    val: EpochBatches
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
    check_tracking(args.wandb_log)
    check_flags(args)
    if args.multi_subject and args.multisubject_ckpt:
        raise utils.UserError("--multi_subject and --multisubject_ckpt: pretraining and fine-tuning are two runs; "
                              "give one of the two")
    if args.model == "ridge" and (args.multi_subject or args.multisubject_ckpt):
        raise utils.UserError("--model ridge: has no pretraining; leave out --multi_subject and --multisubject_ckpt")
    paths = Paths.from_args(args)
    stage = "pretrain" if args.multi_subject else "finetune" if args.multisubject_ckpt else "scratch"
    stage = "ridge" if args.model == "ridge" else stage
    name = run_name(stage, args.subj, feat, args.hidden_dim, args.num_sessions, args.tag)
    claimed = claim(args, paths, feat, name, stage)
    if claimed is None:
        return None
    config, team = claimed

    pretrained = None
    if stage == "finetune":
        source = args.multisubject_ckpt
        if source == "auto":  # of the same tag where there is one
            names = [run_name("pretrain", args.subj, feat, args.hidden_dim, tag=tag) for tag in (args.tag, "")]
            source = next((name for name in names if (paths.run(name) / "last.pth").exists()), names[-1])
        pretrained = utils.require(paths.run(source) / "last.pth", "--multisubject_ckpt: the pretrained run",
                                   "pretrain first (bash scripts/train.sh runs both stages)")

    # Pretraining uses every session of the other subjects; --num_sessions counts those of --subj.
    subjects = [s for s in list_subjects(paths) if s != args.subj] if args.multi_subject else [args.subj]
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
    betas = {subj: open_betas(paths, subj) for subj in subjects}
    targets = {key: open_feature(paths, other) for key, other in {"target": feat, **further}.items()}
    tables = {"train": {}, "val": {}}
    for subj in subjects:
        tables["train"][subj], tables["val"][subj] = split_trials(paths, subj, num_sessions, args.val_fraction,
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
    loaders = [EpochBatches(tables[part], betas[part], targets, args.batch_size, args.seed, team.rank, team.size)
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
    state = load_checkpoint(checkpoint, hint="use --overwrite", keys=(*RUN_KEYS, "epoch"))
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
