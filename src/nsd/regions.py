"""Regions of interest over the voxels of a subject's betas, and where these lie. Letter: V voxels."""

from typing import NamedTuple

import h5py
import numpy as np

import utils
from nsd.rows import open_betas
from nsd.sources import DOWNLOAD

PRF_LABELS = {"V1": (1, 2), "V2": (3, 4), "V3": (5, 6), "V4": (7,)}  # of prf-visualrois: ventral and dorsal halves


def roi_masks(paths, subj):
    """Read the regions of interest of a subject: {name: (V,) bool} over the voxels of its betas.

    From MindEye2's brain_region_masks.hdf5, or from NSD's own volumes where that file is missing. Where both are there
    they must agree: UserError otherwise, since the betas' voxels are then in another order than one of them. With
    paths.roi_source one of them is taken at its word.
    """
    file = paths.data_path / "brain_region_masks.hdf5"
    volumes = paths.rois(subj) / "nsdgeneral.nii.gz"
    if paths.roi_source == "volumes" or (paths.roi_source is None and not file.exists() and volumes.exists()):
        return _masks_of_volumes(paths, subj)
    utils.require(file, "ROI masks", f"{DOWNLOAD}, check --data_path, or put NSD's {volumes.name} and "
                  f"prf-visualrois.nii.gz into {volumes.parent}")
    try:
        with h5py.File(file, "r") as regions:
            masks = {name: mask[()] for name, mask in regions[subj].items()}
        if words := [name for name, mask in masks.items() if mask.dtype.kind not in "biuf"]:
            raise OSError(f"{words[0]} is of {masks[words[0]].dtype}, wanted 0 and 1")
        masks = {name: mask.astype(bool) for name, mask in masks.items()}
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise utils.UserError(f"{file}: masks of {subj} are not readable ({error}); download it again") from None
    n_voxels = open_betas(paths, subj).shape[1]
    for name, mask in masks.items():
        if mask.shape != (n_voxels,):
            raise utils.UserError(f"{file}: mask {name} of {subj} has shape {mask.shape}, its betas {n_voxels} voxels; "
                                  "check that both are of one data set")
    if paths.roi_source is None and volumes.exists():
        others = _masks_of_volumes(paths, subj)
        for name in PRF_LABELS:
            if name in masks and not np.array_equal(masks[name], others[name]):
                raise utils.UserError(
                    f"{file}: {name} of {subj} has {masks[name].sum()} voxels, of which {volumes.parent} says so of "
                    f"{(masks[name] & others[name]).sum()} (its own {name} has {others[name].sum()}), wanted the same; "
                    "check that both are of one data set, or say which to believe (--roi_source masks|volumes)")
    return masks


class Space(NamedTuple):
    """Where the voxels of a subject's betas lie: those of nsdgeneral, in C order of its axes."""

    inside: np.ndarray  # (X, Y, Z) bool: the V voxels
    cortex: np.ndarray  # (X, Y, Z) bool: all of cortex that the volume knows
    affine: np.ndarray  # (4, 4): indices of a voxel -> mm, as NIfTI has it


def voxel_space(paths, subj):
    """Read where a subject's voxels lie, from NSD's nsdgeneral volume; returns a Space.

    Raises UserError for a missing or damaged volume, and for one with another number of voxels than the betas.
    """
    file = paths.rois(subj) / "nsdgeneral.nii.gz"
    general, affine = _read_volume(file)
    n_voxels = open_betas(paths, subj).shape[1]
    if (general == 1).sum() != n_voxels:
        raise utils.UserError(f"{file}: {(general == 1).sum()} voxels, the betas of {subj} have {n_voxels}; check that "
                              "both are of one subject and one data set")
    return Space(general == 1, general >= 0, affine)  # -1 is outside of cortex


def _read_volume(file):
    """Read a NIfTI volume: (array, affine (4, 4)); UserError for none."""
    import nibabel

    utils.require(file, "ROI volume", "download it (bash scripts/download.sh --what rois)")
    try:
        image = nibabel.load(file)
        return np.asarray(image.dataobj), image.affine
    except Exception as error:  # nibabel and gzip raise many types for damaged files
        raise utils.UserError(f"{file}: not a readable NIfTI volume ({error}); download it again") from None


def _masks_of_volumes(paths, subj):
    """Make the masks of NSD's nsdgeneral and prf-visualrois volumes, (X, Y, Z); voxels in C order, as the betas are."""
    space, folder = voxel_space(paths, subj), paths.rois(subj)
    labels, affine = _read_volume(folder / "prf-visualrois.nii.gz")
    if labels.shape != space.inside.shape:
        raise utils.UserError(f"{folder}: nsdgeneral is of {space.inside.shape}, prf-visualrois of {labels.shape}, "
                              "wanted the same; download both again")
    if not np.allclose(affine, space.affine, atol=0.01):
        raise utils.UserError(f"{folder}: nsdgeneral and prf-visualrois have different affines (their voxels lie "
                              f"{np.abs(affine - space.affine).max():g} mm apart or more), wanted the same; download "
                              "both again")
    label, n_voxels = labels[space.inside], int(space.inside.sum())
    masks = {name: np.isin(label, values) for name, values in PRF_LABELS.items()}
    early = np.any(list(masks.values()), axis=0)
    return {"nsd_general": np.ones(n_voxels, bool), **masks, "higher_vis": ~early}
