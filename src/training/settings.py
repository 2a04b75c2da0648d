"""What a train script was asked for, checked: how the loop runs, and whose trials it runs on."""

import itertools
import os
from dataclasses import dataclass, fields, replace

import utils
from disk.hints import how_to_train, runs_like, widths_there
from disk.names import Paths, run_name
from options import HIDDEN_DIM

# what may differ between a run and its continuation: how it is run, not what it computes; or what its stage says
NOT_SCIENCE = {"root", "data_path", "device", "precision", "compile", "resume", "overwrite", "num_workers",
               "ckpt_every", "ckpt_minutes", "wandb_log", "wandb_project", "wandb_group", "wandb_upload", "dry_run",
               "feat", "tag", "synthetic"}

# of a run's configuration, what its network is made of (clip_scale: whether it has heads for the contrast)
ARCHITECTURE = ("model", "hidden_dim", "n_blocks", "dropout", "prior_depth", "decoder_channels", "clip_scale")
NAMED_BY_STAGE = {"auto": "pretrain", "synthetic": "synthetic"}  # of --multisubject_ckpt: the run of that stage
OF_MINDEYE2 = {"prior_depth", "prior_scale", "decoder_channels"}  # what says nothing about --model components


@dataclass(frozen=True)
class Wandb:
    """What W&B shall be told, and what it files a run under: the flags of options.add_tracking, stage and tags."""

    log: bool = False
    project: str | None = None
    group: str | None = None  # of runs: a subject's chain of stages
    upload: bool = False  # files, too
    job_type: str | None = None
    tags: tuple = ()

    @classmethod
    def from_args(cls, args):
        """Read parsed flags."""
        group = args.wandb_group or "_".join(filter(None, (args.subj, getattr(args, "tag", ""))))
        return cls(args.wandb_log, args.wandb_project, group, args.wandb_upload, tags=(args.subj,))

    def of(self, job_type, *tags):
        """Return the same for a run of a stage, with further tags, of which None is none."""
        tags = dict.fromkeys(tag[:64] for tag in (*self.tags, *tags) if tag)  # W&B takes no longer ones
        return replace(self, job_type=job_type, tags=tuple(tags))


