"""Argument groups that several scripts share: one flag, one meaning."""

import argparse
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import utils

DATA_PATH = "MindEyeV2/mindeyev2"  # from the root, where --data_path does not say otherwise
EXPDESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"  # from the root: where it is, the data are NSD's
# sessions each subject of NSD was scanned in: the default of --num_sessions (sessions_of)
SESSIONS = {"subj01": 40, "subj02": 40, "subj03": 32, "subj04": 30,
            "subj05": 40, "subj06": 32, "subj07": 40, "subj08": 30}
VAL_FRACTION = 0.05  # of the training images, by image: for validation
VISION_LAYERS = ["g_2", "g_4", "g_6", "g_8", "g_10", "g_12"]  # NeuralDiffuser's: blocks 1-6 of CLIP ViT-B/32
FEATURES = ["c", "z", *VISION_LAYERS]
MODELS = ("components", "mindeye2", "ridge")  # what --model takes
# what --guidance_rule, --guidance_grad and --guidance_x0 take
RULES, GRADS, X0S = ("posterior", "raw", "norm"), ("xt", "x0"), ("cond", "cfg")
SOLVERS = ("ddim", "dpm")  # what --solver takes
STAGES = ("finetune", "pretrain", "synthetic", "scratch", "ridge")  # of which a run of c, z or g is
TEST_SPLITS = ("new_test", "test", "val", "synthetic")  # what --test_split takes
SELECTORS = ("g", "gnet")  # what --select takes
MAX_SHIFT = 0.6  # --guidance_rule norm moves the predicted image by at most this many sigma (rms)


HIDDEN_DIM = 1024
# of the flags that depend on --model: components' from first trials on the small world, mindeye2's as published
COMPONENTS_DEFAULTS = {"n_blocks": 2, "dropout": 0.3, "batch_size": 64, "num_epochs": 12, "max_lr": 1e-3,
                       "weight_decay": 0.1, "clip_scale": 0.0, "mixup_pct": 0.0}
MINDEYE2_DEFAULTS = {"n_blocks": 4, "dropout": 0.15, "batch_size": 24, "num_epochs": 150, "max_lr": 3e-4,
                     "weight_decay": 0.01, "clip_scale": 1.0, "mixup_pct": 0.33, "prior_depth": 6}
# where pretraining has others: components' batches hold 20 trials of each subject. MindEye2 counts 150 epochs of 30,000
# trials, of all seven subjects together: 4.5 million trials, which are 29 times all that NSD has of them for training
PRETRAINING_DEFAULTS = {"components": {"num_epochs": 6, "batch_size": 140, "max_lr": 1.5e-3}, "ridge": {},
                        "mindeye2": {"batch_size": 42, "num_epochs": 29}}
FROZEN_MAX_LR = 3e-3  # of components whose trunk stays as pretrained: the voxel encoder starts from scratch


class Help(argparse.RawDescriptionHelpFormatter):
    """A line for each flag, with its default in brackets."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        if not action.option_strings:  # an argument by its place
            return self._format_args(action, action.dest.upper())
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"  # without --subject, ...

    def _get_help_string(self, action):
        default = shown(action.default)
        said = action.help.startswith("[") or isinstance(action.default, list) and action.help.endswith(")")
        return action.help if said or not default else f"{action.help} [{default}]"


def shown(default):
    """Write a flag's default as it would be given; '' of one that is off or says nothing."""
    if default is None or default is False or default in ("", [], argparse.SUPPRESS):
        return ""
    if isinstance(default, list):
        return " ".join(map(str, default))
    return "on" if default is True else f"{default:g}" if isinstance(default, float) else str(default)


