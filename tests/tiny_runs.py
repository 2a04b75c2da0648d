"""Trainings of seconds on the tiny data set, for the tests."""

import os
import signal
import sys
from pathlib import Path

import h5py
import numpy as np

import train_c
import utils
from disk.checkpoints import load_checkpoint
from tiny_nsd import N_IMAGES, write_tiny_nsd
from training.objectives import BrainObjective

SRC = Path(__file__).resolve().parent.parent / "src"
SMALL = ["--hidden_dim", "8", "--n_blocks", "1", "--prior_depth", "1", "--batch_size", "6", "--num_workers", "0",
         "--device", "cpu", "--num_sessions", "3", "--val_fraction", "0.2"]
SHAPES = {"c": (3, 6), "g_2": (2, 4), "g_12": (5, 4), "z": (4, 8, 8)}
SCRATCH = "scratch_subj01_3sess_ext1_c_8_mlp"
PRETRAINED, FINETUNED = "multisubject_subj01_ext1_c_8_mlp", "pretrained_subj01_3sess_ext1_c_8_mlp"


def write_world(root):
    """The tiny data set and features of its images; returns Paths."""
    paths, _ = write_tiny_nsd(root)
    rng = np.random.default_rng(1)
    for feat, shape in SHAPES.items():
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = 5 * rng.standard_normal((N_IMAGES, np.prod(shape))).astype(np.float16)
            file["data"].attrs["shape"] = shape
    return paths


def flags_of(paths, *flags):
    """Command line of a small training."""
    return [*SMALL, "--root", str(paths.root), *map(str, flags)]


def train(paths, *flags, script=train_c):
    """Train in this process; returns the exit status."""
    return utils.run_cli(script.main, flags_of(paths, *flags))


def checkpoint(paths, run=SCRATCH, file="last.pth"):
    return load_checkpoint(paths.run(run) / file)


def stop_at(step, objective_class):
    """Make the objective send this process SIGTERM in its training step number `step` (from 1)."""
    call, steps = objective_class.__call__, iter(range(1, 10**6))

    def stopping(self, model, *args):
        if model.training and next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, model, *args)

    objective_class.__call__ = stopping
    return call


if __name__ == "__main__":  # python tests/tiny_runs.py STEP [flags of train_c.py]: a training that SIGTERM stops

    stop_at(int(sys.argv[1]), BrainObjective)
    sys.exit(utils.run_cli(train_c.main, sys.argv[2:]))
