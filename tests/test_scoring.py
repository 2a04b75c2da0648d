"""From a run to scores: whose voxel encoder, null controls, the statistics of z, refusals."""

import json

import h5py
import numpy as np
import pytest
import torch

import score_c
import score_z
import train_c
import train_z
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import archive_hash
from disk.names import scores_name
from disk.scores import load_scores
from models import build_model
from nsd.repeats import load_test_set
from nsd.rows import open_feature
from nsd.trials import load_trials, split_trials
from tiny_nsd import SHARED
from tiny_runs import FINETUNED, PRETRAINED, SCRATCH, checkpoint, stopped_at, train, write_world
from training.loop import make_loader

FLAGS = ["--hidden_dim", "8", "--num_sessions", "3", "--device", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Subject 1 fine-tuned from, and held out of, a pretraining on subject 2: for c and z."""
    paths = write_world(tmp_path_factory.mktemp("world"))
    for script in (train_c, train_z):
        assert train(paths, "--multi_subject", "--num_epochs", 1, "--max_lr", 1e-2, script=script) == 0
        assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 2, script=script) == 0
    return paths


def score(paths, *flags, script=score_c):
    return utils.run_cli(script.main, [*FLAGS, "--root", str(paths.root), *map(str, flags)])


def scores(paths, name, stem="nsdgeneral"):
    ids, values = load_scores(paths.root / "scores_all/subj01" / name, stem)
    assert ids.tolist() == SHARED
    return values


def config(paths, name):
    return json.loads((paths.root / "scores_all/subj01" / name / "config.json").read_text())


def test_scores_do_not_depend_on_the_batch_size(world, capsys):
    found = []
    for batch_size in (1, 100):
        assert score(world, "--batch_size", batch_size, "--overwrite") == 0
        found.append(scores(world, FINETUNED))
    assert found[0].shape == (len(SHARED), 3, 6)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert "the subject's own responses" not in capsys.readouterr().out
    assert score(world, "--control", "shuffle") == 0
    assert capsys.readouterr().out.splitlines()[-1] == ("(of the subject's own responses; --control shuffle is applied "
                                                        "to the test images)")
    assert not np.allclose(scores(world, FINETUNED + "_shuffle"), found[0])


def test_a_score_is_kept_until_its_checkpoint_changes(world, capsys):
    assert score(world, "--overwrite") == 0 and score(world) == 0
    assert "already scored with this checkpoint, kept" in capsys.readouterr().out
    assert score(world, "--checkpoint", "best") == 0
    assert "kept" not in capsys.readouterr().out and config(world, FINETUNED)["checkpoint"] == "best.pth"


def test_own_head_is_the_default_and_the_prediction_is_the_networks(world):
    assert score(world, "--prior_steps", 1, "--overwrite") == 0
    assert config(world, FINETUNED)["head"] == "own"
    state = checkpoint(world, FINETUNED)
    model = build_model(state["model_args"])
    model.load_state_dict(state["model"])
    with h5py.File(world.betas("subj01")) as file:
        betas = file["betas"][()]
    trials = load_trials(world, "subj01", "new_test")
    mean = np.stack([betas[trials["row"][trials["image_id"] == i]].mean(axis=0) for i in SHARED])
    expected = model.eval()({"subj01": torch.from_numpy(mean)})[1]
    np.testing.assert_allclose(scores(world, FINETUNED, "retrieval"), expected.detach(), atol=1e-5)


def test_a_held_out_subject_gets_a_new_head_on_a_frozen_trunk(world):
    flags = ("--run", "pretrain", "--adapt_epochs", 3)
    assert score(world, *flags) == 0
    head, trunk = checkpoint(world, f"{PRETRAINED}/head_subj01_3sess"), checkpoint(world, PRETRAINED)
    assert set(head["model"]) == {"voxelenc.linears.0.weight", "voxelenc.linears.0.bias"}
    assert list(head["n_voxels"]) == ["subj01"]
    assert head["config"]["checkpoint_hash"] == archive_hash(world.run(PRETRAINED) / "last.pth")
    model = build_model({**trunk["model_args"], "n_voxels": head["n_voxels"]})
    shared = {key: value for key, value in trunk["model"].items() if not key.startswith("voxelenc.")}
    model.load_state_dict(shared | head["model"])
    expected = model.eval()({"subj01": torch.from_numpy(load_test_set(world, "subj01").betas)})[1]
    np.testing.assert_allclose(scores(world, f"{PRETRAINED}_adapt3sess", "retrieval"), expected.detach(), atol=1e-5)
    written = (world.run(f"{PRETRAINED}/head_subj01_3sess") / "last.pth").stat().st_mtime_ns
    name = f"{PRETRAINED}_adapt3sess"
    first = scores(world, name)
    assert config(world, name)["head"] == "adapt"
    assert score(world, *flags, "--overwrite") == 0  # the head is fitted once
    assert (world.run(f"{PRETRAINED}/head_subj01_3sess") / "last.pth").stat().st_mtime_ns == written
    np.testing.assert_array_equal(scores(world, name), first)
    assert score(world, "--run", "pretrain", "--adapt_epochs", 1) == 0  # other settings: fitted again
    assert not np.array_equal(scores(world, name), first)


def test_a_head_that_does_not_fit_is_refused(world, capsys):
    flags = ("--run", "pretrain", "--adapt_epochs", 1, "--num_sessions", 1)
    assert score(world, *flags) == 0
    file = world.run(f"{PRETRAINED}/head_subj01_1sess") / "last.pth"
    head = load_checkpoint(file)
    weight, bias = (head["model"][f"voxelenc.linears.0.{name}"].clone() for name in ("weight", "bias"))
    one_too_few = {"voxelenc.linears.0.weight": weight}
    for wrong in (one_too_few, one_too_few | {"voxelenc.linears.0.bias": bias, "voxelenc.linears.1.bias": bias}):
        save_checkpoint(file, {**head, "model": wrong})
        assert score(world, *flags, "--overwrite") == 2
        assert "head_subj01_1sess/last.pth: its weights do not fit" in capsys.readouterr().err
    file.unlink()


def test_adapting_reads_with_workers(world, monkeypatch):
    asked = []

    def noting(batches, num_workers, team):
        asked.append(num_workers)
        return make_loader(batches, num_workers, team)

    monkeypatch.setattr("training.loop.make_loader", noting)
    flags = ("--run", "pretrain", "--adapt_epochs", 1, "--num_sessions", 2, "--num_workers", 1, "--overwrite")
    assert score(world, *flags) == 0
    assert asked == [1, 1]  # training and validation


def test_adapting_that_was_stopped_goes_on(world):
    flags = ("--run", "pretrain", "--adapt_epochs", 3, "--num_sessions", 2)
    assert score(world, *flags) == 0
    file = world.run(f"{PRETRAINED}/head_subj01_2sess") / "last.pth"
    whole = {key: value.clone() for key, value in load_checkpoint(file)["model"].items()}
    file.unlink()
    with stopped_at(4):
        assert score(world, *flags, "--overwrite") == 143
    assert load_checkpoint(file)["model"].keys() == whole.keys()
    assert score(world, *flags, "--overwrite") == 0
    assert all(torch.equal(value, whole[key]) for key, value in load_checkpoint(file)["model"].items())


def test_adapting_learns(world):
    assert score(world, "--run", "pretrain", "--adapt_epochs", 60, "--num_sessions", 2) == 0
    lines = (world.run(f"{PRETRAINED}/head_subj01_2sess") / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss_prior"] for line in lines]
    assert len(losses) == 60 and np.mean(losses[-10:]) < np.mean(losses[20:30])  # the first 20 have mixed targets


def test_a_borrowed_head_must_have_as_many_voxels(world, capsys):
    assert score(world, "--run", "pretrain", "--head", 5) == 2
    assert "--head subj05" in capsys.readouterr().err
    assert score(world, "--run", "pretrain", "--head", 2) == 2
    assert "takes 5 voxels, the betas of subj01 have 7" in capsys.readouterr().err
    # subject 1's own encoder in the run of subject 1, said explicitly through another subject's number
    assert score(world, "--run", "finetune:1", "--head", 1, "--prior_steps", 1) == 0
    assert score(world, "--prior_steps", 1, "--overwrite") == 0
    np.testing.assert_array_equal(scores(world, FINETUNED + "_head01"), scores(world, FINETUNED))


def test_own_head_of_a_run_that_has_none_is_refused(world, capsys):
    assert score(world, "--run", "pretrain", "--head", "own") == 2
    assert "voxel encoders of subj02, wanted subj01" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "name"), [
    ({}, "pretrained_subj01_40sess_ext1_c_1024_mlp"),
    ({"tag": "b", "control": "noise"}, "pretrained_subj01_40sess_ext1_c_1024_mlp_b_noise"),
    ({"run": "ridge"}, "ridge_subj01_40sess_ext1_c"),
    ({"voxels": "V1,V2", "control": "mean"}, "pretrained_subj01_40sess_ext1_c_1024_mlp_mean_only_V1+V2"),
    ({"run": "ridge", "without": "higher_vis"}, "ridge_subj01_40sess_ext1_c_without_higher_vis"),
    ({"run": "ridge", "test_split": "val", "control": "mean"}, "ridge_subj01_40sess_ext1_c_val_mean"),
    ({"run": "ridge", "test_split": "test", "repeats": "single"}, "ridge_subj01_40sess_ext1_c_test_single"),
    ({"run": "ground_truth"}, "ground_truth_subj01_c"),
    ({"run": "pretrain", "num_sessions": 1}, "multisubject_subj01_ext1_c_1024_mlp_adapt1sess"),
    ({"run": "pretrain:subj02"}, "multisubject_subj02_ext1_c_1024_mlp"),
    ({"run": "finetune:subj05", "head": "subj05"}, "pretrained_subj05_40sess_ext1_c_1024_mlp_head05"),
    ({"run": "finetune:subj05"}, "pretrained_subj05_40sess_ext1_c_1024_mlp_adapt40sess"),
])
def test_names_of_scores(flags, name):
    default = {"subj": "subj01", "hidden_dim": 1024, "num_sessions": 40, "tag": "", "run": "finetune", "head": None,
               "control": None, "test_split": "new_test", "repeats": "mean"}
    assert scores_name(default | flags, "c") == name


# --- true features, validation images -----------------------------------------------------------------------------


@pytest.mark.parametrize(("feat", "script"), [("c", score_c), ("z", score_z)])
def test_ground_truth_writes_the_true_features(world, feat, script):
    assert score(world, "--ground_truth", script=script) == 0
    truth = open_feature(world, feat)[np.array(SHARED)]
    np.testing.assert_array_equal(scores(world, f"ground_truth_subj01_{feat}"), truth)


def test_ground_truth_of_a_null_control_is_refused(world, capsys):
    assert score(world, "--ground_truth", "--control", "mean") == 2
    assert "--control mean" in capsys.readouterr().err


@pytest.mark.parametrize("ground_truth", [False, True])
def test_validation_images_are_those_the_training_held_out(world, ground_truth):
    flags = ("--ground_truth",) if ground_truth else ()
    if ground_truth:  # has no run that says how many were held out: the default is
        train_trials, val_trials = split_trials(world, "subj01", 3, 0.05, 42)
    else:
        train_trials, val_trials = split_trials(world, "subj01", 3, 0.2, 42)
    assert score(world, *flags, "--test_split", "val") == 0
    name = "ground_truth_subj01_c_val" if ground_truth else FINETUNED + "_val"
    ids, _ = load_scores(world.root / "scores_all/subj01" / name)
    assert set(ids) == set(val_trials["image_id"]) and not set(ids) & {*train_trials["image_id"], *SHARED}


# --- z ------------------------------------------------------------------------------------------------------------

Z_RUN = "pretrained_subj01_3sess_ext1_z_8"


def test_z_has_the_training_latents_statistics_and_no_test_statistic(world):
    """Written out: predictions on training images, their deviation (as large as on validation images), the latents'."""
    assert score(world, script=score_z) == 0
    state = checkpoint(world, Z_RUN)
    model = build_model(state["model_args"])
    model.load_state_dict(state["model"])
    model.eval()

    def predict(trials):
        with h5py.File(world.betas("subj01")) as file:
            betas = file["betas"][()]
        images = sorted(set(trials["image_id"]))
        mean = np.stack([betas[trials["row"][trials["image_id"] == i]].mean(axis=0) for i in images])
        return images, model.predict({"subj01": torch.from_numpy(mean)})["nsdgeneral"].numpy()

    train_trials, val_trials = split_trials(world, "subj01", 3, 0.2, 42)
    images, on_training = predict(train_trials)
    ratio = np.sqrt(predict(val_trials)[1].var(0, ddof=1).sum() / on_training.var(0, ddof=1).sum())
    with h5py.File(world.feature("z")) as file:
        latents = file["data"][images].astype(np.float32).reshape(-1, 4, 8, 8)
    predicted = predict(load_trials(world, "subj01", "new_test"))[1]
    expected = (predicted - on_training.mean(0)) / (ratio * on_training.std(0)) * latents.std(0) + latents.mean(0)
    np.testing.assert_allclose(scores(world, Z_RUN), expected, rtol=1e-2, atol=2e-3)
    assert config(world, Z_RUN)["transductive"] is False


def test_transductive_is_recorded_and_uses_test_statistics(world):
    assert score(world, "--transductive", script=score_z) == 0
    z = scores(world, Z_RUN)
    assert config(world, Z_RUN)["transductive"] is True
    with h5py.File(world.feature("z")) as file:
        images = sorted(set(split_trials(world, "subj01", 3, 0.2, 42)[0]["image_id"]))
        latents = file["data"][images].astype(np.float32).reshape(-1, 4, 8, 8)
    np.testing.assert_allclose(z.mean(0), latents.mean(0), atol=1e-2)
    np.testing.assert_allclose(z.std(0), latents.std(0), rtol=1e-2)
    assert score(world, script=score_z) == 0 and config(world, Z_RUN)["transductive"] is False


def test_ridge_scores_and_refuses_to_adapt(world, capsys):
    assert train(world, "--model", "ridge") == 0 and score(world, "--run", "ridge") == 0
    assert scores(world, "ridge_subj01_3sess_ext1_c").shape == (len(SHARED), 3, 6)
    assert score(world, "--run", "ridge", "--head", "adapt") == 2
    assert "ridge has no shared network" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [
    (["--hidden_dim", 16], "pretrained_subj01_3sess_ext1_c_16_mlp"),
    (["--run", "scratch"], SCRATCH),
    (["--subj", 2], "pretrained_subj02_3sess_ext1_c_8_mlp"),
    (["--batch_size", 0], "--batch_size 0"),
    (["--num_workers", -1], "--num_workers -1"),
    (["--run", "finetune:2", "--head", "own"], "pretrained_subj02"),
])
def test_bad_input(world, capsys, flags, words):
    assert score(world, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and words in error


def test_a_checkpoint_of_another_feature_or_subject_is_refused(world, capsys, tmp_path):
    foreign = world.run("pretrained_subj02_3sess_ext1_c_8_mlp") / "last.pth"
    foreign.parent.mkdir(exist_ok=True)
    for source, words in ((Z_RUN, "was trained for z, wanted c"), (FINETUNED, "of subj01, wanted subj02")):
        save_checkpoint(foreign, load_checkpoint(world.run(source) / "last.pth"))
        assert score(world, "--subj", 2) == 2
        assert words in capsys.readouterr().err
    foreign.unlink()
