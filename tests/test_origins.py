"""Nothing stale: what a run and its scores were made from is known, and noticed when it is another."""

from collections import Counter

import h5py
import pytest
import torch

import score_c
import score_g
import train_g
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import archive_hash, file_hash
from features.components import write_components
from tiny_runs import FINETUNED, PRETRAINED, copy_world, train, write_world
from training import scoring
from training import trained as trained_runs

NETWORK = ["--model", "components", "--num_epochs", 1]
SCORE = ["--hidden_dim", "8", "--num_sessions", "3", "--device", "cpu"]
PRETRAIN, FINETUNE = [*NETWORK, "--multi_subject"], [*NETWORK, "--multisubject_ckpt", "auto"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world with a decoder of c, pretrained on subject 2 and fine-tuned on subject 1."""
    paths = write_world(tmp_path_factory.mktemp("world"))
    assert train(paths, *PRETRAIN) == 0 and train(paths, *FINETUNE) == 0
    return paths


@pytest.fixture
def paths(trained, tmp_path):
    return copy_world(trained, tmp_path)


def change_betas(paths, subj="subj01"):
    with h5py.File(paths.betas(subj), "r+") as file:
        file["betas"][:] = file["betas"][()] + 1


def pretrain_with(seed):
    return lambda paths: train(paths, *PRETRAIN, "--seed", seed, "--overwrite")


def other_components(paths, feat="c"):
    paths.components(feat).unlink()
    write_components(paths, feat, seed=7)


def test_a_checkpoint_is_known_by_its_contents_alone(tmp_path):
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    weights = torch.arange(6.0)
    for file, tensor in zip(files, (weights, weights.clone(), weights + 1), strict=True):
        save_checkpoint(file, {"model": {"w": tensor}})
    assert archive_hash(files[0]) == archive_hash(files[1]) != archive_hash(files[2])
    files[0].write_bytes(b"no archive")
    assert archive_hash(files[0]) == file_hash(files[0])


@pytest.mark.parametrize(("change", "flags", "words"), [
    (pretrain_with(7), FINETUNE, f"run {PRETRAINED}"),
    (other_components, FINETUNE, "components of c"),
    (other_components, PRETRAIN, "components of c"),
    (change_betas, FINETUNE, "betas of subj01"),
])
def test_a_run_of_other_inputs_is_not_kept(paths, capsys, change, flags, words):
    change(paths)
    before = (paths.run(FINETUNED) / "last.pth").stat().st_mtime_ns
    capsys.readouterr()
    assert train(paths, *flags, "--resume") == 2
    error = capsys.readouterr().err
    assert f"others than are there now: {words}; --overwrite" in error and error.count("\n") == 1
    assert (paths.run(FINETUNED) / "last.pth").stat().st_mtime_ns == before
    if change is other_components:  # what was pretrained on the old ones means something else now
        assert train(paths, *PRETRAIN, "--overwrite") == 0
    assert train(paths, *flags, "--overwrite") == 0 and train(paths, *flags) == 0
    assert "already finished, kept" in capsys.readouterr().out


@pytest.mark.parametrize("change", [
    pretrain_with(42),  # the same weights again
    lambda paths: other_components(paths, "g_2"),
    lambda paths: change_betas(paths, "subj02"),
    lambda paths: paths.components("c").unlink(),
    lambda paths: (paths.run(PRETRAINED) / "last.pth").unlink(),
])
def test_what_a_run_does_not_depend_on_may_change_and_what_is_gone_cannot_be_compared(paths, capsys, change):
    change(paths)
    assert train(paths, *FINETUNE) == 0
    assert f"{FINETUNED}: already finished, kept" in capsys.readouterr().out


def test_a_run_from_before_inputs_were_recorded_is_kept_and_said_to_be(paths, capsys):
    file = paths.run(FINETUNED) / "last.pth"
    state = load_checkpoint(file)
    del state["config"]["made_from"]
    save_checkpoint(file, {key: value for key, value in state.items() if key != "format"})
    assert train(paths, *FINETUNE) == 0
    assert "whether its inputs have changed since is not known" in capsys.readouterr().out


# --- scores -------------------------------------------------------------------------------------------------------


def score(paths, *flags, script=score_c):
    return utils.run_cli(script.main, [*SCORE, "--root", str(paths.root), *flags])


def test_scores_follow_what_they_were_made_from(paths, capsys):
    assert score(paths) == 0 and score(paths) == 0
    assert "already scored with this checkpoint, kept" in capsys.readouterr().out
    train(paths, *FINETUNE, "--seed", 7, "--overwrite")
    assert score(paths) == 0
    assert "kept" not in capsys.readouterr().out
    assert train(paths, "--model", "ridge", "--seed", 7) == 0 and score(paths) == 0  # one to stack with
    assert "kept" not in capsys.readouterr().out and score(paths) == 0
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words"), [(other_components, "components of c"),
                                               (change_betas, "betas of subj01")])
def test_a_run_of_other_inputs_is_not_scored(paths, capsys, change, words):
    """Coefficients of another basis, or voxels in another order, would give rows without any error."""
    assert score(paths) == 0
    change(paths)
    capsys.readouterr()
    assert score(paths) == 2
    assert f"others than are there now: {words}; train it again" in capsys.readouterr().err
    assert train(paths, *PRETRAIN, "--overwrite") == 0 and train(paths, *FINETUNE, "--overwrite") == 0
    assert score(paths) == 0


def test_a_ridge_of_other_components_is_not_stacked_with(paths, capsys):
    assert train(paths, "--model", "ridge") == 0
    other_components(paths)
    assert train(paths, *PRETRAIN, "--overwrite") == 0 and train(paths, *FINETUNE, "--overwrite") == 0
    assert score(paths) == 2
    assert "or leave it out (--no-stack)" in capsys.readouterr().err
    assert score(paths, "--no-stack") == 0


def test_a_ridge_that_saw_the_validation_images_is_not_stacked_with(paths, capsys):
    """It would seem best to those images, and get all the weight."""
    assert train(paths, "--model", "ridge", "--seed", 7) == 0
    capsys.readouterr()
    assert score(paths) == 2
    said = capsys.readouterr().err
    assert "--seed 7, the network those of --val_fraction" in said and "--seed 42 --overwrite, or leave it out" in said
    assert train(paths, "--model", "ridge", "--overwrite") == 0 and score(paths) == 0


def test_a_run_of_several_layers_is_opened_once(paths, monkeypatch):
    layers = ["--feat", "g_2", "g_12"]
    assert train(paths, *NETWORK, *layers, script=train_g) == 0
    assert train(paths, "--model", "ridge", "--feat", "g_2", script=train_g) == 0
    opened = []
    readers = ("load_checkpoint", "restore", "load_test_set", "average_repeats", "archive_hash")
    for room, name in [*((trained_runs, name) for name in readers), (scoring, "archive_hash")]:
        call = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args, name=name, call=call, **more: opened.append(name)
                            or call(*args, **more))
    assert score(paths, "--run", "scratch", *layers, script=score_g) == 0
    assert Counter(opened) == {"load_checkpoint": 2, "restore": 2, "load_test_set": 1, "average_repeats": 1,
                               "archive_hash": 2}  # of the run and of its ridge, which has g_2 alone
