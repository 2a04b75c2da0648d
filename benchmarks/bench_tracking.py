"""Does W&B slow a training down? The same training with --wandb_log and without, in turn, in one process.

    python benchmarks/bench_tracking.py                       # a fifth of NSD's sizes, subject 1: 0.6 GB of files
    python benchmarks/bench_tracking.py --share 1 --device cuda

Fine-tunes c through the real code on noise (bench_train.py's files), W&B offline: what it sends, it writes. Prints the
samples/s of the epochs after the first of each training, and the ratio: with W&B / without.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench_train import make_files

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import options
import train_c
import utils
from disk.names import Paths
from training.tracking import load_rows


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--rounds", type=options.whole, default=2, metavar="N", help="of four trainings each")
    parser.add_argument("--num_epochs", type=options.whole, default=3, metavar="N", help="of each")
    parser.add_argument("--share", type=float, default=0.2, metavar="FRACTION", help="of images, trials and voxels")
    parser.add_argument("--batch_size", type=options.whole, default=16, metavar="TRIALS")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    args.subjects, args.feats, args.model = [1], ["c"], "components"
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(Path(folder), Path(folder) / "MindEyeV2/mindeyev2")
        make_files(paths, args)
        words = ["--root", folder, "--overwrite", "--ckpt_every", "1000"]
        for name in ("num_epochs", "batch_size", "device", "precision", "seed"):
            words += [f"--{name}", str(getattr(args, name))]
        train(paths, words)  # what is done once, at the first start
        speeds = {"without": [], "with": []}
        for turn in ("without", "with", "with", "without") * args.rounds:  # a machine that slows down slows both
            speeds[turn] += train(paths, words + ["--wandb_log"] * (turn == "with"))
    without, logged = (np.median(speeds[turn]) for turn in ("without", "with"))
    milliseconds = 1000 * args.batch_size
    print(f"\n{'samples/s':<10}{'with W&B':>10}{'without':>10}{'ratio':>10}\n{'':<10}{logged:>10.1f}{without:>10.1f}"
          f"{logged / without:>10.3f}   (wanted >= .97)\n"
          f"a step takes {milliseconds / logged:.2f} ms with, {milliseconds / without:.2f} ms without")


def train(paths, words):
    """Train once; returns the samples/s of its epochs but the first."""
    train_c.main(words)
    (file,) = paths.root.glob("train_logs/*/metrics.jsonl")
    return [row["train/samples_per_s"] for row in load_rows(file)][1:]


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
