"""What comes in: decoded features that share their images, which of these are wanted, and pictures for networks."""

import numpy as np
import torch

import utils
from disk.scores import load_scores


def read_scores(files):
    """Decoded features {feat: (N, ...)} and the ids (N,) they share, from {feat: .npy file beside an image_ids.npy}.

    Raises UserError for files that are missing or damaged, and unless all are of the same images.
    """
    scores, image_ids = {}, None
    for feat, file in files.items():
        ids, scores[feat] = load_scores(file.parent, file.stem)
        image_ids = ids if image_ids is None else image_ids
        if not np.array_equal(ids, image_ids):
            first = next(iter(files))
            raise utils.UserError(
                f"{file.parent}/image_ids.npy: {len(ids)} ids that are not the {len(image_ids)} of "
                f"{files[first].parent}/image_ids.npy, wanted the same; score {first} and {feat} on the same test set "
                "again")
    return scores, image_ids


def pick_rows(image_ids, wanted, limit, subj):
    """Rows of the ids (N,) that --ids `wanted` and --limit ask for (None: all), ascending.

    Raises UserError for an id that is not among them; subj: for that message.
    """
    unknown = np.setdiff1d(wanted or [], image_ids)
    if unknown.size:
        raise utils.UserError(f"--ids {unknown[0]:.0f}: not a test image of {subj}; wanted 0-based 73k ids out of "
                              f"its {len(image_ids)}, {image_ids[0]}..{image_ids[-1]}")
    rows = np.flatnonzero(np.isin(image_ids, wanted)) if wanted else np.arange(len(image_ids))
    return rows[:limit].tolist()


def as_float(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255
