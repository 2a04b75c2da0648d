"""Rows of HDF5 data sets that are too big to load: betas, features, stimuli.

Letters: N rows or images, V voxels, T tokens, D width of a token.
"""

import hashlib
import mmap
import os

import h5py
import numpy as np

import utils
from nsd.sources import DOWNLOAD

# Of rows that are read at random, the system would read page after page, each when it is touched (a cold row of 60 kB:
# 1 ms), so it is told of all of them before (60 us; pread: 120 us; benchmarks/bench_rows.py).
ASKED_BYTES = 2**17  # of one request: the system cuts larger ones off
COPIED_BYTES = 2**26  # asked for at once, then copied: more might be dropped again before it is copied

# feature files written by other programs are flat and do not say their shape: c, g and z of Stable Diffusion 1.x
KNOWN_FEATURE_SHAPES = {59136: (77, 768), 38400: (50, 768), 16384: (4, 64, 64)}


class Rows:
    """Lazily read rows of one HDF5 data set that is too big to load.

    A contiguous, uncompressed data set is memory-mapped at its offset in the file; any other is read through h5py.
    Opened again in every process, so it can be handed to DataLoader workers.

    .shape      (N, *row_shape)
    .row_shape  the data set's attribute `shape` where there is one, else known_shapes[width] for flat rows of that
                width, else the data set's own shape; an axis of 1 as in (73000, 1, 38400) is dropped
    .dtype      as stored

    Where the file has a data set `written` (N,), only rows whose flag is not 0 are there (img2feat.py).
    """

    def __init__(self, path, key, what, hint, known_shapes=None, go_on=None):
        """what, hint: words for the UserError when the file is missing, truncated or not as wanted.

        go_on: for a row that is not written yet.
        """
        self.path, self.key = utils.require(path, what, hint), key
        self._hint, self._go_on = f"delete it and {hint}", go_on
        try:
            with h5py.File(path, "r") as file:
                self._describe(file[key], known_shapes or {})
                written = file["written"][()] != 0 if "written" in file else None
        except (OSError, KeyError, RuntimeError) as error:
            reason = str(error).strip("'\"")
            raise utils.UserError(f"{path}: `{key}` is not readable ({reason}); {self._hint}") from None
        self._written = None if written is None or written.all() else written  # None: every row is there
        self._source, self._opened_by = None, None

    def _describe(self, dataset, known_shapes):
        if not isinstance(dataset, h5py.Dataset):
            raise OSError("it is a group")
        self.dtype = dataset.dtype
        self._stored_shape = dataset.shape
        own_shape = dataset.shape[1:]
        if len(own_shape) == 2 and own_shape[0] == 1:
            own_shape = own_shape[1:]
        default = known_shapes.get(own_shape[0], own_shape) if len(own_shape) == 1 else own_shape
        self.row_shape = tuple(int(size) for size in dataset.attrs.get("shape", default))
        self.shape = (dataset.shape[0], *self.row_shape)
        if 0 in dataset.shape or np.prod(self.row_shape) != np.prod(own_shape):
            raise OSError(f"shape {dataset.shape}, attribute `shape` {self.row_shape}")

        plist = dataset.id.get_create_plist()
        contiguous = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
        self._offset = dataset.id.get_offset() if contiguous else None  # None too when nothing was ever written
        if contiguous and self._offset is None:
            raise OSError("it was created but never written")
        if contiguous:
            found, wanted = os.path.getsize(self.path), self._offset + dataset.size * dataset.dtype.itemsize
            if found < wanted:
                raise OSError(f"truncated: {found} bytes, wanted {wanted}")

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):
        return {**self.__dict__, "_source": None, "_opened_by": None}

    def _open(self):
        if self._opened_by != os.getpid():  # an h5py handle must not be shared with a forked worker
            if self._offset is not None:
                self._source = np.memmap(self.path, self.dtype, "r", self._offset, self._stored_shape)
                # rows are drawn at random: reading on behind one is work for nothing (ten times that of the row)
                self._source._mmap.madvise(mmap.MADV_RANDOM)
            else:
                self._source = h5py.File(self.path, "r")[self.key]
            self._opened_by = os.getpid()
        return self._source

    def __getitem__(self, ids):
        """ids: slice or 1-D integers in any order, repeats allowed -> (len(ids), *row_shape) as stored."""
        ids = np.arange(len(self))[ids] if isinstance(ids, slice) else np.asarray(ids, np.int64)
        self.require(ids)
        source = self._open()
        if self._offset is not None:
            rows = self._copy(source, ids)
        else:  # h5py takes ascending ids without repeats only
            unique, inverse = np.unique(ids, return_inverse=True)
            rows = source[unique][inverse]
        return rows.reshape(len(ids), *self.row_shape)

    def _copy(self, source, ids):
        """Read rows (n,) of the memory map `source`."""
        rows = np.empty((len(ids), *source.shape[1:]), self.dtype)
        n_rows = max(1, COPIED_BYTES // max(1, source[0].nbytes))
        for start in range(0, len(ids), n_rows):
            part = slice(start, start + n_rows)
            self._ask_for(source, ids[part])
            np.take(source, ids[part], axis=0, out=rows[part], mode="clip")  # other modes copy twice
        return rows

    def _ask_for(self, source, ids):
        """Let the system read rows (n,) of the memory map into its cache, all at once, without waiting for them."""
        begin, row_bytes = self._offset % mmap.ALLOCATIONGRANULARITY, source[0].nbytes
        ends = np.flatnonzero(np.diff(ids) != 1)  # of runs of consecutive rows
        for first, last in zip(ids[np.append(0, ends + 1)].tolist(), ids[np.append(ends, -1)].tolist(), strict=True):
            start, stop = begin + first * row_bytes, begin + (last + 1) * row_bytes
            for place in range(start // mmap.PAGESIZE * mmap.PAGESIZE, stop, ASKED_BYTES):
                source._mmap.madvise(mmap.MADV_WILLNEED, place, min(ASKED_BYTES, stop - place))

    def require(self, ids):
        """Raise UserError unless the file has all of these rows (n,)."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise utils.UserError(f"{self.path}: row {bad} wanted, rows 0..{len(self) - 1} found; {self._hint}")
        if self._written is not None and not self._written[ids].all():
            first = ids[~self._written[ids]][0]
            raise utils.UserError(f"{self.path}: image id {first} is not written yet, {self._written.sum()} of "
                                  f"{len(self)} rows are there; {self._go_on}")

    def there(self):
        """List the rows that are there, (n,) ascending."""
        return np.arange(len(self)) if self._written is None else np.flatnonzero(self._written)

    def of(self, kind, n_axes, wanted):
        """Return these Rows if their numbers are of that kind (NumPy's letter) in that many axes; else UserError."""
        if self.dtype.kind != kind or len(self.row_shape) != n_axes:
            raise utils.UserError(f"{self.path}: `{self.key}` is {self.dtype} of shape {self.shape}, wanted {wanted}; "
                                  f"{self._hint}")
        return self

    def batches(self, ids, size):
        """Yield the rows of `ids` (n,), at most `size` at a time."""
        return (self[part] for part in np.array_split(ids, -(-len(ids) // size)))


def open_betas(paths, subj):
    """Open a subject's single-trial responses: Rows (trials, V) float32, z-scored by session."""
    hint = f"{DOWNLOAD}, or check --data_path and --subj"
    return Rows(paths.betas(subj), "betas", f"betas of {subj}", hint).of("f", 1, "float (trials, voxels)")


def open_feature(paths, feat):
    """Open a feature of the stimuli: Rows by image id, of c (T, D), z (4, h, w) or g_k (T, D)."""
    hint = f"write it with python src/img2feat.py --feats {feat}"
    go_on = f"continue with bash scripts/features.sh --feats {feat}"
    rows = Rows(paths.feature(feat), "data", f"feature {feat}", hint, KNOWN_FEATURE_SHAPES, go_on)
    return rows.of("f", 3, "float (N, 4, h, w)") if feat == "z" else rows.of("f", 2, "float (N, T, D)")


def open_stimuli(paths):
    """Open the stimuli: Rows by image id, (N, H, W, 3) uint8."""
    hint = f"{DOWNLOAD}, or check --root"
    return Rows(paths.stimuli / "nsd_stimuli.hdf5", "imgBrick", "stimuli", hint).of("u", 3, "uint8 (N, H, W, 3)")


def sample_hash(rows, n=16):
    """Hash the shape and n rows, spread evenly, of Rows or an HDF5 data set: tells one content from another without
    reading it all. A file of which only other rows were changed has the same."""
    ids = np.unique(np.linspace(0, len(rows) - 1, n).astype(np.int64))
    return hashlib.sha256(repr(rows.shape).encode() + rows[ids].tobytes()).hexdigest()[:12]


def read_betas(betas, rows):
    """Read the betas of some trials, (len(rows), V) float32; raises UserError when one is not a finite number."""
    voxels = betas[rows].astype(np.float32, copy=False)
    finite = np.isfinite(voxels).all(axis=1)
    if not finite.all():
        row = np.asarray(rows)[~finite][0]
        raise utils.UserError(f"{betas.path}: row {row} holds NaN or infinite betas; download or write the file again")
    return voxels
