"""data.py against files read the plain way, and every way in which they can be wrong."""

import json
import os
import pickle

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from torch.utils.data import DataLoader

import tiny_nsd
import utils
from nsd.batches import EpochBatches
from nsd.captions import load_captions
from nsd.regions import roi_masks
from nsd.repeats import load_test_set, move_to_other_images, null_responses
from nsd.rows import KNOWN_FEATURE_SHAPES, Rows, open_betas, open_feature
from nsd.trials import list_subjects, load_trials, read_shard, split_by_image


@pytest.fixture
def nsd(tmp_path):
    return tiny_nsd.write_tiny_nsd(tmp_path)


@pytest.fixture
def paths(nsd):
    return nsd[0]


def read(path, key):
    with h5py.File(path, "r") as file:
        return file[key][()]


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


# --- Rows ---------------------------------------------------------------------------------------------------------


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


def test_contiguous_rows_are_mapped_not_loaded(paths):
    betas = open_betas(paths, "subj01")
    betas[[0]]
    assert isinstance(betas._source, np.memmap)


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


# --- trials -------------------------------------------------------------------------------------------------------


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


# --- captions, regions, subjects ----------------------------------------------------------------------------------


def test_captions_follow_the_coco_id(paths):
    by_coco_id = json.loads((paths.stimuli / "annotations/nsd_captions.json").read_text())
    captions = load_captions(paths)
    assert captions == [by_coco_id[str(1000 - i)] for i in range(tiny_nsd.N_IMAGES)]


def test_captions_do_not_depend_on_the_order_of_the_table(paths):
    table, expected = paths.experiments / "nsd_stim_info_merged.csv", load_captions(paths)
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines[::-1]]))
    assert load_captions(paths) == expected
    table.write_text("\n".join([header, *lines[:5], *lines[6:]]))
    with pytest.raises(utils.UserError, match="nsdId is not"):
        load_captions(paths)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(utils.UserError, match="columns nsdId, cocoId wanted"):
        load_captions(paths)


def test_image_without_caption_and_damaged_json(paths):
    file = paths.stimuli / "annotations/nsd_captions.json"
    captions = json.loads(file.read_text())
    file.write_text(json.dumps({**captions, "993": []}))
    with pytest.raises(utils.UserError, match="no caption for image 7 "):
        load_captions(paths)
    file.write_text(json.dumps(captions)[:-10])
    with pytest.raises(utils.UserError, match="not valid JSON"):
        load_captions(paths)


def write_volumes(paths, subj, labels_inside, shape=(3, 4, 5), transposed=False, seed=0):
    """NSD's two ROI volumes: voxels at random places inside, labels_inside in C order of (X, Y, Z)."""
    inside = np.zeros(np.prod(shape), bool)
    inside[np.random.default_rng(seed).choice(inside.size, len(labels_inside), replace=False)] = True
    general, labels = np.where(inside, 1, -1).astype(np.int16), np.full(inside.size, -1, np.int16)
    labels[inside] = labels_inside
    paths.rois(subj).mkdir(parents=True, exist_ok=True)
    for name, volume in (("nsdgeneral", general), ("prf-visualrois", labels)):
        volume = volume.reshape(shape)
        nibabel.save(nibabel.Nifti1Image(volume.T.copy() if transposed else volume, np.eye(4)),
                     paths.rois(subj) / f"{name}.nii.gz")


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


def test_volumes_of_another_subject_or_damaged_are_refused(paths):
    write_volumes(paths, "subj01", [1, 2, 0, 0, 0])
    with pytest.raises(utils.UserError, match="5 voxels, the betas of subj01 have 7"):
        roi_masks(paths, "subj01")
    (paths.rois("subj01") / "nsdgeneral.nii.gz").write_bytes(b"no volume")
    with pytest.raises(utils.UserError, match="not a readable NIfTI"):
        roi_masks(paths, "subj01")


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


def test_subjects(paths):
    assert list_subjects(paths) == ["subj01", "subj02"]
    for subj in tiny_nsd.N_VOXELS:
        paths.betas(subj).unlink()
    with pytest.raises(utils.UserError, match="check --data_path"):
        list_subjects(paths)


# --- training batches ---------------------------------------------------------------------------------------------


