"""Does W&B slow a step down? The same training with --wandb_log and without, in turn, in one process.

    python benchmarks/bench_tracking.py                       # a tenth of the size of NSD, subject 1: 0.3 GB of files
    python benchmarks/bench_tracking.py --share 1 --hidden_dim 1024 --device cuda

Trains c through the real code on noise (bench_train.py's files), W&B offline: what it would send, it writes. Prints
what a step takes in the training's own process, median over epochs: in processor time, which neighbours lengthen
little, and in wall time; and the ratio, with W&B / without. W&B's own process works beside it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench_train import make_files

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import options
import train_c
import utils
from disk.names import Paths
from training import loop


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--rounds", type=options.whole, default=1, metavar="N", help="of four trainings each")
    parser.add_argument("--num_epochs", type=options.whole, default=6, metavar="N", help="of each")
    parser.add_argument("--share", type=float, default=0.1, metavar="FRACTION", help="of images, trials and voxels")
    parser.add_argument("--batch_size", type=options.whole, default=16, metavar="TRIALS")
    parser.add_argument("--hidden_dim", type=options.whole, default=256, metavar="UNITS")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    args.subjects, args.feats, args.model = [1], ["c"], "components"
    os.environ["WANDB_MODE"] = "offline"
    found = {"without": [], "with": []}  # (processor, wall) milliseconds of a step, an epoch each
    with tempfile.TemporaryDirectory() as folder:
        make_files(Paths(Path(folder), Path(folder) / "MindEyeV2/mindeyev2"), args)
        words = ["--root", folder, "--overwrite", "--ckpt_every", "1000", "--num_workers", "0"]
        for name in ("num_epochs", "batch_size", "hidden_dim", "device", "precision", "seed"):
            words += [f"--{name}", str(getattr(args, name))]
        for turn in ("without", "with", "with", "without") * args.rounds:  # a machine that slows down slows both
            train_epoch, epochs = loop.train_epoch, []
            loop.train_epoch = timed(train_epoch, epochs)
            try:
                train_c.main(words + ["--wandb_log"] * (turn == "with"))
            finally:
                loop.train_epoch = train_epoch
            found[turn] += epochs[1:]  # the first is slower
    logged, plain = (np.median(found[turn], axis=0) for turn in ("with", "without"))
    print(f"\n{'ms of a step':<14}{'with W&B':>10}{'without':>10}{'ratio':>8}")
    for name, a, b in zip(("processor", "wall"), logged, plain, strict=True):
        print(f"{name:<14}{a:>10.2f}{b:>10.2f}{a / b:>8.3f}" + "   (wanted <= 1.03)" * (name == "processor"))


def timed(train_epoch, epochs):
    """Make train_epoch note in `epochs` what a step took."""
    def measured(run, *rest):
        before = np.array([time.process_time(), time.perf_counter()])
        train_epoch(run, *rest)
        epochs.append(1000 * (np.array([time.process_time(), time.perf_counter()]) - before) / len(run.train))
    return measured


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