class Parser(argparse.ArgumentParser):
    """argparse with the house's rules: no abbreviations, dashes accepted for underscores, docstring as --help."""

    def __init__(self, doc, dry_run_stops=True):
        """dry_run_stops: --dry_run prints the options and ends the program; else it is left to the script."""
        self.dry_run_stops, self.resolve = dry_run_stops, None
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False,
                         usage="%(prog)s [flags]      (below, defaults are in brackets)")
        self.add_argument("--dry_run", action=argparse.BooleanOptionalAction, default=False,
                          help="print the resolved options and stop" if dry_run_stops else "show the plan and stop")

    def format_help(self):
        for action in self._actions:
            if not action.help and shown(action.default):  # of no help argparse shows no default, either
                action.help = f"[{shown(action.default)}]"
        return super().format_help()

    def error(self, message):
        """One line and exit 2, without argparse's page of usage."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")

    def parse_args(self, args=None, namespace=None, complete=None, writes=None):
        """complete: a function of what was parsed, which fills in flags that were not given before the defaults do.
        writes: one that lists the folders that will be written, which --dry_run shows, too."""
        words = sys.argv[1:] if args is None else args
        words = [word if not word.startswith("--") else _underscored(word) for word in words]
        parsed = super().parse_args(words, namespace)
        if "num_sessions" in parsed and parsed.num_sessions is None:
            parsed.num_sessions = all_sessions(parsed)
        for fill_in in filter(None, (complete, self.resolve)):
            fill_in(parsed)
        if parsed.dry_run and self.dry_run_stops:
            folders = writes(parsed) if writes else []  # first: it may resolve what flags leave open
            print(json.dumps({**vars(parsed), **({"writes": folders} if folders else {})}, indent=1, default=str))
            self.exit(0)
        return parsed


def _underscored(word):
    flag, equals, value = word.partition("=")
    name = flag[2:]
    negated = name.startswith("no-")
    name = name[3:] if negated else name
    return f"--{'no-' if negated else ''}{name.replace('-', '_')}{equals}{value}"


def subject(text, last=99):
    """'1', '01' or 'subj01' -> 'subj01'."""
    digits = text.removeprefix("subj")
    if not digits.isdecimal() or not 1 <= int(digits) <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is not a subject; wanted 1..{last} or subj01..subj{last:02d}")
    return f"subj{int(digits):02d}"


def subject_of_nsd(text):
    """One of NSD's eight."""
    return subject(text, len(SESSIONS))


def sessions_of(subj, root, data_path=None):
    """Count a subject's sessions: of NSD's as published, else its training shards that are on disk; None for none.

    NSD's are the data where its design is, and, before anything is there, any. data_path: None for the root's own.
    """
    root = Path(root).expanduser()
    folder = Path(data_path).expanduser() if data_path else root / DATA_PATH
    shards = len(list(folder.glob(f"wds/{subj}/train/*.tar")))
    if subj in SESSIONS and ((root / EXPDESIGN).exists() or not shards):
        return SESSIONS[subj]
    return shards or None


def all_sessions(args):
    """Return the --num_sessions that --subj means without it; raises UserError where nothing says how many."""
    found = sessions_of(args.subj, args.root, args.data_path)
    if found is None and Path(args.root).expanduser().is_dir():  # no root: Paths.from_args says so
        raise utils.UserError(f"--subj {int(args.subj[4:])}: no session of {args.subj} found under {args.root} "
                              f"(wds/{args.subj}/train/*.tar), and NSD has subjects 1..{len(SESSIONS)}; check --subj, "
                              "--root and --data_path")
    return found or 0


def feature(text):
    """'c', 'z' or 'g_2', 'g_4', ... (an even number: two Linear layers per block)."""
    if text in ("c", "z"):
        return text
    layer = text.removeprefix("g_")
    if text.startswith("g_") and layer.isdigit() and int(layer) > 0 and int(layer) % 2 == 0:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a feature; wanted c, z or g_2, g_4, ..., g_12")


def vision_layer(text):
    """A g_K feature."""
    if not feature(text).startswith("g_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a vision layer; wanted g_2, g_4, ..., g_12")
    return text