def table(image_ids, first_row=0):
    return pd.DataFrame({"image_id": image_ids, "row": np.arange(len(image_ids)) + first_row})


def planner(tables, batch_size, seed=0):
    return EpochBatches(tables, {}, {}, batch_size, seed)


def random_tables(rng):
    """One to four subjects with 1..6 repeats of their images; some images are seen by several subjects."""
    tables = {}
    for number in range(rng.integers(1, 5)):
        image_ids = rng.choice(40, rng.integers(1, 30), replace=False) + rng.choice([0, 1000 * number])
        tables[f"subj{number:02d}"] = table(rng.permutation(np.repeat(image_ids, rng.integers(1, 7, len(image_ids)))))
    return tables


@pytest.mark.parametrize("seed", range(30))
def test_every_trial_once_and_no_image_twice_in_a_batch(seed):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng)
    batches = planner(tables, int(rng.integers(len(tables), 30)), seed)
    plan = batches.plan()
    for subj, trials in tables.items():
        assert len(plan[subj]) == len(batches)
        assert sorted(np.concatenate(plan[subj])) == list(range(len(trials)))
    for index in range(len(batches)):
        ids = np.concatenate([tables[subj]["image_id"].to_numpy()[plan[subj][index]] for subj in tables])
        assert len(set(ids)) == len(ids)


def test_equal_shares_of_the_subjects():
    tables = {"subj01": table(np.repeat(np.arange(40), 3)), "subj02": table(np.repeat(np.arange(100, 140), 3)),
              "subj03": table(np.repeat(np.arange(200, 217), 3))}
    batches = planner(tables, 20)  # six trials of each subject, two left over
    assert len(batches) == 20  # 120 / 6
    sizes = {subj: [len(trials) for trials in chosen] for subj, chosen in batches.plan().items()}
    assert set(sizes["subj01"]) == set(sizes["subj02"]) == {6}
    assert set(sizes["subj03"]) == {2, 3}  # 51 trials, spread over all batches


def test_largest_batch_is_the_share():
    sizes = [len(trials) for trials in planner({"subj01": table(np.repeat(np.arange(50), 3))}, 42).plan()["subj01"]]
    assert sorted(sizes) == [37, 37, 38, 38]


def test_plan_depends_on_seed_and_epoch_alone():
    tables = {"subj01": table(np.repeat(np.arange(30), 3)), "subj02": table(np.arange(60))}

    def plan(seed, epoch):
        batches = planner(tables, 12, seed)
        batches.set_epoch(epoch)
        return [[trials.tolist() for trials in chosen] for chosen in batches.plan().values()]

    assert plan(0, 3) == plan(0, 3)
    assert plan(0, 3) != plan(0, 4) and plan(0, 3) != plan(1, 3)
    back = planner(tables, 12, 0)
    for epoch in (3, 4, 3):  # resuming: earlier epochs leave no trace
        back.set_epoch(epoch)
        assert [[trials.tolist() for trials in chosen] for chosen in back.plan().values()] == plan(0, epoch)


def test_repeats_of_an_image_meet_other_images_each_time():
    """The company an image has in one batch must not follow it to the next."""
    image_ids = np.repeat(np.arange(300), 3)
    plan = planner({"subj01": table(image_ids)}, 30).plan()["subj01"]
    company = [set(image_ids[trials]) for trials in plan]
    overlap = [len(a & b) for i, a in enumerate(company) for b in company[:i]]
    assert max(overlap) <= 12  # by chance about 3 of 30