@dataclass(frozen=True)
class Loop:
    """How the training loop runs: the flags of options.add_loop, add_compute, add_precision and add_tracking."""

    num_epochs: int
    max_lr: float  # peak of the one-cycle schedule
    batch_size: int  # trials, over all subjects and processes
    seed: int
    device: str = "auto"
    precision: str = "auto"
    weight_decay: float = 0.01  # of weights; biases and normalisation gains have none
    num_workers: int = 0  # data loader processes
    ckpt_every: int = 1  # epochs
    ckpt_minutes: float = 10.0
    compile: bool = False
    resume: bool = False
    overwrite: bool = False
    wandb: Wandb = Wandb()

    @classmethod
    def from_args(cls, args):
        """Read parsed flags. A job that SLURM requeued continues, --overwrite or not."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if field.name in args}
        requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        return cls(**given | {"overwrite": args.overwrite and not requeued, "wandb": Wandb.from_args(args)})


@dataclass(frozen=True)
class Plan:
    """Whose trials a run learns from, what it is called and where it starts: what `open_run` and its like open."""

    paths: Paths
    stage: str  # pretrain, synthetic, finetune, scratch or ridge
    subj: str  # pretrain: the subject that is left out
    num_sessions: int | None  # the first so many of each subject; None = all
    val_fraction: float  # of the training images: they validate
    hidden_dim: int | None  # width of the network, part of the run's name
    tag: str
    multisubject_ckpt: str | None  # finetune, synthetic: the pretrained run, "auto" or "synthetic"
    loop: Loop
    config: dict  # all that decides the result but the feature: settings_of
    hold_out: str | None = None  # 'K/N', the cluster of images that neither trains nor validates
    pretrain_subjects: tuple = ()  # pretrain: these alone

    @classmethod
    def from_args(cls, args):
        """Read the flags of options.training_parser.

        Raises UserError for a value out of range, and for flags that mean two stages.
        """
        check_flags(vars(args))
        if args.multi_subject and args.multisubject_ckpt:
            raise utils.UserError("--multi_subject and --multisubject_ckpt: pretraining and fine-tuning are two runs; "
                                  "give one of the two")
        if args.model == "ridge" and (args.multi_subject or args.multisubject_ckpt):
            raise utils.UserError("--model ridge: has no pretraining; leave out --multi_subject and "
                                  "--multisubject_ckpt")
        if args.freeze_trunk and not args.multisubject_ckpt:
            raise utils.UserError("--freeze_trunk: without --multisubject_ckpt there is nothing pretrained to leave as "
                                  "it is; give both, or none")
        if args.synthetic and (args.model != "components" or args.multi_subject or args.hold_out):
            raise utils.UserError("--synthetic: trains components, of --subj alone, and not with --hold_out, of which "
                                  "GNet knows nothing; leave one of them out")
        stage = "pretrain" if args.multi_subject else "finetune" if args.multisubject_ckpt else "scratch"
        stage = "ridge" if args.model == "ridge" else "synthetic" if args.synthetic else stage
        return cls._of(args, stage, settings_of(vars(args), stage), args.hidden_dim, args.multisubject_ckpt)

    @classmethod
    def gnet_from_args(cls, args):
        """Read the flags of train_gnet.py; raises UserError for a value out of range."""
        check_flags(vars(args))
        return cls._of(args, "pretrain" if args.multi_subject else "scratch", settings_of(vars(args), "gnet"))

    @classmethod
    def adapter_from_args(cls, args):
        """Read the flags of train_adapter.py; raises UserError for a value out of range."""
        check_flags(vars(args))
        paths, config = Paths.from_args(args), settings_of(vars(args), "adapter")
        return cls._of(args, "scratch", config | {"sd_model": paths.as_recorded(paths.model(args.sd_model))})

    @classmethod
    def _of(cls, args, stage, config, hidden_dim=None, multisubject_ckpt=None):
        # --num_sessions counts those of --subj; pretraining uses every session of the other subjects
        num_sessions = None if getattr(args, "multi_subject", False) else args.num_sessions
        return cls(Paths.from_args(args), stage, args.subj, num_sessions, args.val_fraction, hidden_dim, args.tag,
                   multisubject_ckpt, Loop.from_args(args), config, getattr(args, "hold_out", None),
                   tuple(getattr(args, "pretrain_subjects", ())))

    def run_name(self, feat):
        """Return the name of a feature's run."""
        return run_name(self.stage, self.subj, feat, self.hidden_dim, self.num_sessions, self.tag,
                        self.hold_out)

    def folder(self, feat):
        """Return the folder of a feature's run."""
        return self.paths.run(self.run_name(feat))

    def pretrained_path(self, feat):
        """Return the checkpoint to start from, whether it is there or not; None where there is none to start from.

        `auto` is the pretraining of the same subject, feature, width and cluster held out: of the same tag where
        there is one, else of none. `synthetic` is the run on simulated trials of the same, and of as many sessions.
        """
        name = self.multisubject_ckpt
        if self.stage not in ("finetune", "synthetic") or not name:
            return None
        if name in NAMED_BY_STAGE:
            names = [run_name(NAMED_BY_STAGE[name], self.subj, feat, self.hidden_dim, self.num_sessions, tag,
                              self.hold_out) for tag in (self.tag, "")]
            name = next((name for name in names if (self.paths.run(name) / "last.pth").exists()), names[-1])
        return self.paths.run_given(name) / "last.pth"

    def pretrained_file(self, feat):
        """Return the checkpoint to start from, or None; UserError when it is missing."""
        checkpoint = self.pretrained_path(feat)
        if checkpoint is None or checkpoint.exists():
            return checkpoint
        stage = NAMED_BY_STAGE.get(self.multisubject_ckpt, "pretrain")
        wanted = {"subj": self.subj, "run": stage, "hidden_dim": self.hidden_dim, "tag": self.tag,
                  "num_sessions": self.num_sessions, "hold_out": self.hold_out}
        there = runs_like(self.paths, wanted, feat, stage)
        return utils.require(checkpoint, "--multisubject_ckpt: the pretrained run",
                             (f"{there}: give the flags of one, or " if there else "")
                             + f"pretrain first ({how_to_train(self.paths, wanted, feat)})")


