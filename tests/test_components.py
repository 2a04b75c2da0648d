"""Components of features against scikit-learn's and NumPy's, on images of no test set; their files, begun and gone on
with."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import utils
from features import components
from features.components import Blocks, fit_components, follow, write_components
from features.files import FeatureFile
from nsd.batches import EpochBatches
from nsd.components import CoefficientRows, open_components
from nsd.repeats import AveragedRows
from nsd.rows import open_betas, open_feature
from nsd.trials import load_trials, shared_images
from tiny_nsd import N_IMAGES, SHARED
from training.team import Team

FREE = np.setdiff1d(np.arange(N_IMAGES), SHARED)  # images that no test set holds


class Array:
    """Rows in memory."""

    def __init__(self, array, path="x_all.hdf5"):
        self.array, self.path, self.row_shape = array, Path(path), array.shape[1:]

    def __getitem__(self, ids):
        return self.array[ids]


def spectrum(n, width, seed=0, power=1.0):
    """Rows (n, width) float32 whose variances fall as a power of the component's number, around a mean far from 0."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((width, width)))[0]
    scales = 3 * np.arange(1, width + 1) ** (-power / 2)
    return (rng.standard_normal((n, width)) * scales @ axes + 10 * rng.standard_normal(width)).astype(np.float32)


def write_feature(paths, feat="g_2", shape=(5, 12), dtype=np.float16, seed=0, attributes=True):
    rows = spectrum(N_IMAGES, int(np.prod(shape)), seed).astype(dtype)
    with h5py.File(paths.feature(feat), "w") as file:
        file["data"] = rows
        file["data"].attrs["shape"] = shape
        if attributes:
            file["data"].attrs.update(model="clip@1", source=f"stimuli{seed}")
    return rows.astype(np.float64)


def largest_angle(a, b):
    """Largest principal angle between the spaces of two orthonormal bases (k, F), as its sine."""
    return np.linalg.norm(b - (b @ a.T) @ a, 2)