def test_items_hold_the_rows_of_their_trials(nsd):
    paths, shown = nsd
    subjects = list_subjects(paths)
    feature = np.random.default_rng(1).standard_normal((tiny_nsd.N_IMAGES, 6)).astype(np.float16)
    with h5py.File(paths.feature("c"), "w") as file:
        file["data"] = feature
        file["data"].attrs["shape"] = (2, 3)
    tables = {subj: load_trials(paths, subj, "train") for subj in subjects}
    rows = {subj: open_betas(paths, subj) for subj in subjects}
    batches = EpochBatches(tables, rows, {"target": open_feature(paths, "c")}, 8, seed=5)
    betas = {subj: read(paths.betas(subj), "betas") for subj in subjects}

    seen = {subj: [] for subj in subjects}
    for batch in DataLoader(batches, batch_size=None, num_workers=1):
        assert list(batch["voxels"]) == subjects
        assert batch["image_ids"].dtype == torch.int64 and batch["targets"]["target"].dtype == torch.float32
        np.testing.assert_array_equal(batch["targets"]["target"],
                                      feature[batch["image_ids"]].reshape(-1, 2, 3).astype(np.float32))
        ids = iter(batch["image_ids"].tolist())
        for subj, voxels in batch["voxels"].items():
            assert voxels.dtype == torch.float32
            for trial in voxels.numpy():
                row = np.flatnonzero((betas[subj] == trial).all(axis=1)).item()
                assert shown[subj][row] == next(ids)  # voxels and ids belong together
                seen[subj].append(row)
    assert all(sorted(seen[subj]) == sorted(tables[subj]["row"]) for subj in subjects)