def whole(text):
    """An integer that may be written 3e5."""
    value = float(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def seed(text):
    """A whole number from 0."""
    if whole(text) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; wanted a whole number from 0")
    return whole(text)


def add_paths(parser):
    group = parser.add_argument_group("paths")
    group.add_argument("--root", default=os.environ.get("ROOT", str(utils.REPOSITORY)), metavar="DIR",
                       help="folder that holds nsddata/, nsddata_stimuli/, MindEyeV2/, train_logs/, ... (env ROOT); "
                            "what other flags name is looked for from the current folder, then from here")
    group.add_argument("--data_path", metavar="DIR", help="the pscotti/mindeyev2 folder (ROOT/MindEyeV2/mindeyev2)")
    return group


def add_subject(parser):
    parser.add_argument("--subj", "--subject", dest="subj", type=subject, default="subj01", metavar="1..99",
                        help="the subject (held out of pretraining; fine-tuned and decoded)")


def add_run(parser, hidden_dim=HIDDEN_DIM, note=""):
    """Flags that, with the subject and the feature, name a run. hidden_dim: its default, None where `note` says it."""
    parser.epilog = ("How --subj, --num_sessions, --hidden_dim and --tag name a run, its scores and pictures: "
                     "docs/data.md, Names on disk.")
    parser.add_argument("--hidden_dim", type=whole, default=hidden_dim, metavar="UNITS",
                        help="width of the shared space" + note)
    parser.add_argument("--hold_out", type=hold_out, metavar="K/N",
                        help="of N clusters of images, by their captions' embedding, the K-th is left out of training "
                             "and validation (3/10): its test images are of a kind that was never seen")
    add_sessions(parser)


def add_sessions(parser):
    """Flags that say which trials a run learns from, and keep variants apart."""
    parser.add_argument("--num_sessions", type=whole, metavar="SESSIONS",
                        help="use the first N training sessions of --subj (all: of NSD 40, 32 or 30, by subject)")
    parser.add_argument("--tag", type=tag, default="", metavar="NAME",
                        help="appended to the run's name, to keep variants side by side")


def add_scored_run(parser):
    """Flags that, with those of add_run, say which run predicts and through whose voxel encoder."""
    parser.add_argument("--run", type=run, default="finetune", metavar="STAGE[:SUBJ]",
                        help=f"{listed(STAGES)}: that run of --subj, or of another subject "
                             "(pretrain:1 = pretrained on all but subject 1); ground_truth: no run, the true features")
    parser.add_argument("--head", type=head, metavar="own|adapt|1..99",
                        help="voxel encoder: --subj's own in that run; a new one, fitted to --subj's training trials "
                             "with the rest frozen; or another subject's (default: own where there is one, else adapt)")
    parser.add_argument("--test_split", type=test_split, default="new_test", metavar="|".join(TEST_SPLITS),
                        help="new_test: the shared images (1000 of subjects 1, 2, 5, 7); test: MindEye1's 982 of them; "
                             "val: training images held out for validation, to choose settings on; synthetic: another "
                             "kind of stimuli, NSD-synthetic's 284")
    parser.add_argument("--repeats", choices=["mean", "single"], default="mean",
                        help="decode the mean of an image's trials (3, or as many as there are), or the first alone")


def hold_out(text):
    """'3/10': cluster 3 of 10, from 1."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 2 <= int(n) and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a cluster; wanted K/N, such as 3/10: cluster 3 of 10")
    return f"{int(k)}/{int(n)}"


def test_split(text):
    """One of TEST_SPLITS."""
    if text == "imagery":
        raise argparse.ArgumentTypeError("imagery: which of NSD-Imagery's 720 trials imagined or saw which stimulus is "
                                         "not known here, and is not guessed; download.py --what imagery fetches its "
                                         "responses, a test set needs that table")
    if text not in TEST_SPLITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a test set; wanted {', '.join(TEST_SPLITS)}")
    return text


def tag(text):
    """Part of a file name."""
    if not all(letter.isalnum() or letter in "-_.=" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not part of a file name; wanted letters, digits, - _ . =")
    return text


def listed(words):
    """('a', 'b', 'c') -> 'a, b or c'."""
    return " or ".join([", ".join(words[:-1]), words[-1]])


def run(text):
    """'finetune', 'pretrain:1', ... -> with the subject written subj01."""
    if text == "ground_truth":
        return text
    stage, colon, subj = text.partition(":")
    if stage not in STAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a run; wanted {listed(STAGES)}, "
                                         "alone or with a subject, as in pretrain:1, or ground_truth")
    return stage + (f":{subject(subj)}" if colon else "")


def head(text):
    return text if text in ("own", "adapt") else subject(text)


def add_layers(parser):
    """Add the flag that says which layers of g a script works on."""
    parser.add_argument("--feat", type=vision_layer, nargs="+", default=VISION_LAYERS, metavar="g_K",
                        help="layers, one after another")


def add_compute(parser):
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--seed", type=seed, default=42, metavar="N")


def add_precision(parser, on_gpu="bf16 on a GPU that has it, else fp16"):
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help=f"of matrix products; auto: fp32 on a CPU, {on_gpu}")


def add_tracking(parser):
    group = parser.add_argument_group("tracking")
    group.add_argument("--wandb_log", action=argparse.BooleanOptionalAction, default=False, help="log to W&B")
    group.add_argument("--wandb_project", default="neuraldiffuser", metavar="NAME")
    group.add_argument("--wandb_group", metavar="NAME",
                       help="what W&B files this run under, with all stages of an experiment (<subject>[_<tag>])")
    group.add_argument("--wandb_upload", action=argparse.BooleanOptionalAction, default=False,
                       help="send checkpoints, scores and pictures, too: else W&B is told where they lie")


def control(text):
    """'shuffle', 'noise', 'mean' or 'bottleneck<K>'."""
    if text not in ("shuffle", "noise", "mean") and not re.fullmatch(r"bottleneck[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a control; wanted shuffle, noise, mean or bottleneck<K>, "
                                         "such as bottleneck5")
    return text


def add_control(parser):
    parser.add_argument("--control", type=control, metavar="CONTROL",
                        help="shuffle, noise or mean: decode trial-shuffled fMRI, noise, or the mean response instead "
                             "(null controls); bottleneck<K>, such as bottleneck5: the response squeezed to K numbers")


def regions(text):
    """'V2,V1' -> 'V1,V2': names of regions of interest, in one order, each once."""
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} are no regions; wanted names with commas between them, such as "
                                         "V1,V2")
    return ",".join(sorted(set(names)))


def add_lesion(parser):
    """Flags that say which regions' voxels still tell what was seen (nsd/lesions.py)."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--voxels", type=regions, metavar="ROI,...",
                       help="decode from these regions alone, such as V1,V2: all other voxels have their mean response")
    which.add_argument("--without", type=regions, metavar="ROI,...",
                       help="decode without these regions, such as higher_vis: their voxels have their mean response")


