"""A few kilobytes in the formats of the Natural Scenes Dataset, for the tests: 24 images, 2 subjects, 3 sessions.

conftest.py writes them once, and hands out copies: fixtures `nsd` and `paths`.
"""

import io
import json

import h5py
import numpy as np
import pandas as pd
import scipy.io
import webdataset

from disk.names import Paths

N_IMAGES, SIDE = 24, 10
N_VOXELS = {"subj01": 7, "subj02": 5}
SESSIONS, TRIALS = 3, 14  # trials per session
SHARED = [3, 5, 11, 20]  # image ids every subject sees, in the test split

# behav.npy by name
IMAGE_ID, SUBJECT, SESSION, TRIAL, IS_SHARED = 0, 1, 2, 5, 16


def write_tiny_nsd(root, seed=0):
    """Write everything that nsd/ reads; returns (Paths, {subject: image id of every trial})."""
    rng = np.random.default_rng(seed)
    paths = Paths(root, root / "MindEyeV2/mindeyev2")
    for folder in (paths.data_path, paths.experiments, paths.stimuli / "annotations"):
        folder.mkdir(parents=True)
    shown = {subj: draw_trials(number, rng) for number, subj in enumerate(N_VOXELS)}
    write_expdesign(paths, shown)
    for subj, n_voxels in N_VOXELS.items():
        with h5py.File(paths.betas(subj), "w") as file:
            file["betas"] = rng.standard_normal((SESSIONS * TRIALS, n_voxels)).astype(np.float32)
        write_shards(paths, subj, shown[subj])
    with h5py.File(paths.data_path / "brain_region_masks.hdf5", "w") as file:
        for subj, n_voxels in N_VOXELS.items():
            file[f"{subj}/V1"] = np.arange(n_voxels) < 2
            file[f"{subj}/nsd_general"] = np.ones(n_voxels, bool)
    write_stimuli(paths, rng)
    return paths, shown


def draw_trials(number, rng):
    """Image id of every trial: 10 images of the subject's own and the 4 shared ones, 3 repeats each."""
    own = [i for i in range(N_IMAGES) if i not in SHARED][number * 10:(number + 1) * 10]
    return rng.permutation(np.repeat([*own, *SHARED], 3))


def write_expdesign(paths, shown):
    """As NSD: every subject follows one ordering, through its own list of images; everything counted from 1."""
    ordering = np.arange(1, SESSIONS * TRIALS + 1)
    subjectim = np.zeros((8, SESSIONS * TRIALS), int)
    for subj, image_ids in shown.items():
        subjectim[int(subj[4:]) - 1] = image_ids + 1
    # an ordering that is not the identity, undone by the list of images
    ordering, subjectim = ordering[::-1], subjectim[:, ::-1]
    scipy.io.savemat(paths.experiments / "nsd_expdesign.mat", {"masterordering": ordering, "subjectim": subjectim})


def write_shards(paths, subj, image_ids):
    """Tar shards of one subject: the shared images in new_test, the others by session in train."""
    behav = np.full((len(image_ids), 17), -1.0)
    behav[:, IMAGE_ID], behav[:, SUBJECT] = image_ids, int(subj[4:])
    behav[:, TRIAL] = np.arange(len(image_ids))
    behav[:, SESSION] = 1 + np.arange(len(image_ids)) // TRIALS
    behav[:, IS_SHARED] = np.isin(image_ids, SHARED)
    test = behav[:, IS_SHARED] == 1
    write_tar(paths.data_path / "wds" / subj / "new_test/0.tar", behav[test])
    for session in range(SESSIONS):
        chosen = ~test & (behav[:, SESSION] == session + 1)
        write_tar(paths.data_path / "wds" / subj / f"train/{session}.tar", behav[chosen])


def write_tar(path, behav):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for number, row in enumerate(behav):
            members = {"olds_behav.npy": np.ones((3, 17)), "behav.npy": row[None], "past_behav.npy": np.zeros((15, 17))}
            sink.write({"__key__": f"sample{number:09d}", **{name: npy(array) for name, array in members.items()}})


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_stimuli(paths, rng):
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = rng.integers(0, 256, (N_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    lines = ["", *(f"{i},{1000 - i},train2017,\"(0, 0, 0, 0)\",{i}" for i in range(N_IMAGES))]
    lines[0] = ",cocoId,cocoSplit,cropBox,nsdId"
    (paths.experiments / "nsd_stim_info_merged.csv").write_text("\n".join(lines) + "\n")
    words = ["a", "b", "ab", "a b", "b a", "b b"]
    captions = {str(1000 - i): [str(text) for text in rng.choice(words, 2 + i % 3)] for i in rng.permutation(N_IMAGES)}
    (paths.stimuli / "annotations/nsd_captions.json").write_text(json.dumps(captions))


def read_hdf5(path, key):
    with h5py.File(path, "r") as file:
        return file[key][()]


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def table(image_ids, first_row=0):
    """A table of trials that show these images, one after the other."""
    return pd.DataFrame({"image_id": image_ids, "row": np.arange(len(image_ids)) + first_row})
