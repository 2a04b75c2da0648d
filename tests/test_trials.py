"""Shards of trials against what was shown, the experiment's design, and the split into training and validation."""

import os

import numpy as np
import pandas as pd
import pytest
import scipy.io

import tiny_nsd
import utils
from nsd.trials import list_subjects, load_trials, read_shard, split_by_image
from tiny_nsd import table, truncate


def test_trials_of_both_splits_are_what_was_shown(nsd):
    paths, shown = nsd
    for subj, image_ids in shown.items():
        train, test = load_trials(paths, subj, "train"), load_trials(paths, subj, "new_test")
        assert list(train.columns) == ["subject", "session", "image_id", "row", "is_shared"]
        both = pd.concat([train, test]).sort_values("row")
        np.testing.assert_array_equal(both["row"], np.arange(len(image_ids)))
        np.testing.assert_array_equal(both["image_id"], image_ids)
        np.testing.assert_array_equal(both["session"], both["row"] // tiny_nsd.TRIALS + 1)
        assert set(both["subject"]) == {subj} and test["is_shared"].all() and not train["is_shared"].any()
        assert set(test["image_id"]) == set(tiny_nsd.SHARED)


def test_sessions_are_the_first_in_numeric_order(paths):
    folder = paths.data_path / "wds/subj01/train"
    for session in range(3, 12):  # as text, "10" sorts before "2"
        behav = np.zeros((1, 17))
        behav[0, [tiny_nsd.IMAGE_ID, tiny_nsd.SESSION, tiny_nsd.TRIAL]] = session, session + 1, 100 + session
        tiny_nsd.write_tar(folder / f"{session}.tar", behav)
    (paths.experiments / "nsd_expdesign.mat").unlink()  # these sessions are not in it
    for wanted in (1, 3, 5, 12):
        assert set(load_trials(paths, "subj01", "train", wanted)["session"]) == set(range(1, wanted + 1))


def test_too_many_sessions_gaps_and_missing_folders(paths):
    for wanted in (4, 0):
        with pytest.raises(utils.UserError, match=f"--num_sessions {wanted}: subj01 has 3 sessions"):
            load_trials(paths, "subj01", "train", wanted)
    (paths.data_path / "wds/subj01/train/1.tar").unlink()
    with pytest.raises(utils.UserError, match="without a gap"):
        load_trials(paths, "subj01", "train")
    with pytest.raises(utils.UserError, match="wds/subj03/train: shards not found"):
        load_trials(paths, "subj03", "train")
    with pytest.raises(utils.UserError, match="new_test/0.tar: shard not found"):
        load_trials(paths, "subj03", "new_test")


def test_truncated_tar_wherever_it_is_cut(paths):
    tar = paths.data_path / "wds/subj01/train/0.tar"
    content = tar.read_bytes()
    end = len(content.rstrip(b"\0"))
    whole = len(load_trials(paths, "subj01", "train"))
    for cut in [0, 100, *range(512, end, 512)]:  # multiples of 512: some are ends of members
        tar.write_bytes(content[:cut])
        with pytest.raises(utils.UserError, match=r"train/0\.tar"):
            load_trials(paths, "subj01", "train")
    tar.write_bytes(content)
    assert len(load_trials(paths, "subj01", "train")) == whole


def test_tar_with_wrong_content(paths):
    tar = paths.data_path / "wds/subj01/new_test/0.tar"
    for behav, message in [(np.zeros((2, 16)), "not a readable shard"), (np.zeros((0, 17)), "not a readable shard"),
                           (np.full((2, 17), -1.0), "without image id"), (np.full((2, 17), np.nan), "without image id"),
                           (np.ones((2, 17)), "trial 1 is there twice")]:
        tiny_nsd.write_tar(tar, behav)
        with pytest.raises(utils.UserError, match=message):
            load_trials(paths, "subj01", "new_test")


def test_shards_are_unpacked_once(nsd, monkeypatch):
    paths, _ = nsd
    first = load_trials(paths, "subj01", "train", 2)
    unpack, unpacked = read_shard, []
    monkeypatch.setattr("nsd.trials.read_shard", lambda path: (unpacked.append(path.name), unpack(path))[1])
    pd.testing.assert_frame_equal(load_trials(paths, "subj01", "train", 2), first)
    assert unpacked == []
    everything = load_trials(paths, "subj01", "train")
    assert unpacked == ["2.tar"] and everything[:len(first)].equals(first)
    shard = paths.data_path / "wds/subj01/train/1.tar"
    os.utime(shard, ns=(0, 0))  # another file of the same name
    pd.testing.assert_frame_equal(load_trials(paths, "subj01", "train"), everything)
    assert unpacked == ["2.tar", "1.tar"]
    kept = shard.with_name(".behaviour.npz")
    kept.write_bytes(b"damaged")
    pd.testing.assert_frame_equal(load_trials(paths, "subj01", "train"), everything)
    assert len(np.load(kept)) == 3


def test_a_shared_image_does_not_train_and_no_other_tests(nsd):
    paths, shown = nsd
    behav = np.zeros((1, 17))
    for folder, split, image_id in (("train/1", "train", 11), ("new_test/0", "new_test", 4)):
        row = np.flatnonzero(shown["subj01"] == image_id)[0]
        behav[0, [tiny_nsd.IMAGE_ID, tiny_nsd.TRIAL, tiny_nsd.IS_SHARED]] = image_id, row, split == "train"
        tiny_nsd.write_tar(paths.data_path / f"wds/subj01/{folder}.tar", behav)
        with pytest.raises(utils.UserError, match=rf"{split}: trial {row} and 0 others show .*\(id {image_id}\)"):
            load_trials(paths, "subj01", split)


def test_ids_that_contradict_the_experiments_design(nsd):
    paths, shown = nsd
    off_by_one = np.roll(shown["subj01"], 1)
    for image_ids in (off_by_one, shown["subj02"]):
        tiny_nsd.write_shards(paths, "subj01", image_ids)
        with pytest.raises(utils.UserError, match=r"wds/subj01: trial \d+ shows image \d+ .*nsd_expdesign"):
            load_trials(paths, "subj01", "train")
    tiny_nsd.write_shards(paths, "subj01", shown["subj01"])
    load_trials(paths, "subj01", "train")


def test_expdesign_ids_are_counted_from_one(nsd):
    paths, shown = nsd
    design = scipy.io.loadmat(paths.experiments / "nsd_expdesign.mat")
    design = {"masterordering": design["masterordering"], "subjectim": design["subjectim"] - 1}
    scipy.io.savemat(paths.experiments / "nsd_expdesign.mat", design)
    with pytest.raises(utils.UserError, match="trials differ"):
        load_trials(paths, "subj01", "train")


def test_damaged_or_shorter_expdesign(paths):
    file = paths.experiments / "nsd_expdesign.mat"
    scipy.io.savemat(file, {"masterordering": np.arange(1, 6), "subjectim": np.ones((8, 10))})
    with pytest.raises(utils.UserError, match="5 trials, but"):
        load_trials(paths, "subj01", "train")
    truncate(file, 200)
    with pytest.raises(utils.UserError, match="nsd_expdesign.mat: not readable"):
        load_trials(paths, "subj01", "train")
    file.unlink()
    load_trials(paths, "subj01", "train")


def test_subjects(paths):
    assert list_subjects(paths) == ["subj01", "subj02"]
    for subj in tiny_nsd.N_VOXELS:
        paths.betas(subj).unlink()
    with pytest.raises(utils.UserError, match="check --data_path"):
        list_subjects(paths)


def test_split_by_image():
    rng = np.random.default_rng(0)
    ids = {subj: rng.choice(5000, 3000, replace=False) for subj in ("subj01", "subj02")}
    parts = {subj: split_by_image(table(np.repeat(ids[subj], 3)), 0.05, 7) for subj in ids}
    for subj, (train, val) in parts.items():
        assert not set(train["image_id"]) & set(val["image_id"])
        assert sorted([*train["row"], *val["row"]]) == list(range(9000))
        assert abs(val["image_id"].nunique() / 3000 - 0.05) < 0.015
        again = split_by_image(table(np.repeat(ids[subj], 3)), 0.05, 7)[1]
        pd.testing.assert_frame_equal(val, again)
        assert not val.equals(split_by_image(table(np.repeat(ids[subj], 3)), 0.05, 8)[1])
    # an image seen by both subjects is on one side for both
    assert not set(parts["subj01"][0]["image_id"]) & set(parts["subj02"][1]["image_id"])
    assert split_by_image(table(np.arange(3)), 0.0001, 0)[1]["image_id"].nunique() == 1