def add_guidance_folder(parser):
    """Flags that name a folder of reconstructions."""
    parser.add_argument("--method", type=tag, default="cp_4096_v1", metavar="NAME",
                        help="name of this set of reconstructions")
    parser.add_argument("--guidance_scale", type=float, metavar="X",
                        help="how hard it pulls, in the rule's own unit (30; raw 300000, norm 0.3: see recon.py)")
    parser.add_argument("--guidance_strength", type=float, metavar="FRACTION",
                        help="fraction of the steps, from the first, that are guided (0.8; raw and norm 0.2)")
    parser.add_argument("--use_adapter", action=argparse.BooleanOptionalAction, default=False,
                        help="the UNet draws from the decoded g_k and z, too: train_adapter.py")
    parser.add_argument("--select", choices=SELECTORS, help="of --num_samples pictures of an image keep the one that "
                        "agrees best with the decoded g_k, or, through GNet, with the measured response")


def add_regions(parser):
    """Where regions of interest are read from: disk.names.Paths keeps it."""
    parser.add_argument("--roi_source", choices=["masks", "volumes"],
                        help="read regions from brain_region_masks.hdf5 or from NSD's volumes; without it from what is "
                             "there, and where both are they must agree")


def add_gnet(parser):
    """Flags that say whether a brain encoding model guides, and which."""
    parser.add_argument("--use_gnet", action=argparse.BooleanOptionalAction, default=False,
                        help="a brain encoding model guides too (with --feats none: alone)")
    parser.add_argument("--gnet_roi", default="all", metavar="ROI",
                        help="the region that guides: V1, V2, V3, V4, higher_vis, or all, each with the same weight")
    parser.add_argument("--gnet_kappa", type=float, default=0.1, metavar="K",
                        help="how hard the brain pulls: times its likelihood as measured; with raw and norm relative "
                             "to CLIP; 0 only logs")
    parser.add_argument("--gnet_run", type=tag, metavar="RUN",
                        help="the encoding model: a folder of train_logs, such as gnet_published (gnet_<subj>)")
    add_regions(parser)


