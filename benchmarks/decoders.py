"""Which decoder, with which settings? The train scripts' own networks on a small world, scored beside a ridge.

    python benchmarks/decoders.py --root demo                       # methods, on test images: benchmarks/decoders.md
    python benchmarks/decoders.py --root demo --table settings      # one setting changed at a time, validation images
    python benchmarks/decoders.py --root demo --table synthetic --sessions 1 4    # with simulated responses, or not

Methods: ridge; components; both stacked; components pretrained on one subject instead of all others, and with a trunk
that fine-tuning trains, too; mindeye2 by its prior's mean and by samples of 20 steps; with --sessions 1 4 40 of the
subject's sessions and several seeds. Each cell is R2, the share of the feature's variance that is explained, mean over
seeds (range), and for c the share of images that its prediction retrieves among all test images (cosine of centred
rows; of mindeye2's contrast as they are), brain to image and back. Seconds: process time of pretraining and of
fine-tuning on one thread. Runs are tagged bench<seed>; those that are there are kept.

Synthetic: fine-tuned from the pretraining, as ever, or after a stage on what a GNet simulated to --stimuli, and what
that stage alone teaches. The GNet knows no other sessions.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np

import options
import score_c
import score_g
import score_gnet
import score_z
import train_c
import train_g
import train_gnet
import train_z
import utils
from disk.names import Paths, run_name
from nsd.components import open_components
from nsd.rows import open_feature
from training.scoring import open_source, predict
from training.trained import Request, open_trained

SCRIPTS = {"c": (train_c, score_c), "z": (train_z, score_z), "g": (train_g, score_g)}
# what is changed, in both stages unless it says of which: {name: {stage: flags}}
SETTINGS = {
    "as it is": {},
    "a linear map (--n_blocks 0)": {"both": ["--n_blocks", "0"]},
    "1 block": {"both": ["--n_blocks", "1"]},
    "4 blocks": {"both": ["--n_blocks", "4"]},
    "half as wide": {"both": ["--hidden_dim", "256"]},
    "twice as wide": {"both": ["--hidden_dim", "1024"]},
    "dropout .15": {"both": ["--dropout", "0.15"]},
    "dropout .3": {"both": ["--dropout", "0.3"]},
    "dropout .5": {"both": ["--dropout", "0.5"]},
    "decay .01": {"both": ["--weight_decay", "0.01"]},
    "decay .3": {"both": ["--weight_decay", "0.3"]},
    "learning rate 5e-4": {"both": ["--max_lr", "5e-4"]},
    "learning rate 2e-3": {"both": ["--max_lr", "2e-3"]},
    "MixCo in a third of the epochs": {"both": ["--mixup_pct", "0.33"]},
    "no pretraining": {"pretrain": None},
    "3 epochs of pretraining": {"pretrain": ["--num_epochs", "3"]},
    "12 epochs of pretraining": {"pretrain": ["--num_epochs", "12"]},
    "6 epochs of fine-tuning": {"finetune": ["--num_epochs", "6"]},
    "25 epochs of fine-tuning": {"finetune": ["--num_epochs", "25"]},
    "fine-tuning trains the trunk, too": {"finetune": ["--no-freeze_trunk"]},
}


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    parser.add_argument("--table", choices=["methods", "settings", "synthetic"], default="methods")
    parser.add_argument("--feats", nargs="+", choices=["c", "z", "g"], default=["c", "z", "g"], help="runs")
    parser.add_argument("--sessions", type=options.whole, nargs="+", default=[1, 4, 40], metavar="N")
    parser.add_argument("--seeds", type=options.whole, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--mindeye2_seeds", type=options.whole, nargs="*", default=[0], metavar="SEED",
                        help="seeds of the published networks, which take ten times as long")
    parser.add_argument("--mindeye2_epochs", type=float, default=1.0, metavar="SHARE", help="of their epochs")
    parser.add_argument("--hidden_dim", type=options.whole, default=512, metavar="UNITS")
    parser.add_argument("--pretrain", nargs="*", metavar="FLAG", help="of components' pretraining", default=[])
    parser.add_argument("--pretrain_subjects", type=options.subject, nargs="*", default=["subj02"], metavar="SUBJ",
                        help="components pretrained on each of these alone, too")
    parser.add_argument("--stimuli", type=options.whole, nargs="+", default=[300, 1000, 6300], metavar="N",
                        help="synthetic: to which responses are simulated")
    parser.add_argument("--gnet", default="--batch_size 32 --max_lr 3e-3 --precision bf16", metavar="FLAGS",
                        help="synthetic: of GNet's training, which has 8 epochs of 40 sessions, more of fewer")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    {"methods": methods, "settings": settings, "synthetic": synthetic}[args.table](args)


# --- tables ---------------------------------------------------------------------------------------------------------


def methods(args):
    """Print the table of methods, a part per number of sessions."""
    for sessions in args.sessions:
        found, seconds = {}, {}
        for seed in args.seeds:
            for run in args.feats:
                common = [*base(args), "--num_sessions", str(sessions), "--tag", f"bench{seed}"]
                timed(seconds, ("ridge", run), SCRIPTS[run][0],
                      [*common, "--model", "ridge", "--seed", str(seed), "--resume"])
                train(args, run, common, seed, seconds, "components")
                for method, flags in (("ridge", ["--run", "ridge"]), ("components", ["--no-stack"]), ("stacked", [])):
                    measure(found, method, run, [*common, *flags, "--overwrite"])
                variants = {f"pretrained on {subj} alone": (subj, {"pretrain": ["--pretrain_subjects", subj]})
                            for subj in args.pretrain_subjects}
                variants["trunk trained, too"] = "trunk", SETTINGS["fine-tuning trains the trunk, too"]
                for name, (tag, changed) in variants.items():
                    other = [*common[:-1], f"bench{seed}_{tag}"]
                    train(args, run, other, seed, seconds, "components", changed)
                    measure(found, f"components, {name}", run, [*other, "--no-stack", "--overwrite"])
                if seed in args.mindeye2_seeds:
                    common[-1] = f"mindeye2{seed}"
                    train(args, run, common, seed, seconds, "mindeye2", epochs_of(args.mindeye2_epochs))
                    for steps in (1, 20) if run != "z" else (1,):
                        measure(found, f"mindeye2, {steps} step{'s' * (steps > 1)}", run,
                                [*common, "--prior_steps", str(steps), "--overwrite"])
        show(sessions, found, seconds)


def synthetic(args):
    """Print what simulated responses are worth, a part per number of sessions."""
    for sessions in args.sessions:
        found, seconds = {}, {}
        for seed in args.seeds:
            of_few = [*base(args), "--num_sessions", str(sessions)]
            for run in args.feats:
                common = [*of_few, "--tag", f"bench{seed}"]
                timed(seconds, ("ridge", run), SCRIPTS[run][0],
                      [*common, "--model", "ridge", "--seed", str(seed), "--resume"])
                measure(found, "ridge", run, [*common, "--run", "ridge", "--overwrite"])
                train(args, run, common, seed, seconds, "components")
                measure(found, "fine-tuned", run, [*common, "--no-stack", "--overwrite"])
            gnet = simulate_by(args, sessions, seed, seconds)
            for n in args.stimuli:
                gnet(n)
                for run in args.feats:
                    common = [*of_few, "--tag", f"bench{seed}_{n}"]
                    flags = [*common, "--seed", str(seed), "--num_workers", "0", "--device", "cpu", "--overwrite"]
                    start = run_name("pretrain", args.subj, run, args.hidden_dim, tag=f"bench{seed}")
                    timed(seconds, (f"{n} simulated", run), SCRIPTS[run][0],
                          [*flags, "--synthetic", "--multisubject_ckpt", start])
                    timed(seconds, ("then fine-tuned", run), SCRIPTS[run][0],
                          [*flags, "--multisubject_ckpt", "synthetic"])
                    for method, stage in (("alone", "synthetic"), ("then fine-tuned", "finetune")):
                        measure(found, f"{n} simulated, {method}", run,
                                [*common, "--run", stage, "--no-stack", "--overwrite"])
        show(sessions, found, seconds)


def simulate_by(args, sessions, seed, seconds):
    """Train a GNet on the first sessions; returns a function that lets it simulate responses to n stimuli."""
    known, tag = ["--root", str(args.root), "--subj", args.subj], f"bench{seed}_{sessions}sess"
    timed(seconds, ("GNet",), train_gnet, [
        *known, "--num_sessions", str(sessions), "--tag", tag, "--seed", str(seed), "--num_workers", "0", "--resume",
        "--num_epochs", str(options.of_few_sessions(8, sessions)), *args.gnet.split()])
    return lambda n: score_gnet.main([*known, "--gnet_run", run_name("scratch", args.subj, "gnet", None, tag=tag),
                                      "--synthetic", str(n), "--overwrite"])


def show(sessions, found, seconds):
    """Print the part of a table that is of so many sessions: found {method: {column: values}}."""
    columns = list(dict.fromkeys(column for method in found.values() for column in method))
    print(f"\n{sessions} session{'s' * (sessions > 1)}\n\n| | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for method, cells in found.items():
        print(f"| {method} | " + " | ".join(spread(cells.get(column)) for column in columns) + " |")
    print("\nseconds: " + ", ".join(f"{' '.join(key)} {np.mean(value):.0f}" for key, value in seconds.items()),
          flush=True)


def settings(args):
    """Print R2 on validation images, one setting changed at a time."""
    columns = None
    for name, changed in SETTINGS.items():
        found, seconds = {}, {}
        for seed in args.seeds:
            for run in args.feats:
                common = [*base(args), "--tag", f"bench_{list(SETTINGS).index(name)}_{seed}"]
                folder = train(args, run, common, seed, seconds, "components", changed)
                last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                for key, value in last.items():
                    if key.startswith("val/r2_"):
                        found.setdefault(key.removeprefix("val/r2_"), []).append(value)
        if columns is None:
            columns = list(found)
            print(f"| one thing changed | {' | '.join(columns)} | seconds |\n|---|" + "---|" * (len(columns) + 1))
        cells = [spread(found[column]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} | {sum(np.mean(value) for value in seconds.values()):.0f} |", flush=True)


def spread(values):
    """Mean over seeds, and the range of several."""
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


# --- what they are made of ------------------------------------------------------------------------------------------


def base(args):
    return ["--root", str(args.root), "--subj", args.subj, "--hidden_dim", str(args.hidden_dim)]


def epochs_of(share):
    """Return a share of MindEye2's epochs as what is changed in its stages."""
    stages = {"pretrain": options.PRETRAINING_DEFAULTS["mindeye2"], "finetune": options.MINDEYE2_DEFAULTS}
    return {stage: ["--num_epochs", str(max(1, round(share * defaults["num_epochs"])))]
            for stage, defaults in stages.items()}


