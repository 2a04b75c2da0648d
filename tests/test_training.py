"""Training runs on a tiny data set: resume, refuse, pretrain, fine-tune, score."""

import json

import h5py
import numpy as np
import pytest
import torch

import score_c
import train_c
import train_g
import training
import utils
from models import BrainModel
from tiny_nsd import N_IMAGES, N_VOXELS, SHARED, write_tiny_nsd

SMALL = ["--hidden_dim", "8", "--n_blocks", "1", "--prior_depth", "1", "--batch_size", "6", "--num_workers", "0",
         "--device", "cpu", "--num_sessions", "3", "--val_fraction", "0.2"]
PRETRAINED, FINETUNED = "multisubject_subj01_ext1_c_8_mlp", "pretrained_subj01_3sess_ext1_c_8_mlp"


@pytest.fixture
def paths(tmp_path):
    paths, _ = write_tiny_nsd(tmp_path)
    rng = np.random.default_rng(1)
    for feat, shape in (("c", (3, 6)), ("g_2", (2, 4))):
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = 5 * rng.standard_normal((N_IMAGES, np.prod(shape))).astype(np.float16)
            file["data"].attrs["shape"] = shape
    return paths


def train(paths, *flags, script=train_c):
    return utils.run_cli(script.main, [*SMALL, "--root", str(paths.root), *map(str, flags)])


def weights(paths, run):
    return utils.load_checkpoint(paths.run(run) / "last.pth")["model"]


def test_a_resumed_run_equals_an_uninterrupted_one(paths, monkeypatch):
    run = "scratch_subj01_3sess_ext1_c_8_mlp"
    assert train(paths, "--num_epochs", 4) == 0
    whole = weights(paths, run)
    metrics = (paths.run(run) / "metrics.jsonl").read_text().splitlines()

    class Stop(Exception):
        pass

    run_epoch = training.run_epoch

    def stop_in_the_third_epoch(model, objective, batches, epoch, *args, **kwargs):
        if epoch == 2:
            raise Stop
        return run_epoch(model, objective, batches, epoch, *args, **kwargs)

    monkeypatch.setattr(training, "run_epoch", stop_in_the_third_epoch)
    with pytest.raises(Stop):
        train(paths, "--num_epochs", 4, "--overwrite")
    monkeypatch.setattr(training, "run_epoch", run_epoch)
    assert utils.load_checkpoint(paths.run(run) / "last.pth")["epoch"] == 2
    assert train(paths, "--num_epochs", 4, "--resume") == 0
    resumed = weights(paths, run)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    again = (paths.run(run) / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(again)["val/loss"] == json.loads(metrics[3])["val/loss"]


def test_an_unfinished_run_needs_the_users_word_and_a_finished_one_is_kept(paths, capsys):
    assert train(paths, "--num_epochs", 1) == 0
    assert train(paths, "--num_epochs", 1) == 0 and "finished before" in capsys.readouterr().out
    assert train(paths, "--num_epochs", 1, "--max_lr", 1e-2) == 2
    assert "max_lr 0.0003 -> 0.01" in capsys.readouterr().err
    checkpoint = paths.run("scratch_subj01_3sess_ext1_c_8_mlp") / "last.pth"
    utils.save_checkpoint(checkpoint, {**utils.load_checkpoint(checkpoint), "epoch": 0})
    assert train(paths, "--num_epochs", 1) == 2 and "--resume" in capsys.readouterr().err


def test_finetuning_starts_from_the_pretrained_trunk_and_a_new_head(paths, capsys):
    assert train(paths, "--multi_subject", "--num_epochs", 1) == 0
    assert set(utils.load_checkpoint(paths.run(PRETRAINED) / "last.pth")["n_voxels"]) == {"subj02"}
    # a step of size zero leaves the weights where fine-tuning began
    assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 1, "--max_lr", 1e-30) == 0
    assert "starts anew" in capsys.readouterr().out
    before, after = weights(paths, PRETRAINED), weights(paths, FINETUNED)
    trunk = [key for key in after if not key.startswith("voxelenc.")]
    assert trunk and all(torch.allclose(before[key], after[key]) for key in trunk)
    assert after["voxelenc.linears.0.weight"].shape == (8, N_VOXELS["subj01"])


