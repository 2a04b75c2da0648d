"""Responses averaged over an image's repeats: test sets, noise ceilings, null controls.

Letters: N images, V voxels.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

import utils
from nsd.rows import open_betas, read_betas
from nsd.synthetic import SPLIT, is_synthetic, load_synthetic_trials, open_synthetic_betas
from nsd.trials import load_trials, split_trials


class AveragedRows:
    """Responses to images, (N, V): row i is the plain mean of the trials of image i, read when it is asked for.

    Stands in for the Rows of single-trial betas. image_ids (N,) ascend; `table` stands in for that of load_trials, with
    one line per image [image_id, row], where row is the image's place among these rows.
    """

    def __init__(self, betas, trials):
        """betas: Rows of one subject; trials: a table of its trials."""
        trials = trials.sort_values(["image_id", "row"])
        self.image_ids, self.first, self.n_repeats = np.unique(trials["image_id"].to_numpy(), return_index=True,
                                                               return_counts=True)
        self.betas, self.path, self.rows = betas, betas.path, trials["row"].to_numpy()
        betas.require(self.rows)
        self.shape = (len(self.image_ids), betas.shape[1])
        self.table = pd.DataFrame({"image_id": self.image_ids, "row": np.arange(len(self.image_ids))})

    def __getitem__(self, images):
        """images: (n,) integers -> (n, V) float32."""
        counts = self.n_repeats[images]
        # of every image its trials: its first one's place and those that follow
        trials = np.repeat(self.first[images] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return self.average(read_betas(self.betas, self.rows[trials]), counts)

    @staticmethod
    def average(responses, counts):
        """Average consecutive groups of counts (n,) rows: (sum of counts, V) -> (n, V)."""
        first = np.cumsum(counts) - counts
        means = responses[first]
        for k in range(1, counts.max(initial=0)):  # np.add.reduceat takes ten times as long
            more = counts > k
            means[more] += responses[first[more] + k]
        means /= counts[:, None].astype(np.float32)
        return means


def noise_ceiling(responses, n_repeats, images_at_once=500):
    """Estimate the highest r that a prediction can reach with mean responses of n_repeats (N,) trials; (V,) or None.

    responses: AveragedRows, from whose repeats signal and noise are told apart (Allen et al. 2022, NSD): the noise
    variance is that of trials of one image, the signal's what is left of all trials' variance, not below 0;
    r = sqrt(signal / (signal + noise * mean(1 / n_repeats))). None when no image was shown twice.
    """
    n_trials, n_images = int(responses.n_repeats.sum()), len(responses.n_repeats)
    if n_trials == n_images:
        return None
    trials, squares, within = (np.zeros(responses.shape[1]) for _ in range(3))
    for start in range(0, n_images, images_at_once):
        counts = responses.n_repeats[start:start + images_at_once]
        first = responses.first[start]
        rows = read_betas(responses.betas, responses.rows[first:first + counts.sum()]).astype(np.float64)
        trials += rows.sum(0)
        squares += (rows**2).sum(0)
        within += ((rows - np.repeat(responses.average(rows, counts), counts, axis=0)) ** 2).sum(0)
    noise = within / (n_trials - n_images)
    total = (squares - trials**2 / n_trials) / (n_trials - 1)
    signal = (total - noise).clip(0)
    return np.sqrt(signal / np.maximum(signal + noise * np.mean(1 / n_repeats), 1e-12)).astype(np.float32)


# --- test sets and null controls ----------------------------------------------------------------------------------


class TestSet(NamedTuple):
    """Images and a subject's responses to them, averaged over repeats."""

    __test__ = False  # not a pytest class

    image_ids: np.ndarray  # (N,) int64, ascending
    betas: np.ndarray  # (N, V) float32, plain mean over the repeats that exist
    n_repeats: np.ndarray  # (N,) int64