def test_persistent_workers_see_a_new_epoch(nsd):
    paths, _ = nsd
    rows = {"subj01": open_betas(paths, "subj01")}
    batches = EpochBatches({"subj01": load_trials(paths, "subj01", "train")}, rows, {}, 5, seed=0)
    loader = DataLoader(batches, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        expected = [batches[i]["image_ids"].tolist() for i in range(len(batches))]
        assert [batch["image_ids"].tolist() for batch in loader] == expected


def test_a_row_of_nan_is_named(nsd):
    paths, _ = nsd
    trials = load_trials(paths, "subj02", "train")
    bad = int(trials["row"].iloc[7])
    with h5py.File(paths.betas("subj02"), "r+") as file:
        file["betas"][bad, 3] = np.nan
    batches = EpochBatches({"subj02": trials}, {"subj02": open_betas(paths, "subj02")}, {}, 6, seed=0)
    with pytest.raises(utils.UserError, match=f"betas_all_subj02.*row {bad} "):
        [batches[i] for i in range(len(batches))]


def test_batches_that_can_not_be():
    two = {"subj01": table(np.arange(5)), "subj02": table(np.arange(5))}
    with pytest.raises(utils.UserError, match="--batch_size 1: fewer than the 2 subjects"):
        planner(two, 1)
    with pytest.raises(utils.UserError, match="subj02: no trials"):
        planner({**two, "subj02": table(np.arange(0))}, 4)


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


# --- test set -----------------------------------------------------------------------------------------------------


def test_test_set_is_the_mean_over_the_repeats_that_exist(nsd):
    paths, shown = nsd
    shown = shown["subj01"].copy()
    behav = np.zeros((0, 17))
    rows = [row for row in range(len(shown)) if shown[row] in tiny_nsd.SHARED]
    del rows[rows.index(np.flatnonzero(shown == 5)[1])]  # image 5 keeps two repeats
    for row in rows[::-1]:
        line = np.zeros((1, 17))
        line[0, [tiny_nsd.IMAGE_ID, tiny_nsd.SESSION, tiny_nsd.TRIAL, tiny_nsd.IS_SHARED]] = shown[row], 1, row, 1
        behav = np.concatenate([behav, line])
    tiny_nsd.write_tar(paths.data_path / "wds/subj01/new_test/0.tar", behav)
    test = load_test_set(paths, "subj01")
    betas = read(paths.betas("subj01"), "betas")
    np.testing.assert_array_equal(test.image_ids, [3, 5, 11, 20])
    np.testing.assert_array_equal(test.n_repeats, [3, 2, 3, 3])
    for image_id, mean in zip(test.image_ids, test.betas, strict=True):
        wanted = np.mean([betas[row] for row in rows if shown[row] == image_id], axis=0)
        np.testing.assert_allclose(mean, wanted, rtol=1e-5, atol=1e-6)
    assert test.betas.dtype == np.float32 and test.image_ids.dtype == np.int64

    single = load_test_set(paths, "subj01", repeats="single")
    np.testing.assert_array_equal(single.image_ids, test.image_ids)
    np.testing.assert_array_equal(single.n_repeats, [1, 1, 1, 1])
    first = [min(row for row in rows if shown[row] == image_id) for image_id in single.image_ids]
    np.testing.assert_array_equal(single.betas, betas[first])


def test_the_old_test_split(nsd):
    paths, shown = nsd
    behav = np.zeros((2, 17))
    rows = np.flatnonzero(shown["subj01"] == 11)[:2]
    behav[:, tiny_nsd.IMAGE_ID], behav[:, tiny_nsd.TRIAL], behav[:, tiny_nsd.IS_SHARED] = 11, rows, 1
    tiny_nsd.write_tar(paths.data_path / "wds/subj01/test/0.tar", behav)
    old, new = (load_test_set(paths, "subj01", split=split) for split in ("test", "new_test"))
    assert old.image_ids.tolist() == [11] and old.n_repeats.tolist() == [2] and new.n_repeats.tolist() == [3] * 4
    with pytest.raises(utils.UserError, match="wds/subj02/test/0.tar: shard not found"):
        load_test_set(paths, "subj02", split="test")


def test_a_shared_image_does_not_train_and_no_other_tests(nsd):
    paths, shown = nsd
    behav = np.zeros((1, 17))
    for folder, split, image_id in (("train/1", "train", 11), ("new_test/0", "new_test", 4)):
        row = np.flatnonzero(shown["subj01"] == image_id)[0]
        behav[0, [tiny_nsd.IMAGE_ID, tiny_nsd.TRIAL, tiny_nsd.IS_SHARED]] = image_id, row, split == "train"
        tiny_nsd.write_tar(paths.data_path / f"wds/subj01/{folder}.tar", behav)
        with pytest.raises(utils.UserError, match=rf"{split}: trial {row} and 0 others show .*\(id {image_id}\)"):
            load_trials(paths, "subj01", split)


def test_null_controls(nsd):
    paths, shown = nsd
    betas, shown = read(paths.betas("subj01"), "betas"), shown["subj01"]
    real = load_test_set(paths, "subj01")
    trials = np.flatnonzero(np.isin(shown, tiny_nsd.SHARED))

    mean = load_test_set(paths, "subj01", "mean")
    np.testing.assert_allclose(mean.betas, np.tile(betas[trials].mean(0), (4, 1)), rtol=1e-5, atol=1e-6)

    for control in ("shuffle", "noise", "mean"):
        null = load_test_set(paths, "subj01", control, seed=3)
        np.testing.assert_array_equal(null.image_ids, real.image_ids)
        np.testing.assert_array_equal(null.n_repeats, real.n_repeats)
        assert null.betas.shape == real.betas.shape and null.betas.dtype == np.float32
        assert not np.allclose(null.betas, real.betas)
        np.testing.assert_array_equal(null.betas, load_test_set(paths, "subj01", control, seed=3).betas)
    shuffled = [load_test_set(paths, "subj01", "shuffle", seed=seed) for seed in (3, 4)]
    assert not np.array_equal(shuffled[0].betas, shuffled[1].betas)
    # every test trial is used once: the means weighted by their repeats add up to the same
    np.testing.assert_allclose((shuffled[0].betas * 3).sum(0), betas[trials].sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_trials_all_leave_their_image(seed):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(6), [3, 3, 2, 1, 3, 2])
    permutation = move_to_other_images(owner, rng)
    assert sorted(permutation) == list(range(len(owner)))
    assert (owner[permutation] != owner).all()


def test_shuffle_of_too_few_images():
    with pytest.raises(utils.UserError, match="--control shuffle"):
        move_to_other_images(np.array([0, 0, 0, 1]), np.random.default_rng(0))


def test_noise_has_the_voxels_mean_and_spread():
    rng = np.random.default_rng(0)
    betas = (rng.standard_normal((4000, 3)) * [1, 5, 0.2] + [0, 3, -7]).astype(np.float32)
    noise = null_responses(betas, np.arange(4000), "noise", rng)
    np.testing.assert_allclose(noise.mean(0), betas.mean(0), atol=0.4)
    np.testing.assert_allclose(noise.std(0), betas.std(0), rtol=0.05)
    assert abs(np.corrcoef(noise[:, 1], betas[:, 1])[0, 1]) < 0.1


def test_shards_are_unpacked_once(nsd, monkeypatch):
    paths, _ = nsd
    first = load_trials(paths, "subj01", "train", 2)
    read, unpacked = read_shard, []
    monkeypatch.setattr("nsd.trials.read_shard", lambda path: (unpacked.append(path.name), read(path))[1])
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
