"""--hold_out: no response to an image of the cluster is read in any training, and every stage knows which it was."""

import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import evaluate
import options
import recon
import score_c
import share
import tiny_nsd
import train_c
import utils
from disk.names import images_name, run_name
from evaluation.controls import training_images
from evaluation.measuring import Measured
from evaluation.parts import measure_parts, parts_of
from evaluation.results import format_parts
from nsd import batches, repeats
from nsd.clusters import in_cluster
from nsd.rows import Rows
from nsd.trials import load_trials
from tiny_nsd import SHARED
from tiny_runs import copy_world, flags_of, train
from training.runs import ridge_r2
from training.settings import Plan

HELD_OUT = "--hold_out", "1/3"
COMPONENTS, RIDGE = ("--model", "components"), ("--model", "ridge")
SCRATCH = "scratch_subj01_3sess_ext1_c_8_mlp_without1of3"


@pytest.fixture
def paths(pristine_world, tmp_path):
    return copy_world(pristine_world, tmp_path)


@pytest.fixture
def read(monkeypatch):
    """{betas file: rows that were read}."""
    seen, read_betas = {}, batches.read_betas

    def reading(betas, rows):
        if isinstance(betas, Rows):
            seen.setdefault(betas.path.name, set()).update(np.ravel(rows).tolist())
        return read_betas(betas, rows)

    for module in (batches, repeats):
        monkeypatch.setattr(module, "read_betas", reading)
    return seen


def cluster_of(paths, n=3):
    return tiny_nsd.read_hdf5(paths.stimuli / f"clusters_{n}.hdf5", "cluster")


@pytest.mark.parametrize("flags, subj", [(COMPONENTS, "subj01"), ((), "subj01"), (RIDGE, "subj01"),
                                         ((*COMPONENTS, "--multi_subject"), "subj02")], ids=str)
def test_no_image_of_the_cluster_is_read(paths, read, flags, subj):
    trials = load_trials(paths, subj, "train")
    for held_out in ((), HELD_OUT):
        read.clear()
        epochs = () if flags == RIDGE else ("--num_epochs", 2)
        assert train(paths, *flags, *epochs, *held_out) == 0
        ((name, rows),) = read.items()
        assert subj in name
        ids = set(trials.set_index("row")["image_id"][sorted(rows)])
        if not held_out:
            assert ids == set(trials["image_id"])
    inside = set(np.flatnonzero(cluster_of(paths) == 1))
    everything = set(trials["image_id"])
    assert inside & everything and ids == everything - inside


def test_the_ridge_beside_a_training_has_held_out_the_same(paths):
    for held_out in ((), HELD_OUT):
        assert train(paths, *RIDGE, *held_out) == 0
    found = []
    for held_out in ((), HELD_OUT):
        args = train_c.get_parser().parse_args(flags_of(paths, *COMPONENTS, *held_out))
        found.append(ridge_r2(Plan.from_args(args), "c", ["c"])["val/r2_c_ridge"])
    kept = [json.loads((paths.run("ridge_subj01_3sess_ext1_c" + end) / "metrics.jsonl").read_text())["val/r2_c"]
            for end in ("", "_without1of3")]
    assert found == kept and found[0] != found[1]


def test_what_is_shared_is_the_run_without_the_cluster(paths, tmp_path):
    for held_out in ((), HELD_OUT):
        assert train(paths, *COMPONENTS, "--num_epochs", 1, *held_out) == 0
    words = ["export", str(tmp_path / "export"), "--root", str(paths.root), "--run", "scratch", "--hidden_dim", "8",
             "--num_sessions", "3", "--device", "cpu", "--feats", "c", *HELD_OUT]
    assert utils.run_cli(share.main, words) == 0
    config = json.loads((tmp_path / "export/config.json").read_text())
    trials = load_trials(paths, "subj01", "train")
    inside = np.isin(trials["image_id"], np.flatnonzero(cluster_of(paths) == 1))
    assert list(config["runs"]) == [SCRATCH] and config["flags"]["hold_out"] == "1/3"
    counted = config["protocol"]["train_images"] + config["protocol"]["val_images"]
    assert 0 < counted == trials["image_id"][~inside].nunique() < trials["image_id"].nunique()
    assert "cluster 1/3" in (tmp_path / "export/README.md").read_text()
    other = copy_world(paths, tmp_path / "other")
    shutil.rmtree(other.root / "train_logs")
    assert utils.run_cli(share.main, ["import", str(tmp_path / "export"), "--root", str(other.root)]) == 0
    scoring = ["--root", str(other.root), *words[4:12], *HELD_OUT]
    assert utils.run_cli(score_c.main, scoring) == 0


def test_clusters_are_fitted_to_images_that_nobody_is_tested_on(paths):
    assert train(paths, *RIDGE, *HELD_OUT) == 0
    before = cluster_of(paths)
    assert set(before) == {1, 2, 3} and len(before) == tiny_nsd.N_IMAGES
    assert train(paths, *RIDGE, *HELD_OUT, "--tag", "again") == 0  # what is there stays
    paths.clusters(3).unlink()
    with h5py.File(paths.components("c"), "r+") as file:
        rows = file["data"][()]
        rows[SHARED] += 1000
        file["data"][()] = rows
    assert train(paths, *RIDGE, *HELD_OUT, "--tag", "other") == 0
    others = np.setdiff1d(np.arange(len(before)), SHARED)
    np.testing.assert_array_equal(cluster_of(paths)[others], before[others])