# --- whole parsers ------------------------------------------------------------------------------------------------


def training_parser(doc, components=None, mindeye2=None):
    """Return a parser of the flags that the train scripts of c, z and g share.

    components, mindeye2: defaults of these models that are this script's own, {name: value}.

    Flags of the network that are not given are None until scripts complete them (training.settings.like_pretrained).

    How a training by these defaults differs from MindEye2's: docs/method.md, Deviations from MindEye2.
    """
    defaults = {"components": COMPONENTS_DEFAULTS | (components or {}), "ridge": COMPONENTS_DEFAULTS,
                "mindeye2": MINDEYE2_DEFAULTS | (mindeye2 or {})}
    note = partial(by_model, defaults)
    parser = Parser(doc)
    add_paths(parser)
    add_subject(parser)
    add_run(parser, None, f" ({HIDDEN_DIM}; fine-tuning: the pretrained run's)")
    add_compute(parser)
    add_precision(parser)
    add_tracking(parser)
    stage = parser.add_argument_group("stage")
    stage.add_argument("--multi_subject", action=argparse.BooleanOptionalAction, default=False,
                       help="pretrain on all subjects but --subj")
    stage.add_argument("--pretrain_subjects", type=subject, nargs="+", metavar="SUBJ",
                       help="pretrain on these alone; they do not name the run, --tag does")
    stage.add_argument("--multisubject_ckpt", metavar="RUN",
                       help="fine-tune from this run: a name, `auto` for the pretraining of --subj and the feature, "
                            "`synthetic` for that on simulated responses, or the folder of a run of other data whose "
                            "components --components_from took")
    stage.add_argument("--synthetic", action=argparse.BooleanOptionalAction, default=False,
                       help="train on responses to stimuli that --subj never saw, which a GNet of the same sessions "
                            "simulated (score_gnet.py --synthetic); fine-tuning goes on from there")
    stage.add_argument("--freeze_trunk", action=argparse.BooleanOptionalAction, default=None,
                       help="fine-tuning: fit the subject's voxel encoder, and leave everything else as pretrained "
                            "(components: yes; mindeye2: no)")
    network = parser.add_argument_group("network", "in fine-tuning, what is not given is the pretrained run's")
    network.add_argument("--model", choices=MODELS,
                         help="components: regression of the features' principal components; mindeye2: the published "
                              "networks; ridge: the linear baseline, in closed form (components)")
    network.add_argument("--n_blocks", type=whole, metavar="N", help="residual MLP blocks" + note("n_blocks"))
    network.add_argument("--dropout", type=float, metavar="P", help="of the blocks" + note("dropout"))
    network.add_argument("--prior_depth", type=whole, metavar="N",
                         help=f"layers of mindeye2's diffusion prior, c and g ({MINDEYE2_DEFAULTS['prior_depth']})")
    optimum = add_loop(parser, note)
    optimum.add_argument("--weight_decay", type=float, metavar="W", help="AdamW's" + note("weight_decay"))
    optimum.add_argument("--clip_scale", type=float, metavar="W",
                         help="weight of the contrast" + note("clip_scale"))
    optimum.add_argument("--prior_scale", type=float, default=30.0, metavar="W",
                         help="weight of the MSE of mindeye2's prior (c and g)")
    optimum.add_argument("--mixup_pct", type=float, metavar="FRACTION",
                         help="epochs with MixCo" + note("mixup_pct"))
    parser.resolve = partial(resolve_training, defaults)
    return parser


def by_model(defaults, name):
    """Say a flag's default, which depends on --model and, for some, on the stage. defaults: {model: {name: value}}."""
    said = []
    for model in ("components", "mindeye2"):
        more = {("components", "num_epochs"): ", more for few sessions",
                ("components", "max_lr"): f", --freeze_trunk {FROZEN_MAX_LR:g}"}.get((model, name), "")
        pretraining = PRETRAINING_DEFAULTS[model].get(name)
        more += f", pretraining {pretraining:g}" if pretraining else ""
        said.append(f"{model}: {defaults[model][name]:g}{more}")
    return f" ({'; '.join(said)})"


