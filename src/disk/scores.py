"""Predicted features on disk: one row per image, beside the images' ids and what made them."""

import numpy as np

from disk.files import load_npy, save_together, write_json, write_npy
from utils import UserError

STEMS = {"nsdgeneral", "retrieval", "errors", "voxels"}  # of files of scores


def save_scores(folder, image_ids, arrays, config, beside=None):
    """Write `arrays` {file stem: (N, ...)} as float32 beside image_ids.npy and config.json (docs/data.md).

    beside: further arrays of any length, {file stem: array}.
    Scores that are there already stay until the disk has taken all of the new ones; of their files that these do not
    have none stays.
    """
    files = {folder / "config.json": write_json(config),  # in place last: it says whose scores these are
             folder / "image_ids.npy": write_npy(np.asarray(image_ids, np.int64))}
    for stem, array in arrays.items():
        assert len(array) == len(image_ids), f"{stem}: {len(array)} rows for {len(image_ids)} ids"
        files[folder / f"{stem}.npy"] = write_npy(np.asarray(array, np.float32))
    for stem, array in (beside or {}).items():
        files[folder / f"{stem}.npy"] = write_npy(np.asarray(array, np.float32))
    save_together(files)
    for stem in STEMS - arrays.keys() - (beside or {}).keys():
        (folder / f"{stem}.npy").unlink(missing_ok=True)


def retrieval_stem(folder):
    """Return the file stem of what retrieves images: a contrast's prediction where there is one, else the feature."""
    return "retrieval" if (folder / "retrieval.npy").exists() else "nsdgeneral"


def load_scores(folder, stem="nsdgeneral"):
    """Read (image_ids (N,), scores (N, ...) mapped from the file, so that memory does not grow with N).

    Ids must be ascending and match the rows, values finite: UserError otherwise.
    """
    hint = "run the score stage (bash scripts/score.sh)"
    scores = load_npy(folder / f"{stem}.npy", "scores", hint, mmap_mode="r")
    ids = load_npy(folder / "image_ids.npy", "the scores' image ids", hint)
    if scores.ndim < 2 or scores.dtype.kind != "f" or not scores.size:
        raise UserError(f"{folder / stem}.npy: {scores.dtype} of shape {scores.shape}, wanted float (images, ...); "
                        f"{hint} with --overwrite")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0:
        raise UserError(f"{folder}/image_ids.npy: {ids.dtype} of shape {ids.shape} from {ids.min(initial=0)}, wanted "
                        f"0-based 73k ids (images,); {hint} with --overwrite")
    if len(ids) != len(scores) or np.any(np.diff(ids) <= 0):
        raise UserError(f"{folder}: {len(scores)} score rows for {len(ids)} ids (wanted: as many, ascending); {hint}")
    for row, values in enumerate(scores):
        if not np.isfinite(values).all():
            raise UserError(f"{folder / stem}.npy: NaN or infinite values in row {row} (image id {ids[row]}), wanted "
                            "finite scores; check the training (train_logs/<run>/metrics.jsonl), then score with "
                            "--overwrite")
    return ids, scores
