"""Simulated responses: which stimuli, what noise, and what a decoder trained on them reads."""

import json

import h5py
import numpy as np
import pytest
import torch

import score_gnet
import train_c
import train_gnet
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from encoding.encoder import load_encoder
from encoding.simulation import noise_of, residuals
from nsd.components import open_components
from nsd.rows import open_betas, open_stimuli
from nsd.simulated import TRIALS, stimuli_to_simulate
from nsd.trials import load_trials, split_trials
from tiny_brain import RUN, V, write_brain
from tiny_nsd import N_IMAGES, SHARED, read_hdf5
from tiny_runs import SHAPES, copy_world, train, write_features
from training.runs import open_component_run
from training.settings import Plan

SPLIT = (3, 0.3, 42)  # of the tiny brain's GNet: sessions, share of validation images, seed
STAGE = "synthetic_subj01_3sess_ext1_c_8_mlp"
NETWORK = ["--model", "components", "--num_epochs", 2, "--val_fraction", 0.3, "--seed", 42]


def simulate(paths, *flags):
    words = ["--root", paths.root, "--device", "cpu", *flags]
    return utils.run_cli(score_gnet.main, list(map(str, words)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny brain, features of its images, and simulated trials of six stimuli."""
    paths = write_brain(tmp_path_factory.mktemp("world"))
    write_features(paths, SHAPES, spread=5)
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
    """Without what the network itself predicts, each row is what it misses in one training trial, scaled."""
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
    scale = np.sqrt((residuals(encoder, world, val) ** 2).mean() / (missed**2).mean())
    distance = np.abs(drawn[:, None] - (missed * scale)[None]).max(-1)
    assert distance.min(1).max() < 1e-4
    assert len(set(distance.argmin(1))) > 6  # not one and the same row
    assert 0.35 < np.sqrt((noise_of(encoder, world) ** 2).mean()) < 0.65  # the tiny brain's is .5


def test_noise_comes_from_as_many_trials_as_asked(world, encoder):
    train, _ = split_trials(world, "subj01", *SPLIT)
    few, every = residuals(encoder, world, train, 4), residuals(encoder, world, train)
    assert few.shape == (4, V) and every.shape == (len(train), V)
    np.testing.assert_allclose(few[[0, -1]], every[[0, -1]], atol=1e-5)


def opened(paths, *flags):
    """The Run of a training of c that these flags mean."""
    words = ["--root", paths.root, "--subj", 1, "--num_sessions", 3, "--num_workers", 0, "--device", "cpu",
             "--hidden_dim", 8, "--batch_size", 9, *NETWORK, *flags]
    return open_component_run(Plan.from_args(train_c.get_parser().parse_args(list(map(str, words)))), "c", ["c"])[0]


def test_a_training_reads_them_in_place_of_measured_trials(world):
    """Every epoch has each trial once, with its own image's coefficients; validation is on measured ones, as ever."""
    run = opened(world, "--synthetic", "--tag", "unused")
    ids, betas = (read_hdf5(responses_file(world), name) for name in ("image_ids", "betas"))
    coefficients, seen = open_components(world, "c").coefficients, []
    for batch in (run.train[i] for i in range(len(run.train))):
        seen += batch["image_ids"].tolist()
        np.testing.assert_array_equal(batch["targets"]["c"], coefficients[batch["image_ids"]])
        for image_id, response in zip(batch["image_ids"].tolist(), batch["voxels"]["subj01"].numpy(), strict=True):
            a, b, c = betas[ids == image_id]
            means = np.stack([a, b, c, (a + b) / 2, (a + c) / 2, (b + c) / 2, (a + b + c) / 3])
            assert np.abs(means - response).max(1).min() < 1e-5
    assert sorted(seen) == sorted(ids)
    plain = opened(world)
    assert plain.sizes[1] == run.sizes[1]
    np.testing.assert_array_equal(run.val[0]["voxels"]["subj01"], plain.val[0]["voxels"]["subj01"])


@pytest.fixture(scope="module")
def simulated(world, tmp_path_factory):
    """A copy of the world with a training on its simulated trials."""
    paths = copy_world(world, tmp_path_factory.mktemp("simulated"))
    assert train(paths, *NETWORK, "--synthetic") == 0
    return paths


def test_fine_tuning_goes_on_with_the_same_voxel_encoder(simulated, tmp_path, capsys):
    paths = copy_world(simulated, tmp_path)
    start = load_checkpoint(paths.run(STAGE) / "last.pth")["model"]
    assert train(paths, *NETWORK, "--multisubject_ckpt", "synthetic", "--max_lr", 1e-12) == 0
    assert f"copied from {STAGE} (all of them)" in capsys.readouterr().out
    state = load_checkpoint(paths.run("pretrained_subj01_3sess_ext1_c_8_mlp") / "last.pth")
    for name, weight in state["model"].items():
        torch.testing.assert_close(weight, start[name], atol=1e-5, rtol=0)
    assert any(what == f"run {STAGE}" for what in state["config"]["made_from"])


def test_epochs_without_a_flag(simulated):
    """One of simulated trials; after them as many as of all sessions; otherwise few sessions are seen more often."""
    def epochs(*flags, script=train_c):
        words = ["--root", str(simulated.root), "--num_sessions", "1", *flags]
        return script.get_parser().parse_args(words).num_epochs

    assert [epochs("--synthetic"), epochs("--multisubject_ckpt", "synthetic"), epochs("--multisubject_ckpt", STAGE),
            epochs()] == [1, 12, 12, 76]
    assert epochs(script=train_gnet) == round(30 * 40 ** 0.5) and epochs("--multi_subject", script=train_gnet) == 30


def test_a_run_says_what_it_was_made_from_and_is_kept_or_refused(simulated, tmp_path, capsys):
    paths = copy_world(simulated, tmp_path)
    config = json.loads((paths.run(STAGE) / "config.json").read_text())
    assert config["stage"] == "synthetic" and "simulated responses" in config["made_from"]
    assert simulate(paths, "--synthetic", 6) == 0 and "kept" in capsys.readouterr().out
    assert train(paths, *NETWORK, "--synthetic", "--resume") == 0 and "already finished" in capsys.readouterr().out
    assert simulate(paths, "--synthetic", 7) == 2 and "--overwrite" in capsys.readouterr().err
    assert simulate(paths, "--synthetic", 7, "--overwrite") == 0
    assert train(paths, *NETWORK, "--synthetic", "--resume") == 2 and "simulated resp" in capsys.readouterr().err


def test_a_finished_run_does_not_need_them_any_more(simulated, tmp_path, capsys):
    paths = copy_world(simulated, tmp_path)
    responses_file(paths).unlink()
    assert train(paths, *NETWORK, "--synthetic", "--resume") == 0 and "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_does_not_matter(world, tmp_path, batch_size):
    paths = copy_world(world, tmp_path)
    assert simulate(paths, "--synthetic", 6, "--overwrite", "--batch_size", batch_size) == 0
    found, wanted = (read_hdf5(responses_file(root), "betas") for root in (paths, world))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("flags, wanted", [
    (["--seed", "1"], "seed 42, wanted 1"), (["--val_fraction", "0.2"], "val_fraction 0.3, wanted 0.2"),
    (["--num_sessions", "2"], "gnet_2sess_synthetic"), (["--model", "mindeye2"], "--synthetic"),
    (["--model", "ridge"], "--synthetic"), (["--hold_out", "1/2"], "--hold_out"),
    (["--multi_subject"], "--synthetic"), (["--subj", "2"], "gnet_3sess_synthetic"),
])
def test_what_would_mislead_is_refused(world, flags, wanted, capsys):
    assert train(world, *NETWORK, "--tag", "wrong", "--synthetic", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert wanted in err and "\n" not in err


@pytest.mark.parametrize("flags, wanted", [
    (["--multisubject_ckpt", STAGE, "--seed", "1"], "seed 42, wanted 1"),
    (["--multisubject_ckpt", STAGE, "--num_sessions", "2"], "num_sessions 3, wanted 2"),
    (["--multisubject_ckpt", "synthetic", "--num_sessions", "2"], "STAGES=synthetic"),
])
def test_fine_tuning_from_other_sessions_is_refused(simulated, flags, wanted, capsys):
    assert train(simulated, *NETWORK, "--tag", "wrong", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert wanted in err and "\n" not in err


def test_responses_of_other_voxels_are_refused(world, tmp_path, capsys):
    paths = copy_world(world, tmp_path)
    with h5py.File(responses_file(paths), "r+") as file:
        betas = file["betas"][:, :5]
        del file["betas"]
        file["betas"] = betas
    assert train(paths, *NETWORK, "--tag", "wrong", "--synthetic") == 2
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