def resolve_training(defaults, args):
    """Give the flags that depend on --model, and were not given, their defaults {model: {name: value}}."""
    args.model = args.model or "components"
    args.pretrain_subjects = sorted(set(args.pretrain_subjects or []))  # the same run in any order
    chosen = {"hidden_dim": HIDDEN_DIM} | defaults[args.model]
    if args.freeze_trunk is None or args.multi_subject:  # train.sh gives its flags to pretraining, too
        args.freeze_trunk = args.model == "components" and args.multisubject_ckpt is not None
    if args.freeze_trunk and args.model == "components":
        chosen["max_lr"] = FROZEN_MAX_LR
    if args.multi_subject:
        chosen |= PRETRAINING_DEFAULTS[args.model]
    elif args.synthetic:
        chosen["num_epochs"] = 1  # there are as many simulated trials as one likes
    elif args.model == "components" and not (args.multisubject_ckpt or "").startswith("synthetic"):
        chosen["num_epochs"] = of_few_sessions(chosen["num_epochs"], args.num_sessions)
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def of_few_sessions(num_epochs, num_sessions):
    """Return how many epochs of so many sessions stand for these of all: few are seen more often, in fewer steps."""
    return round(num_epochs * (max(SESSIONS.values()) / max(num_sessions, 1)) ** 0.5)


def add_loop(parser, note=lambda name: "", **defaults):
    """Add the flags of the loop itself, and what is validated on; returns the group of the optimisation.

    defaults: of batch_size, num_epochs and max_lr; or note(name), what to say of them where they depend on --model.
    """
    default = defaults.get
    optimum = parser.add_argument_group("optimisation")
    optimum.add_argument("--batch_size", type=whole, default=default("batch_size"), metavar="TRIALS",
                         help="at most, over all subjects and processes; subjects with fewer trials give fewer"
                              + note("batch_size"))
    optimum.add_argument("--num_epochs", type=whole, default=default("num_epochs"), metavar="N",
                         help="of training" + note("num_epochs"))
    optimum.add_argument("--max_lr", type=float, default=default("max_lr"), metavar="LR",
                         help="peak of the one-cycle schedule" + note("max_lr"))
    optimum.add_argument("--val_fraction", type=float, default=VAL_FRACTION, metavar="FRACTION",
                         help="of the training images")
    keeping = parser.add_argument_group("checkpoints")
    keeping.add_argument("--ckpt_every", type=whole, default=1, metavar="EPOCHS", help="save after so many epochs")
    keeping.add_argument("--ckpt_minutes", type=float, default=10.0, metavar="MINUTES",
                         help="and so long after the last time, in the middle of an epoch too")
    keeping.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                         help="continue the run if its folder holds a checkpoint")
    keeping.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start over")
    keeping.add_argument("--num_workers", type=whole, default=2, metavar="N", help="data loader processes")
    keeping.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                         help="torch.compile the network: slow to start, faster on a GPU")
    return optimum


def scoring_parser(doc):
    """Return a parser of the flags that the score scripts share."""
    parser = Parser(doc)
    add_paths(parser)
    add_subject(parser)
    add_run(parser)
    add_scored_run(parser)
    add_compute(parser)
    add_control(parser)
    add_tracking(parser)
    add_lesion(parser)
    add_regions(parser)
    parser.add_argument("--ground_truth", action="store_const", const="ground_truth", dest="run",
                        help="write the test images' true features as scores: the ceiling of what can be drawn "
                             "(--run ground_truth, in recon.py too)")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last", help="best: by validation")
    parser.add_argument("--adapt_epochs", type=whole, metavar="N",
                        help="epochs to fit a new voxel encoder for (--head adapt; 12, more for few sessions)")
    parser.add_argument("--num_workers", type=whole, default=2, metavar="N",
                        help="data loader processes, where a voxel encoder is fitted")
    parser.add_argument("--prior_steps", type=whole, default=1, metavar="N",
                        help="of mindeye2's prior (c, g): 1 predicts the mean, more draw a sample in N DDIM steps")
    parser.add_argument("--stack", action=argparse.BooleanOptionalAction, default=True,
                        help="average with the ridge's prediction where a ridge run is there (STAGES=ridge), weighted "
                             "on validation images")
    parser.add_argument("--batch_size", type=whole, default=100, metavar="IMAGES")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False)
    return parser
