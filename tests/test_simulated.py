"""Simulated responses: which stimuli, what noise, and what a decoder trained on them reads."""

import json

import h5py
import numpy as np
import pytest
import torch

import score_gnet
import train_c
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from encoding.encoder import load_encoder
from encoding.simulation import noise_of, residuals
from nsd.components import open_components
from nsd.rows import open_betas, open_stimuli
from nsd.simulated import TRIALS, JoinedRows, stimuli_to_simulate
from nsd.trials import load_trials, split_trials
from tiny_brain import RUN, V, write_brain
from tiny_nsd import N_IMAGES, SHARED, read_hdf5
from tiny_runs import copy_world, train, write_features
from training.runs import open_component_run
from training.settings import Plan

SPLIT = (3, 0.3, 42)  # of the tiny brain's GNet: sessions, share of validation images, seed
NETWORK = ["--model", "components", "--num_epochs", 2, "--val_fraction", 0.3, "--seed", 42]


def simulate(paths, *flags):
    words = ["--root", paths.root, "--device", "cpu", *flags]
    return utils.run_cli(score_gnet.main, list(map(str, words)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny brain, features of its images, and simulated trials of six stimuli."""
    paths = write_brain(tmp_path_factory.mktemp("world"))
    write_features(paths)
    assert simulate(paths, "--synthetic", 6) == 0
    return paths


@pytest.fixture
def encoder(world):
    return load_encoder(world, "subj01", None, 42, torch.device("cpu"))


def responses_file(paths):
    return paths.simulated("subj01", 3) / "responses.hdf5"


def test_stimuli_are_those_nobody_tests_on_and_the_subject_never_saw(world):
    own = load_trials(world, "subj01", "train")["image_id"].unique()
    wanted = [i for i in range(N_IMAGES) if i not in own and i not in SHARED]
    assert list(stimuli_to_simulate(world, "subj01", N_IMAGES)) == wanted and len(wanted) == 10
    ids = read_hdf5(responses_file(world), "image_ids")
    assert len(set(ids)) == 6 and set(ids) <= set(wanted) and np.array_equal(ids, np.repeat(ids[::TRIALS], TRIALS))


def test_responses_are_predictions_and_whole_rows_of_measured_noise(world, encoder):
    """Without what the network itself predicts, each row is what it misses in one training trial, scaled by voxel."""
    file = responses_file(world)
    ids, betas = read_hdf5(file, "image_ids"), read_hdf5(file, "betas")
    pictures = torch.from_numpy(open_stimuli(world)[ids]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        drawn = betas - encoder.model(pictures, "subj01").numpy()
    train, val = split_trials(world, "subj01", *SPLIT)
    missed = open_betas(world, "subj01")[train["row"].to_numpy()]
    with torch.no_grad():
        pictures = torch.from_numpy(open_stimuli(world)[train["image_id"].to_numpy()]).permute(0, 3, 1, 2) / 255
        missed = missed - encoder.model(pictures, "subj01").numpy()
    scale = np.sqrt((residuals(encoder, world, val) ** 2).mean(0) / (missed**2).mean(0))
    distance = np.abs(drawn[:, None] - (missed * scale)[None]).max(-1)
    assert distance.min(1).max() < 1e-4
    assert len(set(distance.argmin(1))) > 6  # not one and the same row
    assert 0.35 < np.sqrt((noise_of(encoder, world) ** 2).mean()) < 0.65  # the tiny brain's is .5


def test_noise_comes_from_as_many_trials_as_asked(world, encoder):
    train, _ = split_trials(world, "subj01", *SPLIT)
    few, every = residuals(encoder, world, train, 4), residuals(encoder, world, train)
    assert few.shape == (4, V) and every.shape == (len(train), V)
    np.testing.assert_allclose(few[[0, -1]], every[[0, -1]], atol=1e-5)


def test_joined_rows_are_both_in_any_order():
    rng = np.random.default_rng(0)
    measured, simulated = (rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 3))
    rows = rng.permutation([*range(8), 2, 7])

    class Few(np.ndarray):
        path = "few"

    joined = JoinedRows(measured.view(Few), simulated.view(Few))
    np.testing.assert_array_equal(joined[rows], np.concatenate([measured, simulated])[rows])
    np.testing.assert_array_equal(joined[np.array([1])], measured[[1]])
    assert joined.shape == (8, 4) == (len(joined), 4)


def test_a_training_reads_them_beside_the_measured_trials(world):
    """Every epoch has each trial of both once, with its own image's coefficients; validation is as without them."""
    def opened(*flags):
        words = ["--root", world.root, "--subj", 1, "--num_sessions", 3, "--num_workers", 0, "--device", "cpu",
                 "--hidden_dim", 8, "--batch_size", 9, *NETWORK, *flags]
        return open_component_run(Plan.from_args(train_c.get_parser().parse_args(list(map(str, words)))), "c", ["c"])[0]

    plain, more = opened(), opened("--synthetic", 5, "--tag", "more")
    ids, betas = read_hdf5(responses_file(world), "image_ids")[:15], read_hdf5(responses_file(world), "betas")
    coefficients = open_components(world, "c").coefficients
    assert more.sizes == [plain.sizes[0] + 15, plain.sizes[1]]
    seen = []
    for batch in (more.train[i] for i in range(len(more.train))):
        seen += batch["image_ids"].tolist()
        np.testing.assert_array_equal(batch["targets"]["c"], coefficients[batch["image_ids"]])
        for image_id, response in zip(batch["image_ids"].tolist(), batch["voxels"]["subj01"].numpy(), strict=True):
            if image_id in ids:  # the mean of one, two or all three of its trials
                a, b, c = betas[:15][ids == image_id]
                means = np.stack([a, b, c, (a + b) / 2, (a + c) / 2, (b + c) / 2, (a + b + c) / 3])
                assert np.abs(means - response).max(1).min() < 1e-5
    trained = plain.tables["train"]["subj01"]["image_id"].tolist()
    assert sorted(seen) == sorted([*trained, *ids])
    np.testing.assert_array_equal(more.val[0]["voxels"]["subj01"], plain.val[0]["voxels"]["subj01"])


def test_a_run_says_what_it_was_made_from_and_is_kept_or_refused(world, tmp_path, capsys):
    paths, flags = copy_world(world, tmp_path), [*NETWORK, "--tag", "more", "--synthetic", 6]
    assert train(paths, *flags) == 0
    folder = paths.run("scratch_subj01_3sess_ext1_c_8_mlp_more")
    config = json.loads((folder / "config.json").read_text())
    assert config["synthetic"] == 6 and "simulated responses" in config["made_from"]
    assert simulate(paths, "--synthetic", 6) == 0 and "kept" in capsys.readouterr().out
    assert train(paths, *flags, "--resume") == 0 and "already finished" in capsys.readouterr().out
    assert simulate(paths, "--synthetic", 7) == 2 and "--overwrite" in capsys.readouterr().err
    assert simulate(paths, "--synthetic", 7, "--overwrite") == 0
    assert train(paths, *flags, "--resume") == 2 and "simulated responses" in capsys.readouterr().err


def test_pretraining_and_ridge_do_without(world, tmp_path):
    paths = copy_world(world, tmp_path)
    for stage in (["--multi_subject"], ["--model", "ridge"]):
        flags = [*NETWORK, *stage] if stage[0] == "--multi_subject" else [*NETWORK[2:], *stage]
        assert train(paths, *flags, "--synthetic", 6) == 0
    for folder in (paths.root / "train_logs").glob("*_c*"):
        config = json.loads((folder / "config.json").read_text())
        assert "synthetic" not in config and "simulated responses" not in config["made_from"]


@pytest.mark.parametrize("flags, wanted", [
    (["--synthetic", "7"], "holds 6 stimuli"), (["--synthetic", "-1"], "--synthetic -1"),
    (["--synthetic", "3", "--seed", "1"], "seed 42, wanted 1"),
    (["--synthetic", "3", "--val_fraction", "0.2"], "val_fraction 0.3, wanted 0.2"),
    (["--synthetic", "3", "--num_sessions", "2"], "gnet_2sess_synthetic"),
    (["--synthetic", "3", "--model", "mindeye2"], "--model components"),
    (["--synthetic", "3", "--hold_out", "1/2"], "--hold_out"),
])
def test_what_would_mislead_is_refused(world, flags, wanted, capsys):
    assert train(world, *NETWORK, "--tag", "wrong", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert wanted in err and "\n" not in err


def test_responses_of_other_voxels_are_refused(world, tmp_path, capsys):
    paths = copy_world(world, tmp_path)
    with h5py.File(responses_file(paths), "r+") as file:
        betas = file["betas"][:, :5]
        del file["betas"]
        file["betas"] = betas
    assert train(paths, *NETWORK, "--tag", "wrong", "--synthetic", 3) == 2
    assert f"5 voxels, the betas have {V}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, wanted", [
    (["--synthetic", "11"], "wanted 1..10"), (["--synthetic", "0"], "wanted 1..10"),
    (["--synthetic", "3", "--outdir", "elsewhere"], "--outdir"),
    (["--synthetic", "3", "--gnet_run", "gnet_joint"], "gnet_joint"),
])
def test_what_cannot_be_simulated_is_refused(world, flags, wanted, capsys):
    file = world.run("gnet_joint") / "best.pth"
    if not file.exists():
        state = load_checkpoint(world.run(RUN) / "best.pth")
        del state["config"]["num_sessions"]
        save_checkpoint(file, state)
    assert simulate(world, *flags) == 2
    err = capsys.readouterr().err.strip()
    assert wanted in err and "\n" not in err
