"""Feature files: which rows one has and who made them; rows written in place, in any order, by several processes.

nsd/rows.py reads them. Letters: N images, b images that are written together.
"""

import os
import shutil

import h5py
import numpy as np
import torch

import utils
from disk.files import atomic_path
from nsd.rows import KNOWN_FEATURE_SHAPES


def rows_there(path, maker, wanted, dtype, say=print):
    """Say which rows a feature file has, (N,) bool; None when there is no file.

    wanted: ids (n,) of the images that are asked for; `say` is told when all of them are there. dtype: of the rows that
    are to be added where some are missing. Raises UserError for a file that is not maker's, which only --overwrite
    replaces. One that another program wrote, such as NeuralDiffuser, (N, 1, width) float32, is the user's own: kept if
    its rows have the right shape.
    """
    if not path.exists():
        return None
    try:
        with h5py.File(path, "r") as file:
            rows = file["data"]
            n_rows, *shape, found_dtype, attributes = *rows.shape, rows.dtype, dict(rows.attrs)
            written = file["written"][()] == 1 if "written" in file else np.ones(n_rows, bool)
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{path}: not readable ({error}); use --overwrite to replace it") from None
    found = {"rows": n_rows, "model": f"unknown (rows of shape {tuple(shape)})", "source": "unknown", **attributes}
    expected = {"rows": len(maker), "model": maker.model, "source": maker.source}
    by = f"by {maker.model}"
    if "model" not in attributes and (np.prod(shape) in KNOWN_FEATURE_SHAPES
                                      or tuple(shape) == maker.row_shape(maker.load())):
        expected, by = {"rows": len(maker)}, "made by another program"
    whole = n_rows == len(maker) and written[wanted].all()
    if not whole:
        found["type"], expected["type"] = found_dtype.name, dtype
    for name, value in expected.items():
        if found[name] != value:
            raise utils.UserError(f"{path}: its {name} is {found[name]}, wanted {value}; give --overwrite to make it "
                                  "again, or leave it out of --feats")
    if whole:
        say(f"{path}: kept ({written.sum()} of {n_rows} rows are there, {found_dtype}, {by})")
    return written


def check_room(folder, names, needed):
    """Make a folder, and raise UserError when `needed` bytes for files of these names in it are not free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise utils.UserError(f"{folder}: {', '.join(names)}: needs {utils.in_bytes(needed)}, {utils.in_bytes(free)} "
                              "are free; make room on the disk or give fewer --feats")


def create_file(path, n_rows, row_shape, dtype, maker):
    """Make a feature file of its final size, without any row; what is not written takes no space on most disks."""
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            # contiguous and uncompressed, so that readers can map it into memory
            rows = file.create_dataset("data", (n_rows, int(np.prod(row_shape))), dtype)
            rows[0] = 0  # with its first row HDF5 gives the data set its place
            rows.attrs.update(shape=row_shape, model=maker.model, source=maker.source)
            file["written"] = np.zeros(n_rows, np.uint8)
    except OSError as error:
        raise utils.UserError(f"{path}: could not be created ({error}); make room on the disk") from None


class FeatureFile:
    """A file of create_file whose rows are written in place, in any order, by several processes.

    .written: (N,) bool, the rows that were there when it was opened, or that this process has written.
    """

    def __init__(self, path):
        self.path = path
        with h5py.File(path, "r") as file:
            rows, written = file["data"], file["written"]
            self.dtype, self.row_bytes = getattr(torch, rows.dtype.name), rows.shape[1] * rows.dtype.itemsize
            self.rows_at, self.written_at = rows.id.get_offset(), written.id.get_offset()
            self.written = written[()] == 1

    def write(self, ids, rows):
        """Write rows (b, width), of the images `ids` (b,) ascending, then that they are there; skip those that were."""
        bad = ids[~rows.isfinite().all(1).numpy()]
        if bad.size:
            raise utils.UserError(f"{self.path}: image {bad[0]} does not fit {rows.numpy().dtype}; check the model, or "
                                  "write it with --dtype float32 --overwrite")
        new = np.flatnonzero(~self.written[ids])
        runs = np.split(new, np.flatnonzero(np.diff(ids[new]) > 1) + 1) if len(new) else []  # of consecutive ids
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for run in runs:
                    self._put(file, rows[run].numpy().tobytes(), self.rows_at + int(ids[run[0]]) * self.row_bytes)
                for run in runs:
                    self._put(file, bytes([1]) * len(run), self.written_at + int(ids[run[0]]))
        except OSError as error:
            raise utils.UserError(f"{self.path}: could not be written ({error.strerror}); make room on the disk and "
                                  "run the same command again") from None
        self.written[ids] = True

    @staticmethod
    def _put(file, content, offset):
        """Not through a memory map: a full disk would end the process, not raise."""
        while content:
            n = os.pwrite(file.fileno(), content, offset)  # a part only, when the disk is almost full
            content, offset = content[n:], offset + n
