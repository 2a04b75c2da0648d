"""NSD-synthetic for the tiny NSD: 5 stimuli that all saw, 3 of one subject's own, 20 trials, volumes of 3 x 4 x 6."""

import gzip

import h5py
import nibabel
import numpy as np
import scipy.io

COMMON, OWN, SCREEN = 5, 3, (6, 10)
SHOWN = np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 6, 1, 2, 3, 3, 2, 1, 1, 4])  # in each trial, from 1
VOLUME = (3, 4, 6)


def write_synthetic(paths, subj="subj01", seed=0):
    """Write a subject's session; returns its volumes, (T, X, Y, Z) int16, and the mask (X, Y, Z) of its voxels."""
    rng = np.random.default_rng(seed)
    with h5py.File(paths.betas(subj)) as file:
        n_voxels = file["betas"].shape[1]
    general = np.where(rng.permutation(np.prod(VOLUME)).reshape(VOLUME) < n_voxels, 1, -1)
    for folder in (paths.rois(subj), paths.synthetic, paths.synthetic_betas(subj), paths.synthetic_design.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_nifti(paths.rois(subj) / "nsdgeneral.nii.gz", general.astype(np.int16))
    scipy.io.savemat(paths.synthetic_design, {"masterordering": SHOWN[None].astype(np.uint16)})
    volumes = rng.integers(-900, 900, (len(SHOWN), *VOLUME)).astype(np.int16)
    write_betas(paths, subj, volumes)
    for name, n in (("stimuli", COMMON), (f"colorstimuli_{subj}", OWN)):
        with h5py.File(paths.synthetic / f"nsdsynthetic_{name}.hdf5", "w") as file:
            file["imgBrick"] = rng.integers(0, 256, (n, *SCREEN, 3), dtype=np.uint8)
    return volumes, general == 1


def write_betas(paths, subj, volumes):
    """As MATLAB writes HDF5: the axes in reverse."""
    with h5py.File(paths.synthetic_betas(subj) / "betas_nsdsynthetic.hdf5", "w") as file:
        file["betas"] = volumes.transpose(0, 3, 2, 1)


def write_nifti(file, volume):
    file.write_bytes(gzip.compress(nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()))
