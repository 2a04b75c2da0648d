"""Regions of interest: MindEye2's masks, NSD's volumes, and whether they agree."""

import h5py
import nibabel
import numpy as np
import pytest

import train_gnet
import utils
from disk.names import Paths
from nsd.regions import roi_masks, voxel_space
from tiny_brain import write_volumes


def test_roi_masks(paths):
    masks = roi_masks(paths, "subj02")
    np.testing.assert_array_equal(masks["V1"], [True, True, False, False, False])
    assert masks["nsd_general"].dtype == bool and masks["nsd_general"].all()
    with pytest.raises(utils.UserError, match="masks of subj03"):
        roi_masks(paths, "subj03")
    with h5py.File(paths.betas("subj02"), "w") as file:
        file["betas"] = np.zeros((4, 6), np.float32)
    with pytest.raises(utils.UserError, match="mask V1 of subj02"):
        roi_masks(paths, "subj02")


def test_roi_volumes_and_masks_agree(paths):
    write_volumes(paths, "subj01", [1, 2, 3, 4, 5, 7, 0])  # the masks' V1 are the first two voxels
    masks = roi_masks(paths, "subj01")
    assert masks["V1"].tolist() == [True, True] + 5 * [False]


def test_roi_masks_of_volumes_alone(paths):
    (paths.data_path / "brain_region_masks.hdf5").unlink()
    write_volumes(paths, "subj01", [7, 1, 0, 4, 5, 6, 2])
    masks = roi_masks(paths, "subj01")
    found = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}
    assert found == {"nsd_general": list(range(7)), "V1": [1, 6], "V2": [3], "V3": [4, 5], "V4": [0],
                     "higher_vis": [2]}


def test_volumes_in_another_order_of_axes_are_refused(paths):
    """(Z, Y, X), as NSD's HDF5 volumes are, flattens to other voxels."""
    write_volumes(paths, "subj01", [1, 2, 0, 0, 0, 0, 0], transposed=True)
    with pytest.raises(utils.UserError, match="V1 of subj01 has 2 voxels"):
        roi_masks(paths, "subj01")


def test_one_of_two_that_disagree_can_be_named(paths):
    write_volumes(paths, "subj01", [0, 0, 1, 2, 0, 0, 0])
    with pytest.raises(utils.UserError, match="of which .* says so of 0.*--roi_source masks.volumes"):
        roi_masks(paths, "subj01")
    for source, voxels in (("masks", [0, 1]), ("volumes", [2, 3])):
        words = ["--root", str(paths.root), "--data_path", str(paths.data_path), "--roi_source", source]
        named = Paths.from_args(train_gnet.get_parser().parse_args(words))
        assert np.flatnonzero(roi_masks(named, "subj01")["V1"]).tolist() == voxels


def test_voxels_lie_where_the_volume_says(paths):
    write_volumes(paths, "subj01", [1, 2, 3, 4, 5, 7, 0])
    space = voxel_space(paths, "subj01")
    labels = nibabel.load(paths.rois("subj01") / "prf-visualrois.nii.gz")
    at = [index for index in np.ndindex(3, 4, 5) if labels.dataobj[index] >= 0]  # the last axis runs fastest
    assert np.argwhere(space.inside).tolist() == [list(index) for index in at] and (space.cortex == space.inside).all()
    assert [int(labels.dataobj[index]) for index in at] == [1, 2, 3, 4, 5, 7, 0]
    moved = nibabel.Nifti1Image(np.asarray(labels.dataobj), np.diag([2, 1, 1, 1]))
    nibabel.save(moved, paths.rois("subj01") / "prf-visualrois.nii.gz")
    with pytest.raises(utils.UserError, match="different affines .*1 mm"):
        roi_masks(paths, "subj01")


def test_volumes_of_another_subject_or_damaged_are_refused(paths):
    write_volumes(paths, "subj01", [1, 2, 0, 0, 0])
    with pytest.raises(utils.UserError, match="5 voxels, the betas of subj01 have 7"):
        roi_masks(paths, "subj01")
    (paths.rois("subj01") / "nsdgeneral.nii.gz").write_bytes(b"no volume")
    with pytest.raises(utils.UserError, match="not a readable NIfTI"):
        roi_masks(paths, "subj01")
