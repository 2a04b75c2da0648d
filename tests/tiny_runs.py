"""Trainings of seconds or less on the tiny data set, for the tests."""

import itertools
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

import train_c
import train_z
import utils
from disk.checkpoints import load_checkpoint
from disk.names import Paths
from features.components import write_components
from tiny_nsd import N_IMAGES, write_tiny_nsd
from training.objectives import BrainObjective, ComponentObjective

SRC = Path(__file__).resolve().parent.parent / "src"
SMALL = ["--model", "mindeye2", "--hidden_dim", "8", "--n_blocks", "1", "--prior_depth", "1", "--batch_size", "6",
         "--num_workers", "0", "--device", "cpu", "--num_sessions", "3", "--val_fraction", "0.2"]
# {end of the run's name: (objective, flags)}: trainings of c that several processes must do as one does
VARIANTS = {
    "": (BrainObjective, []),
    "_k": (ComponentObjective, ["--model", "components", "--tag", "k", "--clip_scale", 0.1, "--mixup_pct", 0.5]),
    # one image validates: fewer than there are processes
    "_few": (ComponentObjective, ["--model", "components", "--tag", "few", "--val_fraction", 0]),
}
SHAPES = {"c": (3, 6), "g_2": (2, 4), "g_12": (5, 4), "z": (4, 8, 8)}
SCRATCH = "scratch_subj01_3sess_ext1_c_8_mlp"
PRETRAINED, FINETUNED = "multisubject_subj01_ext1_c_8_mlp", "pretrained_subj01_3sess_ext1_c_8_mlp"


def write_world(root):
    """The tiny data set, features of its images and their components; returns Paths."""
    paths, _ = write_tiny_nsd(root)
    write_features(paths, SHAPES, spread=5)
    return paths


def write_features(paths, shapes, spread=1):
    """Random features of the images, {name: shape of a row}, and their components."""
    rng = np.random.default_rng(1)
    for feat, shape in shapes.items():
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = spread * rng.standard_normal((N_IMAGES, np.prod(shape))).astype(np.float16)
            file["data"].attrs["shape"] = shape
        write_components(paths, feat)


def copy_world(paths, root):
    """A copy that a test may change, in a folder that is new or empty; returns Paths."""
    shutil.copytree(paths.root, root, dirs_exist_ok=True)
    return paths_of(root)


def paths_of(root):
    return Paths(root, root / "MindEyeV2/mindeyev2")


def flags_of(paths, *flags):
    """Command line of a small training."""
    return [*SMALL, "--root", str(paths.root), *map(str, flags)]


def train(paths, *flags, script=train_c):
    """Train in this process, z with a thin decoder; returns the exit status."""
    thin = ["--decoder_channels", 32, 32, 32] if script is train_z else []
    return utils.run_cli(script.main, flags_of(paths, *thin, *flags))


def checkpoint(paths, run=SCRATCH, file="last.pth"):
    return load_checkpoint(paths.run(run) / file)


@contextmanager
def stopped_at(step, objective_class=BrainObjective):
    """Trainings inside send their process SIGTERM in training step number `step` (from 1)."""
    call, steps = objective_class.__call__, itertools.count(1)

    def stopping(self, model, *args):
        if model.training and next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, model, *args)

    objective_class.__call__ = stopping
    try:
        yield
    finally:
        objective_class.__call__ = call


def train_in_turn(argv):
    """Train every one of VARIANTS in several worlds, ROOT:STEP ..., each stopped in that step (0: nowhere), with the
    flags that follow."""
    worlds = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    for world, variant in itertools.product(worlds, VARIANTS):
        root, _, step = world.rpartition(":")
        objective, flags = VARIANTS[variant]
        with stopped_at(int(step), objective), suppress(utils.Interrupted):
            train_c.main([*argv[len(worlds):], *map(str, flags), "--root", root])


if __name__ == "__main__":  # under a launcher, whose start takes longer than the trainings: all of them in one
    sys.exit(utils.run_cli(train_in_turn, sys.argv[1:]))
