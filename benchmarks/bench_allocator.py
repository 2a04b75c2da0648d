"""What does it save on a CPU that freed memory is kept (utils.keep_freed_memory)? The demo's networks.

    python benchmarks/bench_allocator.py

For each task processor time and page faults, kept / as glibc does by itself: a process each, in turns, and the least
counts.
"""

import multiprocessing
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from diffusers import AutoencoderKL

import options
import utils
from disk.checkpoints import load_checkpoint
from features.makers import VAE_PIXELS
from models import Decoder, restore

DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
VOXELS = {f"subj{s:02}": 1500 for s in range(2, 9)}


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--turns", type=options.whole, default=3, metavar="N")
    parser.add_argument("--repeats", type=options.whole, default=20, metavar="N", help="of what a task repeats")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    for name in TASKS:
        found = {True: [], False: []}
        for _ in range(args.turns):
            for kept, costs in found.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    costs.append(pool.apply(measure, (name, args.repeats, kept)))
        (seconds, faults), (usual_seconds, usual_faults) = (np.min(costs, axis=0) for costs in found.values())
        print(f"{name}: {seconds / usual_seconds:.2f} of the processor time, {faults / usual_faults:.2f} of the page "
              "faults", flush=True)


def measure(name, repeats, kept):
    """Processor seconds, and page faults, of one task after its first repeat, which makes what it needs."""
    if kept:
        utils.keep_freed_memory()
    repeat = TASKS[name]()
    repeat()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(repeats):
        repeat()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, after.ru_minflt - before.ru_minflt


# --- tasks: each returns a function that does the work once ---------------------------------------------------------


def training():
    """A training step of c: 20 trials of each of seven subjects."""
    model = Decoder(VOXELS, 512, {"c": 256}, contrast=["c"])
    optimizer = torch.optim.AdamW(model.parameters())
    voxels, target = {subj: torch.randn(20, n) for subj, n in VOXELS.items()}, torch.randn(140, 256)

    def step():
        estimates, contrast = model(voxels)
        loss = (estimates["c"] - target).square().mean() + (contrast["c"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def encoding():
    """z of as many images as img2feat.py encodes at once."""
    vae = AutoencoderKL.from_pretrained(DEMO / "sd", subfolder="vae").eval()
    images = torch.rand(VAE_PIXELS // 64**2, 3, 64, 64)
    return lambda: torch.inference_mode()(vae.encode)(images)


def guiding():
    """The gradient of GNet's responses to eight pictures."""
    file = DEMO / "gnet_subj01" / "best.pth"
    gnet = restore(load_checkpoint(file), file).eval().requires_grad_(False)
    images = torch.rand(8, 3, 64, 64, requires_grad=True)
    return lambda: torch.autograd.grad(gnet(images, "subj01").square().sum(), images)


TASKS = {"a training step of c": training, "encoding z": encoding, "guiding by GNet": guiding}


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