def train(args, run, common, seed, seconds, model, changed=None):
    """Pretrain and fine-tune, with what is changed in a stage or in both; returns the folder of the fine-tuned run."""
    script, (changed, which) = SCRIPTS[run][0], (changed or {}, ["--model", model, "--seed", str(seed)])
    both = changed.get("both", [])
    which += ["--num_workers", "0", "--device", "cpu", "--resume"]
    pretraining = changed.get("pretrain", [])
    start = []
    if pretraining is not None:
        flags = args.pretrain if model == "components" else []
        timed(seconds, (" ".join([model, *pretraining]), run, "pretrain"), script,
              [*common, *which, "--multi_subject", *flags, *both, *pretraining])
        start = ["--multisubject_ckpt", "auto"]
    flags = script.get_parser().parse_args([*common, *which, *both])
    timed(seconds, (model, run, "finetune"), script, [*common, *which, *start, *both, *changed.get("finetune", [])])
    stage = "finetune" if start else "scratch"
    return Paths.from_args(args).run(run_name(stage, flags.subj, run, flags.hidden_dim, flags.num_sessions, flags.tag))


def timed(seconds, key, script, argv):
    """Run a train script in this process; a training that was there and is kept counts as nothing."""
    start = time.process_time()
    script.main(argv)
    seconds.setdefault(key, []).append(time.process_time() - start)