def load_test_set(paths, subj, control=None, seed=0, held_out=None, split="new_test", repeats="mean"):
    """Read a subject's test set: shared images, validation images that a training held out, or NSD-synthetic.

    split: "new_test" or "test" (see load_trials), "synthetic" (see nsd.synthetic), or "val", of which held_out says
    what it is: (num_sessions, val_fraction, seed) of that training, as in split_trials. repeats: "mean" of an image's
    trials, or "single", the first of them. control makes a null control with the same images and repeats:
        "shuffle"  trials permuted: every response is one to another image
        "noise"    normal noise with each voxel's mean and standard deviation over the test trials
        "mean"     the mean response for every image
    """
    if split == SPLIT:
        trials = load_synthetic_trials(paths, subj)
        return average_repeats(open_synthetic_betas(paths, subj), trials, control, seed, repeats)
    trials = split_trials(paths, subj, *held_out)[1] if split == "val" else load_trials(paths, subj, split)
    return average_repeats(open_betas(paths, subj), trials, control, seed, repeats)


def responses_to(paths, subj, image_ids, num_sessions=None, control=None, seed=0, repeats="mean"):
    """Average a subject's responses to exactly these images (N,); returns a TestSet.

    All are test images, or all are training images of the first num_sessions, or all are NSD-synthetic's. control,
    seed, repeats: as in load_test_set. Raises UserError for an image that the subject did not see.
    """
    synthetic = is_synthetic(image_ids)
    trials = load_synthetic_trials(paths, subj) if synthetic else load_trials(paths, subj, "new_test")
    if not synthetic and not np.isin(image_ids, trials["image_id"]).all():
        trials = load_trials(paths, subj, "train", num_sessions)
    trials = trials[trials["image_id"].isin(image_ids)]
    unseen = np.setdiff1d(image_ids, trials["image_id"])
    if unseen.size:
        raise utils.UserError(f"image id {unseen[0]}: {subj} did not see it and {unseen.size - 1} others, all as test "
                              "images or all as training images; check --subj")
    betas = open_synthetic_betas(paths, subj) if synthetic else open_betas(paths, subj)
    return average_repeats(betas, trials, control, seed, repeats)


def average_repeats(betas, trials, control=None, seed=0, repeats="mean"):
    """Average the responses (Rows `betas`) to each image of a table of trials; returns a TestSet.

    control, seed, repeats: as in load_test_set.
    """
    if repeats == "single":
        trials = trials.sort_values("row").drop_duplicates("image_id")
    by_image = AveragedRows(betas, trials)
    responses = read_betas(betas, by_image.rows)  # (trials, V), grouped by image
    if control is not None:
        owner = np.repeat(np.arange(len(by_image.image_ids)), by_image.n_repeats)
        responses = null_responses(responses, owner, control, np.random.default_rng(seed))
    return TestSet(by_image.image_ids, by_image.average(responses, by_image.n_repeats), by_image.n_repeats)


def null_responses(betas, owner, control, rng):
    """Replace single-trial betas (trials, V) by a null control's; owner (trials,) numbers the images."""
    mean = betas.mean(axis=0, dtype=np.float64).astype(np.float32)
    if control == "mean":
        return np.broadcast_to(mean, betas.shape)
    if control == "noise":
        std = betas.std(axis=0, dtype=np.float64).astype(np.float32)
        return rng.standard_normal(betas.shape, dtype=np.float32) * std + mean
    if control == "shuffle":
        return betas[move_to_other_images(owner, rng)]
    raise ValueError(f"control {control!r}")


def move_to_other_images(owner, rng):
    """Draw a permutation of the trials that leaves none with its image; owner (trials,) numbers the images."""
    if 2 * np.bincount(owner).max() > len(owner):
        raise utils.UserError("--control shuffle: one image has more than half of the test trials; use another control")
    permutation = rng.permutation(len(owner))
    while (stuck := np.flatnonzero(owner[permutation] == owner)).size:
        for trial in stuck:
            other = rng.integers(len(owner))
            permutation[[trial, other]] = permutation[[other, trial]]
    return permutation
