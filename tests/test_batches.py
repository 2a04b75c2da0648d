"""Training batches: every trial once, no image twice in a batch, the rows of its trials."""

from itertools import combinations

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tiny_nsd
import utils
from features.components import write_components
from nsd.batches import EpochBatches
from nsd.components import CoefficientRows, open_components
from nsd.repeats import AveragedRows
from nsd.rows import open_betas, open_feature
from nsd.trials import list_subjects, load_trials
from tiny_nsd import N_VOXELS, read_hdf5, table


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
    betas = {subj: read_hdf5(paths.betas(subj), "betas") for subj in subjects}

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


# --- averages of repeats ------------------------------------------------------------------------------------------


class Numbers:
    """Stands in for Rows of betas: trial t responds with 2**t, so that a mean says which trials it is of."""

    path = "betas.hdf5"

    def __getitem__(self, rows):
        return np.exp2(np.asarray(rows, np.float32))[:, None]


def averaged(tables, seed=0, epoch=0, rank=0, size=1, batch_size=6):
    betas = {subj: Numbers() for subj in tables}
    batches = EpochBatches(tables, betas, {}, batch_size, seed, rank, size, average=True)
    batches.set_epoch(epoch)
    return batches


def subsets_of(rows):
    """{mean response of Numbers: these rows of it}, of every choice among rows (m,)."""
    return {np.add.reduce(np.exp2(some, dtype=np.float32)) / np.float32(n): some
            for n in range(1, len(rows) + 1) for some in combinations(rows.tolist(), n)}


def test_a_row_is_the_mean_of_a_trial_and_some_others_of_its_image():
    """With m trials, 1..m are averaged, each number equally often; another subject's trials never are."""
    image_ids = np.array([4, 9, 4, 4, 9, 7])
    tables = {"subj01": table(image_ids), "subj02": table(image_ids[::-1].copy(), first_row=6)}
    known = {(subj, image_id): subsets_of(group["row"].to_numpy()) for subj, trials in tables.items()
             for image_id, group in trials.groupby("image_id")}
    counts, company = {}, {}
    for epoch in range(400):
        batches, anchors = averaged(tables, epoch=epoch), []
        for index in range(len(batches)):
            batch, plan = batches[index], batches.plan()
            for subj, trials in tables.items():
                rows, ids = trials["row"].to_numpy(), trials["image_id"].to_numpy()
                for trial, mean in zip(plan[subj][index], batch["voxels"][subj][:, 0].numpy(), strict=True):
                    found = known[subj, ids[trial]][mean]
                    assert rows[trial] in found
                    anchors.append(rows[trial])
                    counts.setdefault((ids == ids[trial]).sum(), []).append(len(found))
                    for other in set(found) - {rows[trial]}:
                        company[rows[trial], other] = company.get((rows[trial], other), 0) + 1
        assert sorted(anchors) == list(range(12))  # each trial once, as ever
    assert set(counts[1]) == {1}
    for m in (2, 3):
        share = np.bincount(counts[m], minlength=m + 1)[1:] / len(counts[m])
        np.testing.assert_allclose(share, np.full(m, 1 / m), atol=0.05)
    assert all(abs(n / 400 - 0.5) < 0.1 for n in company.values()) and len(company) == 2 * (6 + 2)


def test_averages_depend_on_seed_epoch_and_batch_alone():
    rng = np.random.default_rng(0)
    tables = {"subj01": table(rng.permutation(np.repeat(np.arange(7), 3))), "subj02": table(np.repeat(np.arange(9), 2))}

    def batch(index=2, **settings):
        return {subj: rows.tolist() for subj, rows in averaged(tables, **settings)[index]["voxels"].items()}

    assert batch() == batch() and batch() != batch(seed=1) and batch() != batch(epoch=1) and batch() != batch(index=3)
    batches = averaged(tables)
    same = {subj: np.arange(6) for subj in tables}  # trials that are drawn for, whichever batch it is
    assert len({tuple(batches._draw(same, index)["subj01"][1]) for index in range(5)}) > 2
    resumed = averaged(tables, epoch=5)
    for epoch in (5, 0):
        resumed.set_epoch(epoch)
    assert {subj: rows.tolist() for subj, rows in resumed[2]["voxels"].items()} == batch()
    for index in range(len(resumed)):
        whole = batch(index)
        joint = [(subj, mean) for subj, rows in whole.items() for mean in rows]
        for rank in range(3):
            own = [(subj, mean) for subj, rows in batch(index, rank=rank, size=3).items() for mean in rows]
            assert own == joint[rank::3]


