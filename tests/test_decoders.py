"""Decoders of components: trained, stopped and resumed, scored, stacked with a ridge, given a new voxel encoder."""

import json
import shutil

import numpy as np
import pytest
import torch

import score_c
import score_g
import score_z
import train_c
import train_g
import train_z
import utils
from disk.scores import load_scores
from models import Decoder, restore
from nsd.components import open_components
from nsd.repeats import load_test_set
from nsd.rows import open_betas, open_feature
from nsd.trials import split_trials
from tiny_nsd import SHARED
from tiny_runs import SMALL, checkpoint, copy_world, flags_of, stopped_at, train, write_world
from training.bottleneck import fit_bottleneck
from training.objectives import ComponentObjective

NETWORK = ["--model", "components", "--num_epochs", 3, "--max_lr", 1e-2, "--clip_scale", 0.1]
LAYERS = ["--feat", "g_2", "g_12"]
RUNS = {train_c: "scratch_subj01_3sess_ext1_c_8_mlp", train_z: "scratch_subj01_3sess_ext1_z_8",
        train_g: "scratch_subj01_3sess_ext1_g_8"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world with decoders of c, of z and of both layers of g, trained on subject 1 alone, and their ridges."""
    paths = write_world(tmp_path_factory.mktemp("world"))
    for script in RUNS:
        more = LAYERS if script is train_g else []
        assert train(paths, *NETWORK, *more, script=script) == 0
        assert train(paths, "--model", "ridge", *more, script=script) == 0
    return paths


def score(paths, *flags, script=score_c):
    words = ["--hidden_dim", 8, "--num_sessions", 3, "--device", "cpu", "--num_workers", 0, "--run", "scratch"]
    words += ["--root", paths.root, *flags]
    return utils.run_cli(script.main, list(map(str, words)))


def folder_of(paths, script, suffix=""):
    folder = paths.root / "scores_all/subj01"
    names = {score_c: RUNS[train_c] + suffix, score_z: RUNS[train_z] + suffix}
    return folder / names[script] if script in names else folder / f"scratch_subj01_3sess_ext1_g_2_8{suffix}/Linear-2"


def test_a_new_decoder_predicts_the_mean():
    decoder = Decoder({"subj01": 7}, 8, {"c": 5, "z": 3}, contrast=["c"])
    found, contrast = decoder({"subj01": torch.randn(4, 7)})
    assert {feat: rows.shape for feat, rows in found.items()} == {"c": (4, 5), "z": (4, 3)}
    assert not any(rows.any() for rows in found.values()) and contrast["c"].shape == (4, 5) and contrast["c"].any()
    linear = Decoder({"subj01": 7}, 8, {"c": 5}, n_blocks=0)
    assert len(list(linear.parameters())) == 4  # two linear maps


def test_the_loss_is_the_share_of_variance_that_is_not_explained(trained):
    known = open_components(trained, "c")
    ids = known.there()
    decoder = Decoder({"subj01": 7}, 8, {"c": known.k}).eval()
    batch = {"voxels": {"subj01": torch.randn(len(ids), 7)}, "image_ids": torch.from_numpy(ids),
             "c": torch.from_numpy(known.coefficients[ids])}
    loss, logs = ComponentObjective({"c": known})(decoder, batch, 0.0)
    rows = open_feature(trained, "c")[ids].astype(np.float64).reshape(len(ids), -1)
    inside = (known.project(rows) ** 2).sum(1).mean()  # the mean is predicted: all variance that components keep
    np.testing.assert_allclose(loss.item(), inside / known.total, rtol=1e-5)
    assert logs["loss_mse"] == loss


@pytest.mark.parametrize(("script", "feats"), [(train_c, ["c"]), (train_g, ["g_2", "g_12"])])
def test_one_run_learns_all_its_features_and_keeps_their_errors(trained, script, feats):
    folder = trained.run(RUNS[script])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert {"val/loss_mse", *(f"val/r2_{feat}" for feat in feats)} <= rows[-1].keys()
    assert ("val/fwd_pct_correct" in rows[-1]) == (script is train_c)
    state = checkpoint(trained, folder.name)
    assert "optimizer" not in state  # it is finished
    for feat in feats:
        known = open_components(trained, feat)
        assert state["errors"][feat].shape == (known.k + 1,)
        r2 = 1 - float(state["errors"][feat].sum()) / known.total
        assert rows[-1][f"val/r2_{feat}"] == pytest.approx(r2, abs=1e-5)


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_and_resumed_equals_an_uninterrupted_one(trained, tmp_path, step):
    paths = copy_world(trained, tmp_path)
    flags = [*NETWORK, "--tag", "again"]
    with stopped_at(step, ComponentObjective):
        assert train(paths, *flags) == 143
    assert train(paths, *flags, "--resume") == 0
    whole, resumed = checkpoint(trained), checkpoint(paths, f"{RUNS[train_c]}_again")
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert torch.equal(whole["errors"]["c"], resumed["errors"]["c"])


@pytest.mark.parametrize(("script", "feat"), [(score_c, "c"), (score_g, "g_2")])
def test_scores_are_rows_of_the_feature_and_r2_is_that_of_the_validation_images(trained, script, feat, capsys):
    more = ["--feat", "g_2"] if script is score_g else []
    assert score(trained, "--no-stack", *more, script=script) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == "R2 on validation images network".split()
    folder = folder_of(trained, script)
    scores, config = np.load(folder / "nsdgeneral.npy"), json.loads((folder / "config.json").read_text())
    known = open_components(trained, feat)
    assert scores.shape[1:] == known.shape
    assert (folder / "retrieval.npy").exists() == (script is score_c)  # g has no contrast
    assert np.load(folder / "errors.npy").shape == (known.k + 1,) and config["stacked_with"] is None

    assert score(trained, "--no-stack", "--test_split", "val", *more, script=script) == 0
    folder = folder_of(trained, script, "_val")
    predicted, ids = np.load(folder / "nsdgeneral.npy"), np.load(folder / "image_ids.npy")
    true = open_feature(trained, feat)[ids].astype(np.float64)
    inside = known.project(true) @ known.basis  # what lies beyond the components is counted by its variance
    error = ((predicted.reshape(len(ids), -1) - known.mean - inside) ** 2).sum(1).mean()
    beyond = known.total - known.variances.sum()
    assert config["r2"]["network"] == pytest.approx(1 - (error + beyond) / known.total, abs=1e-4)
    rows = [json.loads(line) for line in (trained.run(config["run"]) / "metrics.jsonl").read_text().splitlines()]
    assert config["r2"]["network"] == pytest.approx(rows[-1][f"val/r2_{feat}"], abs=1e-4)


@pytest.mark.parametrize("script", [score_c, score_z])
def test_the_stack_is_the_best_average_on_validation_images(trained, script, capsys, monkeypatch):
    monkeypatch.setattr("training.stacking.STACK_PRIOR", 0)
    assert score(trained, "--test_split", "val", "--overwrite", script=script) == 0
    more = ["restandardised"] if script is score_z else []
    header, row, *notes = capsys.readouterr().out.splitlines()[-2 - len(more):]
    assert [note.partition(":")[0] for note in notes] == more
    assert header.split() == "R2 on validation images network ridge scored".split() + more
    config = json.loads((folder_of(trained, script, "_val") / "config.json").read_text())
    r2 = config["r2"]
    assert r2["scored"] >= max(r2["network"], r2["ridge"]) - 1e-6 and config["stacked_with"] is not None
    assert row.split()[1:] == [f"{r2[name]:.3f}" for name in ("network", "ridge", "scored", *more)]
    assert score(trained, "--test_split", "val", script=script) == 0
    assert "kept" in capsys.readouterr().out  # nothing changed since


@pytest.mark.parametrize(("script", "flags"), [(train_c, []), (train_z, []), (train_g, LAYERS)])
def test_any_feature_can_be_mixed(trained, tmp_path, monkeypatch, script, flags):
    asked = []
    monkeypatch.setattr("training.components.fit", lambda run, model, objective, loop: asked.append(objective))
    assert train(copy_world(trained, tmp_path), *NETWORK, *flags, "--mixup_pct", 0.5, "--overwrite", script=script) == 0
    assert asked[0].mixup_pct == 0.5


def test_a_new_voxel_encoder_serves_all_layers(tmp_path, capsys):
    paths = write_world(tmp_path)
    assert train(paths, *NETWORK, *LAYERS, "--multi_subject", script=train_g) == 0
    words = ["--run", "pretrain", "--adapt_epochs", 2, *LAYERS]
    assert score(paths, *words, script=score_g) == 0
    said = capsys.readouterr().out
    assert said.count("a new one for subj01") == 2
    head = paths.run("multisubject_subj01_ext1_g_8") / "head_subj01_3sess"
    steps = [json.loads(line)["step"] for line in (head / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]  # fitted once
    adapted = checkpoint(paths, f"multisubject_subj01_ext1_g_8/{head.name}")["model"]
    assert set(adapted) == {"voxelenc.linears.0.weight", "voxelenc.linears.0.bias"}  # the rest is the run's


def test_fine_tuning_starts_from_the_trunk_of_the_same_features(trained, tmp_path, capsys):
    paths = copy_world(trained, tmp_path)
    assert train(paths, *NETWORK, "--multi_subject") == 0
    assert train(paths, *NETWORK, "--multisubject_ckpt", "auto") == 0
    assert "(all but the voxel encoder, which starts from scratch)" in capsys.readouterr().out
    again = [*NETWORK, "--multisubject_ckpt", "auto", "--overwrite"]
    assert train(paths, *again, "--n_blocks", 2, "--dropout", 0.5) == 2  # of what differs only what must not
    assert "was pretrained with --n_blocks 1, here 2; give" in capsys.readouterr().err


def test_fine_tuning_fits_the_voxel_encoder_and_leaves_the_trunk(trained, tmp_path, capsys):
    """Unless it is asked to train all of it."""
    paths = copy_world(trained, tmp_path)
    assert train(paths, *NETWORK, "--multi_subject") == 0
    start = checkpoint(paths, "multisubject_subj01_ext1_c_8_mlp")["model"]
    for tag, flags, kept in (("a", (), True), ("b", ("--no-freeze_trunk",), False)):
        assert train(paths, *NETWORK, "--multisubject_ckpt", "auto", "--tag", tag, *flags) == 0
        assert ("the voxel encoder alone is trained" in capsys.readouterr().out) == kept
        made = checkpoint(paths, f"pretrained_subj01_3sess_ext1_c_8_mlp_{tag}")["model"]
        trunk = [key for key in made if not key.startswith("voxelenc.")]
        assert len(trunk) > 4 and all(torch.equal(made[key], start[key]) == kept for key in trunk)
    first, other = (checkpoint(paths, f"pretrained_subj01_3sess_ext1_c_8_mlp_{tag}")["model"] for tag in "ab")
    assert not torch.equal(first["voxelenc.linears.0.weight"], other["voxelenc.linears.0.weight"])
    assert train(paths, *NETWORK, "--freeze_trunk") == 2
    assert "--freeze_trunk: without --multisubject_ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "frozen", "max_lr"), [
    (["--multisubject_ckpt", "x"], True, 3e-3), (["--multisubject_ckpt", "x", "--no-freeze_trunk"], False, 1e-3),
    (["--multisubject_ckpt", "x", "--max_lr", "1e-4"], True, 1e-4), ([], False, 1e-3),
    (["--multi_subject"], False, 1.5e-3), (["--multi_subject", "--freeze_trunk"], False, 1.5e-3),
    (["--model", "mindeye2", "--multisubject_ckpt", "x"], False, 3e-4)])
def test_the_trunk_is_frozen_where_one_was_pretrained(flags, frozen, max_lr):
    args = train_c.get_parser().parse_args(flags)
    assert (args.freeze_trunk, args.max_lr) == (frozen, max_lr)


def test_fine_tuning_takes_its_network_from_the_pretrained_run(trained, tmp_path, capsys):
    """What flags of it are not given; what is given can contradict. The run that `auto` means may have any width."""
    paths = copy_world(trained, tmp_path)
    assert train(paths, *NETWORK, "--multi_subject", "--dropout", 0.4) == 0
    small = [word for word in flags_of(paths) if word not in ("--hidden_dim", "8", "--n_blocks", "--prior_depth", "1")]
    small = [*small[2:], "--num_epochs", "2", "--multisubject_ckpt", "auto"]  # without --model

    def finetune(*flags):
        return utils.run_cli(train_c.main, [*small, *map(str, flags)])

    assert finetune() == 0
    name = "pretrained_subj01_3sess_ext1_c_8_mlp"
    made = checkpoint(paths, name)
    assert made["model_args"].items() >= {"hidden_dim": 8, "n_blocks": 1, "dropout": 0.4, "contrast": ["c"]}.items()
    best = min(map(json.loads, (paths.run(name) / "metrics.jsonl").read_text().splitlines()),
               key=lambda row: row["val/loss_mse"])
    last = (f"best on validation (epoch {best['step']} of 2): loss_mse {best['val/loss_mse']:.4f}, "
            f"R2 of c {best['val/r2_c']:.3f}; {paths.run(name)}")
    assert capsys.readouterr().out.endswith(f"{name}: {last}\n")
    assert (paths.run(name) / "log.txt").read_text().endswith(f"{last}\n")

    assert finetune("--clip_scale", 0, "--tag", "b") == 2
    assert "was pretrained with --clip_scale above 0, here 0; give no" in capsys.readouterr().err
    assert finetune("--model", "mindeye2", "--tag", "b") == 2
    assert "was pretrained with --model components, here mindeye2; give no" in capsys.readouterr().err
    shutil.copytree(paths.run("multisubject_subj01_ext1_c_8_mlp"), paths.run("multisubject_subj01_ext1_c_9_mlp"))
    assert finetune("--tag", "b") == 2
    assert "auto: there are multisubject_subj01_ext1_c_8_mlp, multisub" in capsys.readouterr().err
    assert finetune("--tag", "b", "--hidden_dim", 7) == 2
    assert "--hidden_dim 8" in capsys.readouterr().err and not list(paths.run("").glob("*_b"))


def test_scores_through_a_bottleneck_are_the_networks_of_squeezed_responses(trained, capsys):
    assert score(trained, "--no-stack") == 0 and score(trained, "--no-stack", "--control", "bottleneck1") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "(through --control bottleneck1)"
    whole, squeezed = (folder_of(trained, score_c, suffix) for suffix in ("", "_bottleneck1"))
    rows = load_scores(squeezed)[1].reshape(len(SHARED), -1)
    state = checkpoint(trained, RUNS[train_c])
    held_out = (3, state["config"]["val_fraction"], state["config"]["seed"])
    squeeze = fit_bottleneck(trained, "subj01", held_out, 1)
    network = restore(state, "c").eval()
    responses = torch.from_numpy(squeeze(load_test_set(trained, "subj01").betas))
    known = open_components(trained, "c")
    with torch.no_grad():
        coefficients = network({"subj01": responses})[0]["c"].numpy() * known.total**0.5
    np.testing.assert_allclose(rows, known.mean + coefficients @ known.basis[:coefficients.shape[1]], atol=1e-3)
    assert not np.allclose(rows, load_scores(whole)[1].reshape(rows.shape), atol=1e-2)
    errors = [np.load(folder / "errors.npy") for folder in (whole, squeezed)]
    assert not np.allclose(*errors)  # measured through the same bottleneck: the sampler is told how little is known
    assert score(trained, "--control", "bottleneck999") == 2
    assert "--control bottleneck999: wanted 1 to 7 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "name", "kept"), [
    (["--without", "V1"], "_without_V1", [False] * 2 + [True] * 5), (["--voxels", "V1"], "_only_V1", [True] * 2)])
def test_scores_of_a_lesion_are_the_networks_of_responses_with_means(trained, capsys, words, name, kept):
    assert score(trained, "--no-stack", *words) == 0
    assert capsys.readouterr().out.splitlines()[-1] in ("(without V1)", "(from V1 alone)")
    state = checkpoint(trained, RUNS[train_c])
    train_trials, _ = split_trials(trained, "subj01", 3, state["config"]["val_fraction"], state["config"]["seed"])
    betas, test = open_betas(trained, "subj01"), load_test_set(trained, "subj01").betas.copy()
    for v in range(7):
        if not (kept + [False] * 7)[v]:
            of_images = [np.mean([betas[[row]][0, v] for row in rows["row"]])
                         for _, rows in train_trials.groupby("image_id")]
            test[:, v] = np.mean(of_images)
    known, network = open_components(trained, "c"), restore(state, "c").eval()
    with torch.no_grad():
        coefficients = network({"subj01": torch.from_numpy(test)})[0]["c"].numpy() * known.total**0.5
    rows = load_scores(folder_of(trained, score_c, name))[1].reshape(len(SHARED), -1)
    np.testing.assert_allclose(rows, known.mean + coefficients @ known.basis[:coefficients.shape[1]], atol=1e-3)
    config = json.loads((folder_of(trained, score_c, name) / "config.json").read_text())
    assert config["lesion"] and words[1] in (config["voxels"], config["without"])
    assert score(trained, "--no-stack", *words) == 0 and "kept" in capsys.readouterr().out


def test_a_lesion_leaves_the_decoders_own_statistics_alone(trained, tmp_path, capsys):
    """z's standardisation is that of whole responses, whichever is scored first."""
    found = []
    for order in (((), ("--without", "V1")), (("--without", "V1"), ())):
        paths = copy_world(trained, tmp_path / str(len(found)))
        for file in paths.run(RUNS[train_z]).glob("z_statistics*"):
            file.unlink()
        for words in order:
            assert score(paths, *words, script=score_z) == 0
        found.append([np.load(folder_of(paths, score_z, suffix) / "nsdgeneral.npy")
                      for suffix in ("", "_without_V1")])
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.allclose(*found[0])


def test_missing_components_are_one_line(tmp_path, capsys):
    paths = write_world(tmp_path)
    paths.components("c").unlink()
    assert utils.run_cli(train_c.main, [*flags_of(paths), *map(str, NETWORK)]) == 2
    assert "c_components.hdf5" in (error := capsys.readouterr().err) and "features.sh --feats c" in error
    assert SMALL[1] == "mindeye2"  # the other tests' network
