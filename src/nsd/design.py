"""What the experiment's own tables say: which image a trial showed, which images are shared, what COCO calls them.

Image ids are 0-based 73k ids; nsd_expdesign.mat counts from 1, and is converted here and nowhere else.
"""

import h5py
import numpy as np
import pandas as pd

import utils
from disk.files import load_npy
from nsd.sources import DOWNLOAD, SUBJECTS


def expdesign_file(paths):
    """Return where NSD's design of the experiment lies."""
    return paths.experiments / "nsd_expdesign.mat"


def read_expdesign(paths, take):
    """Return take({name: array} of nsd_expdesign.mat); UserError where reading or taking fails."""
    import scipy.io

    file = utils.require(expdesign_file(paths), "the experiment's design", DOWNLOAD)
    try:
        return take(scipy.io.loadmat(file, variable_names=["masterordering", "subjectim", "sharedix"]))
    except Exception as error:  # scipy raises many types for damaged files
        raise utils.UserError(f"{file}: not readable ({error!r}); download it again") from None


def load_design(paths, subj):
    """Read the image id of every designed trial of a subject, (trials,), from nsd_expdesign.mat.

    The file counts from 1: trial t (row of the betas) of subject s showed subjectim[s, masterordering[t] - 1] - 1.
    """
    def images_of_trials(design):
        order = design["masterordering"].ravel().astype(np.int64) - 1
        return design["subjectim"][SUBJECTS.index(subj)].astype(np.int64)[order] - 1

    return read_expdesign(paths, images_of_trials)


def check_against_expdesign(paths, subj, trials):
    """Raise UserError when an image id of `trials` (a table of load_trials) is not that of the experiment's design."""
    file, shown = expdesign_file(paths), load_design(paths, subj)
    row, image_id = trials["row"].to_numpy(), trials["image_id"].to_numpy()
    if row.max() >= len(shown):
        raise utils.UserError(f"{file}: {len(shown)} trials, but the shards of {subj} have a trial {row.max()}; "
                              "check that both are of one data set")
    differs = shown[row] != image_id
    if differs.any():
        first = np.flatnonzero(differs)[0]
        shards = paths.data_path / "wds" / subj
        raise utils.UserError(f"{shards}: trial {row[first]} shows image {image_id[first]} (from 0), but {file} "
                              f"says {shown[row[first]]}; {differs.sum()} of {len(row)} trials differ; "
                              "check that both are of one subject and one data set")


def check_shared_images(paths, own=False):
    """Return the ids of the images that all subjects were to see; UserError unless the files that list them agree.

    These are nsd_expdesign.mat (from 1), the table of the stimuli and MindEye2's shared1000.npy. own: of data that are
    not NSD's, which have no such design, the latter two: there, the images to test on.
    """
    first, mask_file = "nsd_expdesign.mat", paths.data_path / "shared1000.npy"
    if own:
        shared = np.flatnonzero(load_stimulus_table(paths, ("nsdId", "shared1000"))["shared1000"])
        first = "nsd_stim_info_merged.csv"
    else:
        shared = read_expdesign(paths, lambda design: np.sort(design["sharedix"].ravel().astype(np.int64) - 1))
    others = {"nsd_stim_info_merged.csv": load_stimulus_table(paths, ("nsdId", "shared1000"))["shared1000"].to_numpy(),
              mask_file: load_npy(mask_file, "mask of the shared images", DOWNLOAD)}
    for name, mask in others.items():
        if not np.array_equal(np.flatnonzero(mask), shared):
            raise utils.UserError(f"{name}: {np.count_nonzero(mask)} shared images, of which {first} lists "
                                  f"{np.isin(np.flatnonzero(mask), shared).sum()} of its {len(shared)}, wanted the "
                                  "same; download both again")
    return shared


def check_trial_images(paths, subj):
    """Count the trials in COCO_73k_subj_indices.hdf5; raises UserError where it contradicts nsd_expdesign.mat."""
    image_ids = listed_images(paths, subj)
    check_against_expdesign(paths, subj, pd.DataFrame({"row": np.arange(len(image_ids)), "image_id": image_ids}))
    return len(image_ids)


def listed_images(paths, subj):
    """Read the image id of each of a subject's trials, (trials,), from COCO_73k_subj_indices.hdf5."""
    file = utils.require(paths.data_path / "COCO_73k_subj_indices.hdf5", "image ids of trials", DOWNLOAD)
    try:
        with h5py.File(file, "r") as listed:
            return listed[subj][()].astype(np.int64)
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{file}: `{subj}` is not readable ({error}); download it again") from None


def load_stimulus_table(paths, columns=("nsdId", "cocoId")):
    """Read NSD's table of the stimuli: DataFrame of the wanted columns, one row per image, in the order of ids."""
    file = paths.experiments / "nsd_stim_info_merged.csv"
    utils.require(file, "table of the stimuli", f"{DOWNLOAD}, or check --root")
    try:
        table = pd.read_csv(file, usecols=list(columns)).sort_values("nsdId", ignore_index=True)
    except ValueError as error:
        raise utils.UserError(f"{file}: columns {', '.join(columns)} wanted ({error}); download it again") from None
    if not np.array_equal(table["nsdId"], np.arange(len(table))):
        raise utils.UserError(f"{file}: nsdId is not 0..{len(table) - 1}, each once; download it again")
    return table
