"""What the tests of img2feat.py share: its command line with tiny models, and what it wrote."""

import h5py
import numpy as np

FEATS = ["c", "z", "g_2", "g_4"]


def words(paths, folders, feats, *flags):
    return ["--root", str(paths.root), "--sd_model", str(folders[0]), "--clip_model", str(folders[1]), "--batch_size",
            "7", "--num_workers", "0", "--device", "cpu", "--feats", *feats, *flags]


def stored(paths, feat):
    with h5py.File(paths.feature(feat), "r") as file:
        return file["data"][()]


def written(paths, feat):
    """Ids of the images whose rows are there."""
    with h5py.File(paths.feature(feat), "r") as file:
        return np.flatnonzero(file["written"][()]).tolist()


def saw(shown, *subjects):
    """Ids of the images that the subjects saw, ascending."""
    return sorted({int(image_id) for subj in subjects for image_id in shown[subj]})


def images(paths):
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r") as file:
        return file["imgBrick"][()]
