"""Lesions: responses of which only some regions of interest still say which image was seen.

The voxels of the others have their mean response to the training images, whatever was seen, so that the same decoder
reads on. Letters: N images, V voxels.
"""

import hashlib
from typing import NamedTuple

import numpy as np

import utils
from nsd.repeats import AveragedRows
from nsd.rows import open_betas
from nsd.trials import split_trials


class Lesion(NamedTuple):
    """Responses (N, V) -> the same, of which the voxels that are not kept have their mean."""

    kept: np.ndarray  # (V,) bool
    mean: np.ndarray  # (V,) float32

    def __call__(self, responses):
        return np.where(self.kept, responses, self.mean)


def digest_of(kept):
    """A short hash of which voxels (V,) are kept: what a region is depends on its masks."""
    return hashlib.sha256(kept.tobytes()).hexdigest()[:12]


def kept_voxels(masks, subj, voxels=None, without=None):
    """Say which voxels a lesion keeps, (V,) bool: those of the regions `voxels`, or all but those of `without`.

    Regions are given as flags have them, "V1,V2"; masks: {region: (V,) bool} of the subject. Raises UserError for an
    unknown region, and where no voxel is left.
    """
    flag, names = ("--voxels", voxels) if voxels else ("--without", without)
    for name in names.split(","):
        if name not in masks:
            raise utils.UserError(f"{flag} {names}: no region {name} of {subj}; wanted some of {', '.join(masks)}")
    named = np.any([masks[name] for name in names.split(",")], axis=0)
    kept = named if voxels else ~named
    if not kept.any():
        raise utils.UserError(f"{flag} {names}: leaves none of the {len(kept)} voxels of {subj}; name "
                              f"{'other' if voxels else 'fewer'} regions")
    return kept


def make_lesion(paths, subj, held_out, kept):
    """Make the Lesion that keeps voxels (V,); held_out: arguments of split_trials, of the training whose images the
    means are of: all of its responses are read."""
    return Lesion(kept, voxel_statistics(open_betas(paths, subj), split_trials(paths, subj, *held_out)[0])[0])


def voxel_statistics(betas, trials, images_at_once=500):
    """Return the mean and the standard deviation, (V,) float32 each, of responses averaged over an image's trials.

    betas: Rows of one subject; trials: a table of the trials that count.
    """
    images = AveragedRows(betas, trials)
    n, total, squares = len(images.image_ids), 0.0, 0.0
    for start in range(0, n, images_at_once):
        rows = images[np.arange(start, min(start + images_at_once, n))].astype(np.float64)
        total, squares = total + rows.sum(0), squares + (rows**2).sum(0)
    mean = total / n
    return mean.astype(np.float32), np.sqrt((squares / n - mean**2).clip(0)).astype(np.float32)