def test_the_loss_falls(paths):
    assert train(paths, "--num_epochs", 30, "--max_lr", 3e-3, "--clip_scale", 0) == 0
    run = paths.run("scratch_subj01_3sess_ext1_c_8_mlp")
    loss = [json.loads(line)["train/loss_prior"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert loss[-1] < 0.8 * loss[0]


def test_scores_do_not_depend_on_the_batch_size(paths):
    assert train(paths, "--multi_subject", "--num_epochs", 1) == 0
    assert train(paths, "--multisubject_ckpt", PRETRAINED, "--num_epochs", 1) == 0
    flags = ["--root", str(paths.root), "--hidden_dim", "8", "--num_sessions", "3", "--device", "cpu"]
    found = []
    for batch_size in ("1", "100"):
        assert utils.run_cli(score_c.main, [*flags, "--batch_size", batch_size, "--overwrite"]) == 0
        ids, scores = utils.load_scores(paths.scores("subj01", FINETUNED, "c"))
        assert ids.tolist() == SHARED and scores.shape == (len(SHARED), 3, 6)
        found.append(scores)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert utils.run_cli(score_c.main, [*flags, "--control", "shuffle"]) == 0
    _, shuffled = utils.load_scores(paths.scores("subj01", FINETUNED, "c", "shuffle"))
    assert not np.allclose(shuffled, found[0])


def test_several_layers_train_in_one_process(paths, capsys):
    assert train(paths, "--feat", "g_2", "g_2", "--num_epochs", 1, script=train_g) == 0
    assert "finished before" in capsys.readouterr().out
    assert train(paths, "--feat", "g_4", "--num_epochs", 1, script=train_g) == 2
    assert "g_4_all.hdf5" in capsys.readouterr().err


def test_target_statistics_are_those_of_the_training_images(paths):
    target = training.data.open_feature(paths, "c")
    trials = training.data.load_trials(paths, "subj01", "train")
    mean, std = training.target_statistics(target, {"subj01": trials}, seed=0)
    with h5py.File(paths.feature("c")) as file:
        rows = file["data"][np.unique(trials["image_id"])].astype(np.float64).reshape(-1, 3, 6)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-4)
    assert std == pytest.approx(np.sqrt(((rows - rows.mean(axis=0)) ** 2).mean()), rel=1e-4)


def test_no_weight_decay_on_biases_and_norms():
    model = BrainModel({"subj01": 5}, 8, 3, 6, prior_depth=1)
    decayed, free = training.weight_decay_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all("bias" in names[id(p)] or "norm" in names[id(p)] or p.ndim == 1 for p in free["params"])
    assert not any(names[id(p)].endswith(".bias") for p in decayed["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-2, 0.0)


@pytest.mark.parametrize(("flags", "words"), [
    (["--multi_subject", "--multisubject_ckpt", "auto"], "two runs"),
    (["--multisubject_ckpt", "nothing_here"], "nothing_here"),
    (["--num_sessions", 9], "--num_sessions 9"),
    (["--batch_size", 0], "--batch_size 0"),
])
def test_bad_input(paths, capsys, flags, words):
    assert train(paths, "--num_epochs", 1, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and words in error


def test_a_damaged_checkpoint_is_named(paths, capsys):
    assert train(paths, "--num_epochs", 1) == 0
    checkpoint = paths.run("scratch_subj01_3sess_ext1_c_8_mlp") / "last.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert train(paths, "--num_epochs", 1) == 2
    assert "last.pth" in capsys.readouterr().err.strip().splitlines()[-1]


def test_nan_in_the_targets_stops_the_run(paths, capsys):
    with h5py.File(paths.feature("c"), "r+") as file:
        file["data"][:, 0] = np.nan
    assert train(paths, "--num_epochs", 1) == 2
    assert "NaN" in capsys.readouterr().err.strip().splitlines()[-1]
