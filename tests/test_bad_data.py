"""Data that are missing, damaged or not what they should be: one line that says what to do, and nothing changed."""

import numpy as np

import score_c
import score_gnet
import score_z
import train_c
import train_g
import train_gnet
import train_z
from damages import (
    another_design,
    both,
    cut,
    hdf5,
    masks,
    put,
    shard,
    text,
    whole,
    without,
    without_shape,
)
from tiny_brain import V
from tiny_nsd import N_IMAGES
from whole_world import BETAS, DATA, RUN_Z, SHARDS, STIM, STIMULI, STIMULUS_FILE, C, Z, assert_refused, mistakes

BAD_BETAS = [  # what is broken, words of the line
    ("missing", without(BETAS), ("betas_all_subj01", "not found", "--subj")),
    ("truncated", cut(BETAS, -40), ("betas_all_subj01", "not readable", "download it")),
    ("wrong key", hdf5(BETAS, np.copy, "responses"), ("betas_all_subj01", "`betas`", "download it")),
    ("a group", hdf5(BETAS, lambda x: None), ("betas_all_subj01", "`betas`", "download it")),
    ("1-D", hdf5(BETAS, np.ravel), ("betas_all_subj01", "(2520,)", "(trials, voxels)")),
    ("int", hdf5(BETAS, lambda x: x.astype(np.int16)), ("betas_all_subj01", "int16", "float")),
    ("strings", hdf5(BETAS, lambda x: x.astype("S8")), ("betas_all_subj01", "|S8", "float")),
    ("fewer rows", hdf5(BETAS, lambda x: x[:30]), ("betas_all_subj01", "rows 0..29", "download it")),
    ("NaN", hdf5(BETAS, lambda x: np.full_like(x, np.nan)), ("betas_all_subj01", "NaN", "download")),
    ("not HDF5", text(BETAS, "betas"), ("betas_all_subj01", "not readable", "download it")),
]
CASES = [  # script, what is broken, how, flags, words of the line: flag or file, found, wanted or what to do
    *((train_c, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS),
    *((score_c, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS),
    *((train_gnet, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS[3:9]),
    # shards
    (train_c, "shard truncated", cut(f"{SHARDS}/train/1.tar", 2000), [],
     ("train/1.tar", "unexpected end", "download it")),
    (train_c, "shard missing in the middle", without(f"{SHARDS}/train/1.tar"), [], ("[0, 2]", "without a gap")),
    (train_c, "shard empty", cut(f"{SHARDS}/train/0.tar", 0), [], ("train/0.tar", "download it")),
    (train_c, "shard without trials", shard("train/0.tar", lambda x: x[:0]), [], ("train/0.tar", "download it")),
    (train_c, "trial twice", shard("train/0.tar", lambda x: x[[0, 0]]), [], ("trial", "there twice", "download it")),
    (train_c, "shared image trains", shard("train/0.tar", lambda x: put(x, (0, 16), 1)), [], ("a shared image", "wds")),
    (train_c, "image id past the features", shard("train/0.tar", lambda x: put(x, (0, 0), 99)), [], ("99",)),
    (train_c, "no shards", without(f"{SHARDS}/train"), [], ("wds/subj01/train", "not found", "--data_path")),
    (score_c, "no test shard", without(f"{SHARDS}/new_test/0.tar"), [], ("new_test/0.tar", "not found", "--subj")),
    (score_c, "no old test split", whole, ["--test_split", "test"], ("test/0.tar", "not found", "download it")),
    (score_gnet, "test shard cut", cut(f"{SHARDS}/new_test/0.tar", 700), [], ("new_test/0.tar", "download it")),
    # features
    (train_c, "feature missing", without(C), [], ("c_all.hdf5", "not found", "img2feat.py --feats c")),
    (train_c, "feature truncated", cut(C, -8), [], ("c_all.hdf5", "not readable", "img2feat.py")),
    (train_c, "feature of another key", hdf5(C, np.copy, "features"), [], ("c_all.hdf5", "`data`", "img2feat.py")),
    (train_c, "feature of another width", hdf5(C, lambda x: x[:, 1:]), [], ("c_all.hdf5", "111", "img2feat.py")),
    (train_c, "feature flat", both(hdf5(C, np.copy), without_shape(C)), [],
     ("c_all.hdf5", "(24, 112)", "(N, T, D)")),
    (train_c, "feature of ints", hdf5(C, lambda x: x.astype(int)), [], ("c_all.hdf5", "int64", "float")),
    (train_c, "feature of too few rows", hdf5(C, lambda x: x[:9]), [], ("c_all.hdf5", "rows 0..8", "img2feat.py")),
    (train_c, "feature NaN", hdf5(C, lambda x: x * np.nan), [], ("c_all.hdf5", "NaN", "img2feat.py")),
    (train_c, "ridge, another feature", hdf5(C, lambda x: x * 2), ["--model", "ridge"],
     ("c_components.hdf5", "the one beside it", "features.sh --feats c")),
    (train_g, "feature missing", whole, ["--feat", "g_6"], ("g_6_all.hdf5", "not found", "img2feat.py --feats g_6")),
    (train_z, "tokens missing", without(f"{STIMULI}/g_12_all.hdf5"), [], ("g_12_all.hdf5", "not found", "img2feat")),
    (train_z, "latents NaN", hdf5(Z, lambda x: put(x, slice(None), np.inf)), [], ("z_all.hdf5", "NaN", "img2feat.py")),
    (train_z, "latents are tokens", both(hdf5(Z, lambda x: x.reshape(N_IMAGES, 16, 16)), without_shape(Z)),
     [], ("z_all.hdf5", "(24, 16, 16)", "(N, 4, h, w)")),
    (train_gnet, "stimuli missing", without(STIM), [], (STIMULUS_FILE, "not found", "--root")),
    (train_gnet, "stimuli of floats", hdf5(STIM, lambda x: x / 255), [], (STIMULUS_FILE, "float64", "uint8")),
    (train_gnet, "stimuli grey", hdf5(STIM, lambda x: x[..., 0]), [], (STIMULUS_FILE, "(N, H, W, 3)")),
    (score_z, "feature of too few rows", both(hdf5(Z, lambda x: x[:9]), without(
        f"{RUN_Z}/z_statistics_subj01_own_3sess.pth")), [], ("z_all.hdf5", "rows 0..8")),
    (score_c, "true feature missing", without(C), ["--ground_truth"], ("c_all.hdf5", "not found", "img2feat.py")),
    # what the experiment says
    (train_c, "expdesign contradicts", another_design, [], ("nsd_expdesign.mat", "shows image", "check that both")),
    (train_c, "expdesign cut", cut("nsddata/experiments/nsd/nsd_expdesign.mat", 300), [], ("nsd_expdesign.mat",)),
    (train_gnet, "masks missing", without(f"{DATA}/brain_region_masks.hdf5"), [], ("brain_region_masks", "not found")),
    (train_gnet, "masks of other voxels", masks(np.ones(V + 1, bool)), [], (f"({V + 1},)", f"{V} voxels", "check")),
    (train_gnet, "masks of words", masks(np.array([b"x"] * V)), [], ("brain_region_masks.hdf5", "V1", "download")),
]


@mistakes(CASES)
def test_a_mistake_gives_one_line_and_changes_nothing(case, whole_world, monkeypatch, capsys):
    assert_refused(case, whole_world, monkeypatch, capsys)