def like_pretrained(feats, args):
    """Give the flags of the network that were not given (None) the values that the pretrained run was trained with.

    args: of options.training_parser; without --multisubject_ckpt, or where that run is not there, they stay as they
    are. feats: the features that the run may be named by. `auto` and `synthetic` are, without --hidden_dim, the run of
    the default width or else the only one; raises UserError where it could be several.
    """
    if not args.multisubject_ckpt:
        return
    from disk.files import load_json  # loads numpy, which --help does without

    paths, name = Paths.from_args(args), args.multisubject_ckpt
    if name in NAMED_BY_STAGE:
        places = itertools.product(dict.fromkeys((args.tag, "")), feats)
        name = next(filter(None, (pretrained_run(paths, args, tag, feat) for tag, feat in places)), None)
    if name is None or not (paths.run_given(name) / "config.json").exists():
        return
    pretrained = load_json(paths.run_given(name) / "config.json")
    for name in ARCHITECTURE:
        if getattr(args, name, 0) is None and name in pretrained:
            setattr(args, name, pretrained[name])


def pretrained_run(paths, args, tag, feat):
    """Return the name of the run that `auto` or `synthetic` means, of this tag and feature; None for none."""
    stage = NAMED_BY_STAGE[args.multisubject_ckpt]
    names = {width: run_name(stage, args.subj, feat, width, args.num_sessions, tag, args.hold_out)
             for width in widths_there(paths, stage, args.subj, feat, args.num_sessions, tag, args.hold_out)}
    if args.hidden_dim or HIDDEN_DIM in names:
        return names.get(args.hidden_dim or HIDDEN_DIM)
    if len(names) > 1:
        raise utils.UserError(f"--multisubject_ckpt {args.multisubject_ckpt}: there are {', '.join(names.values())}; "
                              "give the --hidden_dim of one")
    return next(iter(names.values()), None)


def check_flags(flags):
    """Raise UserError for a value out of range, of those flags {name: value} that the script has, and the model."""
    flags = {name: value for name, value in flags.items() if value is not None}
    for name in ("num_epochs", "ckpt_every", "batch_size", "hidden_dim", "prior_depth", "trunk_width"):
        if name in flags and flags[name] < 1:
            raise utils.UserError(f"--{name} {flags[name]}: wanted at least 1")
    for name in ("dropout", "mixup_pct", "val_fraction"):
        if name in flags and (not 0 <= flags[name] <= 1 or (name == "dropout" and flags[name] == 1)):
            raise utils.UserError(f"--{name} {flags[name]:g}: wanted a fraction from 0 to 1")
    for name in ("max_lr", "field_lr", "ckpt_minutes"):
        if name in flags and not 0 < flags[name] < float("inf"):
            raise utils.UserError(f"--{name} {flags[name]:g}: wanted a number greater than 0")
    for name in ("num_workers", "n_blocks", "pass_through", "l1", "clip_scale", "prior_scale", "weight_decay"):
        if name in flags and not 0 <= flags[name] < float("inf"):
            raise utils.UserError(f"--{name} {flags[name]:g}: wanted a number, 0 or more")


def settings_of(flags, stage):
    """Return what decides the result of a run: no flag of how it is run, and none that its stage ignores.

    flags: {name: value} of the whole command line; stage: of a Plan, or gnet. A run with other settings is another run.
    """
    config = {key: value for key, value in flags.items() if key not in NOT_SCIENCE}
    for name in ("hold_out", "pretrain_subjects", "freeze_trunk"):  # a run says what it said before there was the flag
        if not config.get(name):
            config.pop(name, None)
    if flags.get("model") == "components":
        config = {key: value for key, value in config.items() if key not in OF_MINDEYE2}
    if stage == "pretrain":
        del config["num_sessions"]
    else:
        config.pop("pretrain_subjects", None)
    if stage == "gnet" and flags["multi_subject"]:  # the same network, whichever subject's command trains it
        del config["subj"], config["num_sessions"]
    if stage == "ridge":
        config = {key: config[key] for key in ("subj", "num_sessions", "seed", "model", "val_fraction", "hold_out")
                  if key in config}
    return config | {"stage": stage}