def test_without_average_trials_stay_single(nsd):
    paths, _ = nsd
    trials, betas = load_trials(paths, "subj01", "train"), open_betas(paths, "subj01")
    single, mean = (EpochBatches({"subj01": trials}, {"subj01": betas}, {}, 5, seed=0, average=average)
                    for average in (False, True))
    rows, groups = trials["row"].to_numpy(), trials.groupby("image_id")["row"]
    for index in range(len(single)):
        chosen = single.plan()["subj01"][index]
        np.testing.assert_array_equal(single[index]["voxels"]["subj01"], betas[rows[chosen]])
        for trial, voxels in zip(chosen, mean[index]["voxels"]["subj01"].numpy(), strict=True):
            others = [row for row in groups.get_group(trials["image_id"][trial]) if row != rows[trial]]
            subsets = [[rows[trial], *some] for n in range(len(others) + 1) for some in combinations(others, n)]
            assert any(np.allclose(voxels, betas[subset].mean(0), atol=1e-6) for subset in subsets)
    assert single[0]["image_ids"].tolist() == mean[0]["image_ids"].tolist()  # the plan is the same


def test_a_subject_may_miss_in_a_batch(nsd):
    """Of a subject with one image, averaged over its repeats, most batches have no row."""
    paths, _ = nsd
    trials = {subj: load_trials(paths, subj, "train") for subj in list_subjects(paths)}
    trials["subj02"] = trials["subj02"][trials["subj02"]["image_id"] == trials["subj02"]["image_id"].iloc[0]]
    rows = {subj: AveragedRows(open_betas(paths, subj), table) for subj, table in trials.items()}
    batches = EpochBatches({subj: averaged.table for subj, averaged in rows.items()}, rows, {}, 6, seed=0)
    found = [batches[i]["voxels"]["subj02"] for i in range(len(batches))]
    assert sorted(map(len, found)) == [0] * (len(batches) - 1) + [1]
    n_voxels = N_VOXELS["subj02"]
    assert {part.shape[1:] for part in found} == {(n_voxels,)}
    expected = open_betas(paths, "subj02")[trials["subj02"]["row"].to_numpy()].mean(0)
    np.testing.assert_allclose(torch.cat(found)[0], expected, rtol=1e-5, atol=1e-6)


def test_more_processes_than_rows(nsd):
    """A process that has no row of a batch reads rows of the right shape, none of them."""
    paths, _ = nsd
    write_components_of_noise(paths)
    trials = load_trials(paths, "subj01", "train")
    one = trials[trials["image_id"] == trials["image_id"].iloc[0]]
    averaged, known = AveragedRows(open_betas(paths, "subj01"), one), open_components(paths, "c")
    read = [EpochBatches({"subj01": averaged.table}, {"subj01": averaged}, {"c": CoefficientRows(known)}, 6, seed=0,
                         rank=rank, size=3)[0] for rank in range(3)]
    assert [len(item["voxels"]["subj01"]) for item in read] == [1, 0, 0] == [len(item["targets"]["c"]) for item in read]
    assert {item["targets"]["c"].shape[1] for item in read} == {known.k}
    assert all(item["image_ids"].tolist() == [one["image_id"].iloc[0]] for item in read)


def write_components_of_noise(paths):
    with h5py.File(paths.feature("c"), "w") as file:
        file["data"] = np.random.default_rng(1).standard_normal((tiny_nsd.N_IMAGES, 6)).astype(np.float16)
        file["data"].attrs["shape"] = (2, 3)
    write_components(paths, "c")


def test_a_target_that_is_not_finite_is_named(nsd):
    paths, _ = nsd
    trials = load_trials(paths, "subj02", "train")
    bad = int(trials["image_id"].iloc[7])
    with h5py.File(paths.feature("c"), "w") as file:
        file["data"] = np.where(np.arange(tiny_nsd.N_IMAGES) == bad, np.inf, 1.0)[:, None].repeat(6, 1)
        file["data"].attrs["shape"] = (2, 3)
    batches = EpochBatches({"subj02": trials}, {"subj02": open_betas(paths, "subj02")},
                           {"target": open_feature(paths, "c")}, 6, seed=0)
    with pytest.raises(utils.UserError, match=f"c_all.hdf5: image id {bad} holds NaN"):
        [batches[i] for i in range(len(batches))]


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