def measure(found, method, run, argv):
    """Add R2 of the test images' features, and how well c retrieves, to found[method][column]."""
    args = SCRIPTS[run][1].get_parser().parse_args(argv)
    trained, cells = None, found.setdefault(method, {})
    for feat in options.VISION_LAYERS if run == "g" else [run]:
        request = Request.from_args(args)
        trained = open_trained(request, feat, trained)
        predicted = predict(open_source(trained, feat), trained.test, "score")
        ids = trained.test.image_ids
        known = open_components(request.paths, feat)
        true = open_feature(request.paths, feat)[ids].astype(np.float32).reshape(len(ids), -1) - known.mean
        rows = predicted["nsdgeneral"].reshape(true.shape) - known.mean
        cells.setdefault(feat, []).append(float(1 - np.square(rows - true).sum() / np.square(true).sum()))
        if feat == "c":
            if trained.kind == "brain":  # MindEye2's contrast, which says nothing of rows' length: as they are
                rows, true = predicted["retrieval"].reshape(true.shape), true + known.mean
            for name, value in zip(("brain to image", "image to brain"), top1(rows, true), strict=True):
                cells.setdefault(name, []).append(value)


def top1(brain, image):
    """Shares of rows (N, D) whose nearest of the others' is the one of the same image: (of brain, of image)."""
    brain, image = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (brain, image))
    similarity, own = brain @ image.T, np.arange(len(brain))
    return float((similarity.argmax(1) == own).mean()), float((similarity.argmax(0) == own).mean())


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
