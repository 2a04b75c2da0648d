"""Test sets: means over repeats, the old split, single trials, null controls."""

import numpy as np
import pytest

import tiny_nsd
import utils
from nsd.repeats import load_test_set, move_to_other_images, null_responses
from tiny_nsd import read_hdf5


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
    betas = read_hdf5(paths.betas("subj01"), "betas")
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


def test_null_controls(nsd):
    paths, shown = nsd
    betas, shown = read_hdf5(paths.betas("subj01"), "betas"), shown["subj01"]
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