def test_a_pretrained_run_must_have_held_out_the_same(paths, capsys):
    assert train(paths, *COMPONENTS, "--multi_subject", "--num_epochs", 1) == 0
    finetune = *COMPONENTS, "--num_epochs", 1, *HELD_OUT, "--multisubject_ckpt"
    assert train(paths, *finetune, "auto") == 2
    assert "pretrain first (SUBJ=1 STAGES=pretrain FEATS=c bash scripts/train.sh --hidden_dim 8 --hold_out 1/3)" in \
        capsys.readouterr().err
    assert train(paths, *finetune, "multisubject_subj01_ext1_c_8_mlp") == 2
    assert "was pretrained with nothing held out, and may have seen these images" in capsys.readouterr().err
    assert train(paths, *COMPONENTS, "--multi_subject", "--num_epochs", 1, *HELD_OUT) == 0
    assert train(paths, *finetune, "auto") == 0
    config = json.loads((paths.run("pretrained_subj01_3sess_ext1_c_8_mlp_without1of3") / "config.json").read_text())
    assert config["hold_out"] == "1/3" and "run multisubject_subj01_ext1_c_8_mlp_without1of3" in config["made_from"]


def test_scores_say_it_and_refuse_other_clusters(paths, capsys):
    assert train(paths, *COMPONENTS, "--num_epochs", 1, *HELD_OUT) == 0
    flags = ["--root", str(paths.root), "--hidden_dim", "8", "--num_sessions", "3", "--device", "cpu"]
    flags += ["--run", "scratch"]
    assert utils.run_cli(score_c.main, flags) == 2
    assert f"there are: {SCRATCH} (--hold_out 1/3)" in capsys.readouterr().err
    assert utils.run_cli(score_c.main, [*flags, *HELD_OUT]) == 0
    config = json.loads((paths.root / "scores_all/subj01" / SCRATCH / "config.json").read_text())
    assert config["hold_out"] == "1/3"
    with h5py.File(paths.clusters(3), "r+") as file:
        file["cluster"][:5] = 1 + file["cluster"][:5] % 3
    assert utils.run_cli(score_c.main, [*flags, *HELD_OUT, "--overwrite"]) == 2
    assert "was trained on others than are there now: clusters of images" in capsys.readouterr().err
    assert train(paths, *COMPONENTS, "--num_epochs", 1, *HELD_OUT) == 2
    assert "clusters of images" in capsys.readouterr().err


def test_evaluation_shows_the_clusters_images_apart(paths, capsys):
    assert train(paths, *RIDGE, "--hold_out", "2/2") == 0
    images = SimpleNamespace(image_ids=np.arange(4, tiny_nsd.N_IMAGES), config={"hold_out": "2/2"})
    parts = parts_of(images, None, paths)
    inside = cluster_of(paths, 2)[images.image_ids] == 2
    assert list(parts) == ["cluster 2/2, held out", "other clusters"] and 0 < inside.sum() < 20
    np.testing.assert_array_equal(parts["cluster 2/2, held out"], inside)
    np.testing.assert_array_equal(parts["other clusters"], ~inside)
    values = np.random.default_rng(0).random(20)
    found = measure_parts({"reconstructed": Measured({"pixcorr": values}, {}, 0)}, parts, 0)
    for part, chosen in parts.items():
        entry = found[part]["reconstructed"]["pixcorr"]
        assert entry["value"] == pytest.approx(values[chosen].mean()) and entry["n"] == chosen.sum()
    assert f"cluster 2/2, held out, {inside.sum()} image" in format_parts(found)
    assert parts_of(SimpleNamespace(image_ids=images.image_ids, config={}), None, paths) == {}
    # the nearest training image is sought among what the decoder saw
    run = {"subj": "subj01", "num_sessions": 3}
    seen = training_images(run, paths)
    np.testing.assert_array_equal(training_images(run | {"hold_out": "2/2"}, paths),
                                  [i for i in seen if cluster_of(paths, 2)[i] != 2])


def test_what_is_not_a_cluster_is_refused(paths, capsys):
    assert options.hold_out("03/10") == "3/10"
    for text in ("3", "0/3", "4/3", "1/1", "a/b", "/3"):
        with pytest.raises(options.argparse.ArgumentTypeError, match="is not a cluster; wanted K/N"):
            options.hold_out(text)
    with pytest.raises(utils.UserError, match="clusters_3.hdf5.*train with --hold_out first"):
        in_cluster(paths, "1/3", [0])
    assert train(paths, *RIDGE, "--hold_out", "1/23") == 2
    assert "20 training images, wanted at least as many as clusters" in capsys.readouterr().err
    brain = ["--root", str(paths.root), "--hold_out", "1/3", "--use_gnet"]
    assert utils.run_cli(recon.main, brain) == 2 and "the encoding model has seen" in capsys.readouterr().err


def test_names():
    assert run_name("scratch", "subj01", "z", 8, 40, "a", "3/10") == "scratch_subj01_40sess_ext1_z_8_without3of10_a"
    assert run_name("ridge", "subj01", "z", 512, hold_out="3/10") == "ridge_subj01_40sess_ext1_z_without3of10"
    flags = vars(evaluate.get_parser().parse_args(["--hold_out", "3/10", "--test_split", "test"]))
    assert images_name(flags) == "cp_4096_v1_without3of10_test"
