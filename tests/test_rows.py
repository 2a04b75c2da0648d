"""Rows of HDF5 data sets against the arrays they were made of, and every way in which a file can be wrong."""

import mmap
import os
import pickle

import h5py
import numpy as np
import pytest

import utils
from nsd.rows import KNOWN_FEATURE_SHAPES, Rows, open_betas, open_feature
from tiny_nsd import truncate


@pytest.mark.parametrize("storage", [{}, {"chunks": (3, 4)}, {"chunks": (3, 4), "compression": "gzip"}])
def test_rows_equal_the_array_in_any_storage_order_and_after_pickling(tmp_path, storage):
    array = np.random.default_rng(0).standard_normal((11, 8)).astype(np.float32)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["other"] = np.zeros(3)
        file.create_dataset("betas", data=array, **storage)
    rows = Rows(tmp_path / "x.hdf5", "betas", "betas", "write it")
    assert rows.shape == (11, 8) and rows.dtype == np.float32 and len(rows) == 11
    ids = np.array([7, 0, 7, 10, 3])
    rows[ids]  # opened: what is pickled must be the recipe, not the handle or the array
    pickled = pickle.dumps(rows)
    assert array.tobytes()[:64] not in pickled
    for each in (rows, pickle.loads(pickled)):
        np.testing.assert_array_equal(each[ids], array[ids])
        np.testing.assert_array_equal(each[2:9], array[2:9])
        assert each[[]].shape == (0, 8)
    rows[ids][:] = 0  # what is returned is a copy
    np.testing.assert_array_equal(rows[ids], array[ids])


def test_contiguous_rows_are_mapped_not_loaded_and_asked_for_before_they_are_read(tmp_path, monkeypatch):
    """All bytes of the wanted rows, whatever lies beside them, in requests that the system does not cut off."""
    array = np.arange(200 * 5000, dtype=np.float32).reshape(200, 5000)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["other"] = np.zeros(3)
        file["betas"] = array
        offset = file["betas"].id.get_offset()
    rows = Rows(tmp_path / "x.hdf5", "betas", "betas", "write it")
    rows[[0]]
    asked, mapped = [], rows._source._mmap

    class Map:
        def madvise(self, advice, start, length):
            assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0 and length <= 2**17
            asked.append((start, start + length))
            return mapped.madvise(advice, start, length)

    assert isinstance(rows._source, np.memmap)
    monkeypatch.setattr(rows._source, "_mmap", Map())
    monkeypatch.setattr("nsd.rows.COPIED_BYTES", 300_000)  # 15 rows
    ids = np.array([*range(100, 150), 3, 199, 7, 7, 0])
    np.testing.assert_array_equal(rows[ids], array[ids])
    wanted = np.zeros(offset + array.nbytes, bool)
    for i in ids:
        wanted[offset + i * 20_000:offset + (i + 1) * 20_000] = True
    for start, stop in asked:
        wanted[start:stop] = False
    assert not wanted.any()
    assert sum(stop - start for start, stop in asked) < len(ids) * (20_000 + mmap.PAGESIZE)
    assert len(asked) < 20  # runs of rows together


@pytest.mark.parametrize("stored, attribute, wanted", [
    ((5, 59136), None, (77, 768)), ((5, 38400), None, (50, 768)), ((5, 16384), None, (4, 64, 64)),
    ((5, 1, 38400), None, (50, 768)),  # NeuralDiffuser's own files
    ((5, 24), (2, 3, 4), (2, 3, 4)), ((5, 1, 24), (6, 4), (6, 4)), ((5, 24), None, (24,)),
    ((5, 16384), (128, 128), (128, 128)), ((5, 4, 3, 2), None, (4, 3, 2)),
])
def test_row_shape_of_features(paths, stored, attribute, wanted):
    array = np.random.default_rng(0).integers(0, 9, stored).astype(np.float16)
    with h5py.File(paths.feature("g_2"), "w") as file:
        file["data"] = array
        if attribute:
            file["data"].attrs["shape"] = attribute
    rows = Rows(paths.feature("g_2"), "data", "feature", "write it", KNOWN_FEATURE_SHAPES)
    assert rows.row_shape == wanted and rows.shape == (5, *wanted)
    np.testing.assert_array_equal(rows[[4, 1]].reshape(2, -1), array[[4, 1]].reshape(2, -1))


def test_betas_keep_their_width_even_if_it_is_a_features(paths):
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = np.zeros((2, 16384), np.float32)
    assert open_betas(paths, "subj01").shape == (2, 16384)


@pytest.mark.parametrize("ids", [[-1], [0, 42], slice(0, 0)])
def test_ids_outside_the_file(paths, ids):
    betas = open_betas(paths, "subj01")
    if isinstance(ids, slice):
        assert betas[ids].shape == (0, 7)
    else:
        with pytest.raises(utils.UserError, match=r"betas_all_subj01.*rows 0\.\.41 found"):
            betas[ids]


@pytest.mark.parametrize("keep", [0, 100, -4])
def test_truncated_hdf5(paths, keep):
    file = paths.betas("subj01")
    truncate(file, keep)
    with pytest.raises(utils.UserError, match="betas_all_subj01.*not readable"):
        open_betas(paths, "subj01")


def test_truncated_hdf5_that_hdf5_itself_accepts(paths, monkeypatch):
    """Rows checks the size itself: a mapping beyond the end of the file would crash the process, not raise."""
    size = os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: size(path) - 4000)
    with pytest.raises(utils.UserError, match="truncated"):
        open_betas(paths, "subj01")


def test_missing_file_key_and_attribute_of_another_size(paths):
    with pytest.raises(utils.UserError, match="betas of subj05 not found"):
        open_betas(paths, "subj05")
    with h5py.File(paths.feature("c"), "w") as file:
        file["features"] = np.zeros((3, 4))
    with pytest.raises(utils.UserError, match="c_all.hdf5: `data` is not readable"):
        open_feature(paths, "c")
    with h5py.File(paths.feature("c"), "w") as file:
        file["data"] = np.zeros((3, 4))
        file["data"].attrs["shape"] = (2, 3)
    with pytest.raises(utils.UserError, match="attribute `shape`"):
        open_feature(paths, "c")
    with h5py.File(paths.feature("c"), "w") as file:
        file.create_dataset("data", (3, 4), np.float32)
    with pytest.raises(utils.UserError, match="never written"):
        open_feature(paths, "c")