# --- the components -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_components_are_those_of_scikit_learn(monkeypatch, exact):
    """In both ways: the covariance's eigenvectors, and iteration from random directions, in blocks of 100 rows."""
    rows = spectrum(450, 300)
    monkeypatch.setattr(components, "EXACT_WIDTH", 300 if exact else 299)
    monkeypatch.setattr(components, "BLOCK", 100)
    fit = fit_components(Array(rows), np.arange(450), k=40)
    wanted = PCA(40, svd_solver="full").fit(rows.astype(np.float64))
    assert fit.basis.shape == (40, 300) and fit.basis.dtype == fit.mean.dtype == np.float32 and fit.n_fitted == 450
    np.testing.assert_allclose(fit.mean, rows.mean(0, dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(fit.basis @ fit.basis.T, np.eye(40), atol=2e-6)
    np.testing.assert_allclose(fit.variances, wanted.explained_variance_ * 449 / 450, rtol=1e-5 if exact else 5e-3)
    assert fit.total == pytest.approx(wanted.explained_variance_.sum() / wanted.explained_variance_ratio_.sum()
                                      * 449 / 450, rel=1e-5)
    assert fit.kept == pytest.approx(wanted.explained_variance_ratio_.sum(), rel=1e-4)
    # the last ones mix with what lies beyond; the strongest are the same directions, one by one
    assert largest_angle(wanted.components_[:30], fit.basis[:30]) < (1e-3 if exact else 0.05)
    overlap = np.abs(np.sum(wanted.components_[:10] * fit.basis[:10], axis=1))
    assert (overlap > 1 - (1e-5 if exact else 1e-3)).all()


def test_few_wide_rows_are_decomposed_to_the_end(monkeypatch):
    """NumPy's SVD; no more components than n - 1, and none of rounding errors, where rows are repeated."""
    monkeypatch.setattr(components, "EXACT_WIDTH", 1)
    rows = spectrum(12, 200)
    fit = fit_components(Array(rows), np.arange(12), k=100)
    _, values, axes = np.linalg.svd(rows - rows.mean(0, dtype=np.float64), full_matrices=False)
    assert len(fit.basis) == 11 and fit.kept == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(fit.variances, values[:11] ** 2 / 12, rtol=1e-3)
    assert largest_angle(axes[:11], fit.basis) < 1e-3
    for exact in (1, 200):
        monkeypatch.setattr(components, "EXACT_WIDTH", exact)
        assert len(fit_components(Array(np.repeat(rows[:4], 3, 0)), np.arange(12), k=100).basis) == 3
        same = fit_components(Array(np.ones((12, 200), np.float32)), np.arange(12), k=5)
        assert same.kept == 1 and same.basis.shape == (1, 200) and np.isfinite(same.basis).all()


def test_blocks_give_what_the_whole_gives(monkeypatch):
    rows, found = spectrum(300, 150), []
    for exact, block in ((150, 300), (150, 7), (1, 300), (1, 7)):
        monkeypatch.setattr(components, "EXACT_WIDTH", exact)
        monkeypatch.setattr(components, "BLOCK", block)
        found.append(fit_components(Array(rows), np.arange(300), k=20))
    for whole, blocks in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(blocks.variances, whole.variances, rtol=1e-4)
        np.testing.assert_allclose(blocks.basis[:10], whole.basis[:10], atol=1e-3)
        assert blocks.total == pytest.approx(whole.total, rel=1e-5)


def test_a_seed_gives_the_same_bits_and_draws_the_images(monkeypatch):
    rows = Array(spectrum(80, 100))
    first, again, other = (fit_components(rows, np.arange(80), 10, seed, max_images=50) for seed in (1, 1, 2))
    assert first.n_fitted == 50
    np.testing.assert_array_equal(first.basis, again.basis)
    assert not np.allclose(first.mean, other.mean, atol=1e-3)
    assert (np.abs(first.basis).max(1) == first.basis.max(1)).all()  # signs do not depend on the machine
    monkeypatch.setattr(components, "EXACT_WIDTH", 1)
    wide = [fit_components(rows, np.arange(80), 10, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(wide[0].basis, wide[1].basis)
    assert not np.array_equal(wide[0].basis, wide[2].basis)


def test_iteration_finds_weak_components_too(monkeypatch):
    """A flat spectrum is the hard case: what is kept is almost what could be."""
    rows = spectrum(1500, 400, power=0.5)
    wanted = fit_components(Array(rows), np.arange(1500), k=100)
    monkeypatch.setattr(components, "EXACT_WIDTH", 1)
    found = fit_components(Array(rows), np.arange(1500), k=100)
    assert wanted.kept - 0.005 < found.kept <= wanted.kept + 1e-6


def test_values_that_are_not_finite_and_too_few_images():
    rows = spectrum(20, 30)
    rows[7, 3] = np.nan
    with pytest.raises(utils.UserError, match="x_all.hdf5: image id 7 holds NaN or infinite values"):
        fit_components(Array(rows), np.arange(20), 5)
    with pytest.raises(utils.UserError, match="x_all.hdf5: 1 images that no test set holds are there, wanted at least"):
        fit_components(Array(rows), np.arange(1), 5)


def test_memory_is_bounded(monkeypatch):
    """The largest array beside the directions and their images is a block."""
    monkeypatch.setattr(components, "BLOCK", 16)
    rows, largest, addmm = Array(spectrum(200, 120)), [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, a, b: largest.append(max(a.numel(), b.numel()))
                        or addmm(self, a, b))
    with utils.progress(disable=True) as bar:
        follow(Blocks(rows, np.arange(200), torch.device("cpu"), bar), 10, 0)
    assert max(largest) <= 120 * (10 + components.OVERSAMPLING)


# --- images of a test set -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_images_of_a_test_set_are_never_fitted_on(nsd, listed):
    """A test image with huge values leaves the basis as it is; any other does not."""
    paths, _ = nsd
    if listed:  # else they are those of the new_test shards of all subjects
        np.save(paths.data_path / "shared1000.npy", np.isin(np.arange(N_IMAGES), SHARED))
    write_feature(paths, dtype=np.float32)

    def basis_with(image_id):
        with h5py.File(paths.feature("g_2"), "r+") as file:
            before = file["data"][image_id]
            file["data"][image_id] = 1e4
            write_components(paths, "g_2", 10, overwrite=True)
            file["data"][image_id] = before
        found = open_components(paths, "g_2")
        assert found.n_fitted == len(FREE)
        return found.basis, found.mean, found.coefficients

    clean = basis_with(SHARED[2])
    write_components(paths, "g_2", 10, overwrite=True)
    for image_id in SHARED:
        planted = basis_with(image_id)
        np.testing.assert_array_equal(planted[0], clean[0])
        np.testing.assert_array_equal(planted[1], clean[1])
        assert np.abs(planted[2][image_id]).max() > 1e3  # its coefficients are written nonetheless
    assert np.abs(basis_with(FREE[0])[0] - clean[0]).max() > 0.1


def test_a_world_that_does_not_say_what_is_tested_on(paths, tmp_path):
    write_feature(paths)
    np.save(paths.data_path / "shared1000.npy", np.zeros(7, bool))
    with pytest.raises(utils.UserError, match=r"shared1000.npy: shape \(7,\), wanted \(24,\)"):
        shared_images(paths, N_IMAGES)
    (paths.data_path / "shared1000.npy").unlink()
    assert shared_images(paths, N_IMAGES).tolist() == SHARED
    (paths.data_path / "wds").rename(tmp_path / "elsewhere")
    with pytest.raises(utils.UserError, match="shared1000.npy: mask of the shared images not found, nor test trials"):
        write_components(paths, "g_2", 10)
    assert not paths.components("g_2").exists()


# --- the file -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(paths, capsys):
    rows = write_feature(paths)
    write_components(paths, "g_2", 10, seed=7)
    found = open_components(paths, "g_2")
    fitted, flat = PCA(10, svd_solver="full").fit(rows[FREE]), open_feature(paths, "g_2")
    printed = f"g_2: 10 components keep {100 * found.kept:.1f} % of the variance (fitted on 20 images)\n"
    assert capsys.readouterr().out == printed
    assert (found.feat, found.shape, found.k, found.n_fitted, found.seed) == ("g_2", (5, 12), 10, 20, 7)
    assert found.source == "clip@1 stimuli0" and len(found) == N_IMAGES
    assert found.kept == pytest.approx(fitted.explained_variance_ratio_.sum(), rel=1e-4)
    assert found.variances.sum() / found.total == pytest.approx(found.kept, rel=1e-5)
    np.testing.assert_allclose(np.abs(found.coefficients), np.abs(fitted.transform(rows)), atol=2e-4)
    np.testing.assert_allclose(found.project(flat[[3, 9]]), found.coefficients[[3, 9]], atol=1e-5)
    wanted = fitted.inverse_transform(fitted.transform(rows[[3, 9]])).reshape(2, 5, 12)
    np.testing.assert_allclose(found.reconstruct(found.coefficients[[3, 9]]), wanted, atol=1e-3)
    np.testing.assert_allclose(found.reconstruct(np.zeros((1, 4)))[0].ravel(), found.mean)  # of fewer components
    assert found.reconstruct(found.coefficients[:1, :4]).shape == (1, 5, 12)
    np.testing.assert_array_equal(found.there(), np.arange(N_IMAGES))
    with h5py.File(paths.components("g_2"), "r") as file:
        assert file["data"].chunks is None and file["data"].dtype == file["basis"].dtype == np.float32


def test_images_that_are_written_later_get_coefficients_and_the_basis_stays(paths, capsys):
    rows = write_feature(paths)
    with h5py.File(paths.feature("g_2"), "r+") as file:
        file["written"] = (np.arange(N_IMAGES) % 2 == 0).astype(np.uint8)
    write_components(paths, "g_2", 5)
    first = open_components(paths, "g_2")
    assert first.n_fitted == len(FREE[FREE % 2 == 0]) and first.there().tolist() == list(range(0, N_IMAGES, 2))
    first.require([2, 4])
    with pytest.raises(utils.UserError, match="g_2_components.hdf5: image id 3 is not written yet, 12 of 24 rows are "
                                              "there; continue with bash scripts/features.sh --feats g_2$"):
        first.require(np.array([2, 3]))
    with pytest.raises(utils.UserError, match="image id 3 is not written yet"):
        CoefficientRows(first)[[3]]
    with h5py.File(paths.feature("g_2"), "r+") as file:
        del file["written"]
    capsys.readouterr()
    write_components(paths, "g_2", 5)
    second = open_components(paths, "g_2")
    assert "g_2_components.hdf5: added 12 images, 24 of 24 have coefficients; 5 components" in capsys.readouterr().out
    assert len(second.there()) == N_IMAGES
    assert second.digest == first.digest
    np.testing.assert_array_equal(second.basis, first.basis)
    np.testing.assert_allclose(second.coefficients, (rows - first.mean) @ first.basis.T.astype(np.float64), atol=1e-4)
    written = paths.components("g_2").stat().st_mtime_ns
    write_components(paths, "g_2", 5)
    assert paths.components("g_2").stat().st_mtime_ns == written
    assert "g_2_components.hdf5: kept, 24 of 24 have coefficients; 5 components keep" in capsys.readouterr().out


@pytest.mark.parametrize("stop", ["while it is fitted", "in the second block", "after the second block's rows"])
def test_a_killed_run_goes_on_and_equals_one_that_was_not(paths, monkeypatch, stop):
    monkeypatch.setattr(components, "BLOCK", 7)
    write_feature(paths)
    write_components(paths, "g_2", 5)
    whole = paths.components("g_2").read_bytes()
    paths.components("g_2").unlink()
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == (1 if "fitted" in stop else 2):
            if "after" in stop:  # its flags are not: they come last
                with h5py.File(paths.components("g_2"), "r+") as file:
                    file["data"][7:14] = 3
            raise KeyboardInterrupt
        return original(*args)

    name, owner = ("decompose", components) if "fitted" in stop else ("write", FeatureFile)
    original = getattr(owner, name)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(owner, name, killed)
        write_components(paths, "g_2", 5)
    assert paths.components("g_2").exists() == ("fitted" not in stop)
    assert [file.name for file in paths.stimuli.glob(".*")] == []
    fits, fit = [], components.fit_components
    monkeypatch.setattr(components, "fit_components", lambda *args, **flags: fits.append(1) or fit(*args, **flags))
    write_components(paths, "g_2", 5)
    assert len(fits) == ("fitted" in stop) and paths.components("g_2").read_bytes() == whole


def test_processes_share_the_blocks(paths, monkeypatch):
    """Each alone, on a file without coefficients: together they write all, each block by one of them, to the bit."""
    monkeypatch.setattr(components, "BLOCK", 5)
    monkeypatch.setattr(Team, "wait", lambda self: None)
    write_feature(paths)
    with monkeypatch.context() as context:
        context.setattr(components, "write_coefficients", lambda *args: None)
        write_components(paths, "g_2", 5)
    empty = paths.components("g_2").read_bytes()
    write_components(paths, "g_2", 5)
    whole, shares = open_components(paths, "g_2").coefficients, []
    for rank in range(3):
        paths.components("g_2").write_bytes(empty)
        write_components(paths, "g_2", 5, team=Team("cpu", rank, 3))
        found = open_components(paths, "g_2")
        shares.append(found.there().tolist())
        np.testing.assert_array_equal(found.coefficients[shares[-1]], whole[shares[-1]])
    assert shares == [[*range(5), *range(15, 20)], [*range(5, 10), *range(20, 24)], list(range(10, 15))]


def test_a_digest_tells_one_basis_from_another(paths):
    digests = []
    for seed, k in ((0, 5), (1, 5), (0, 6), (0, 5)):
        write_feature(paths, seed=seed)
        write_components(paths, "g_2", k, overwrite=True)
        digests.append(open_components(paths, "g_2").digest)
    assert len(set(digests[:3])) == 3 and digests[3] == digests[0]


@pytest.mark.parametrize("attributes", [True, False])
def test_components_of_another_feature_file_are_refused(paths, attributes):
    """By what our files say of themselves, and by the rows of another program's."""
    write_feature(paths, attributes=attributes)
    write_components(paths, "g_2", 5)
    open_components(paths, "g_2")
    write_feature(paths, seed=1, attributes=attributes)
    for act in (lambda: open_components(paths, "g_2"), lambda: write_components(paths, "g_2", 5)):
        with pytest.raises(utils.UserError, match="g_2_components.hdf5: made from a feature file of .*; delete it and"):
            act()
    write_components(paths, "g_2", 5, overwrite=True)
    open_components(paths, "g_2")
    paths.feature("g_2").unlink()
    open_components(paths, "g_2")  # it is not needed to train


def test_what_the_user_can_get_wrong_is_one_line(paths):
    with pytest.raises(utils.UserError, match="g_2_components.hdf5: components of g_2 not found; write them with bash "
                                              "scripts/features.sh --feats g_2$"):
        open_components(paths, "g_2")
    write_feature(paths)
    write_components(paths, "g_2", 5, seed=1)
    with pytest.raises(utils.UserError, match="written with --components 5, wanted 6; give --components 5, or delete"):
        write_components(paths, "g_2", 6, seed=1)
    with pytest.raises(utils.UserError, match="written with --seed 1, wanted 2; give --seed 1, or delete"):
        write_components(paths, "g_2", 5, seed=2)
    file = paths.components("g_2")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-4]):
        file.write_bytes(damaged)
        with pytest.raises(utils.UserError, match="g_2_components.hdf5: .*not readable"):
            open_components(paths, "g_2")
    for name in ("basis", "mean", "written"):
        file.write_bytes(whole)
        with h5py.File(file, "r+") as opened:
            del opened[name]
        if name == "written":
            assert len(open_components(paths, "g_2").there()) == N_IMAGES
            continue
        with pytest.raises(utils.UserError, match="g_2_components.hdf5: not readable as components .*; delete it and"):
            open_components(paths, "g_2")
    with h5py.File(file, "w") as opened:
        opened["data"] = np.zeros((24, 5), np.float32)
    with pytest.raises(utils.UserError, match="not readable as components"):
        open_components(paths, "g_2")


def test_not_enough_disk(paths, monkeypatch):
    write_feature(paths)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(utils.UserError, match="g_2_components.hdf5: needs .* are free"):
        write_components(paths, "g_2", 5)


# --- as targets ---------------------------------------------------------------------------------------------------


def test_coefficients_are_targets_of_batches(paths):
    """Of single trials, and of responses averaged over an image's repeats, as validation is."""
    write_feature(paths)
    write_components(paths, "g_2", 5)
    found, betas, trials = open_components(paths, "g_2"), open_betas(paths, "subj01"), load_trials(
        paths, "subj01", "train")
    targets = {"g_2": CoefficientRows(found), "few": CoefficientRows(found, 2)}
    assert [rows.row_shape for rows in targets.values()] == [(5,), (2,)]
    averaged = AveragedRows(betas, trials)
    for table, rows, n in ((trials, betas, len(trials)), (averaged.table, averaged, 10)):
        batches = EpochBatches({"subj01": table}, {"subj01": rows}, targets, 6, seed=0)
        assert sum(len(batches[i]["image_ids"]) for i in range(len(batches))) == n
        for batch in (batches[i] for i in range(len(batches))):
            ids = batch["image_ids"].numpy()
            np.testing.assert_array_equal(batch["targets"]["g_2"], found.coefficients[ids])
            np.testing.assert_array_equal(batch["targets"]["few"], found.coefficients[ids, :2])
            if rows is averaged:
                np.testing.assert_array_equal(batch["voxels"]["subj01"],
                                              averaged[np.searchsorted(averaged.image_ids, ids)])
