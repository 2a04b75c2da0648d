"""The bash scripts themselves, on the small demo world: fMRI in, pictures and a report out."""

import csv
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
SD, CLIP = REPO / "demo/models/sd", REPO / "demo/models/clip"
SMALL = ["--hidden_dim", "32", "--n_blocks", "1", "--prior_depth", "1", "--batch_size", "42", "--num_workers", "0"]


def script(name, root, *flags, check=True, **knobs):
    """Run scripts/NAME.sh from a foreign directory, as a user would; returns the finished process."""
    knobs = {"FEATS": "c z g_2 g_6", **knobs}
    result = subprocess.run(["bash", str(REPO / f"scripts/{name}.sh"), *map(str, flags)], cwd=root.parent, text=True,
                            capture_output=True, check=False, env={**os.environ, "ROOT": str(root), **knobs})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small world taken through features, both training stages and scores."""
    root = tmp_path_factory.mktemp("world") / "a root"  # a space in the path must not matter
    root.mkdir()
    subprocess.run([os.environ.get("PYTHON", "python3"), REPO / "demo/make_mini_nsd.py", "--size", "small",
                    "--root", root], check=True, capture_output=True)
    script("features", root, "--sd_model", SD, "--clip_model", CLIP, "--feats", "c", "z", "g_2", "g_6",
           "g_12")
    script("train", root, *SMALL, "--num_epochs", 1, "--num_sessions", 2)
    script("score", root, "--hidden_dim", 32, "--num_sessions", 2)
    return root


def recon(root, *flags, **kwargs):
    return script("recon", root, "--hidden_dim", 32, "--num_sessions", 2, "--sd_model", SD, "--clip_model", CLIP,
                  "--feats", "g_2", "g_6", "--num_inference_steps", 5, *flags, **kwargs)


def test_runs_leave_what_design_promises(root):
    for run in ("multisubject_subj01_ext1_c_32_mlp", "pretrained_subj01_2sess_ext1_c_32_mlp",
                "multisubject_subj01_ext1_g_2_32", "pretrained_subj01_2sess_ext1_g_6_32"):
        folder = root / "train_logs" / run
        assert {"last.pth", "config.json", "metrics.jsonl"} <= {f.name for f in folder.iterdir()}
        logs = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert {"train/loss", "train/loss_clip", "train/loss_prior", "train/fwd_pct_correct", "val/loss"} <= logs.keys()


def test_scores_carry_ascending_ids(root):
    folder = root / "scores_all/subj01/pretrained_subj01_2sess_ext1_c_32_mlp"
    ids, scores = np.load(folder / "image_ids.npy"), np.load(folder / "nsdgeneral.npy")
    assert len(ids) == len(scores) and np.all(np.diff(ids) > 0) and scores.dtype == np.float32


def test_recon_and_evaluate(root):
    recon(root, "--limit", 3, "--batch_size", 2)
    folder = root / "outputs_all/subj01/cp_4096_v1/300000/0.2"
    with open(folder / "index.csv", newline="") as file:
        index = list(csv.DictReader(file))
    ids = np.load(root / "scores_all/subj01/pretrained_subj01_2sess_ext1_c_32_mlp/image_ids.npy")
    assert [int(row["image_id"]) for row in index] == ids[:3].tolist()
    assert Image.open(folder / index[0]["file"]).size == (64, 64)
    before = {row["file"]: (folder / row["file"]).stat().st_mtime_ns for row in index}
    recon(root, "--limit", 3, "--batch_size", 2)  # again: nothing is made twice
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}

    script("evaluate", root, "--hidden_dim", 32, "--num_sessions", 2, "--eval_clip", CLIP)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"pixcorr", "ssim"} <= metrics.keys()
    assert min(Image.open(folder / "contact_sheet.png").size) > 64


def test_another_subject_few_sessions_and_the_other_ways_to_a_score(root):
    flags = ["--hidden_dim", 32, "--num_sessions", 1]
    knobs = {"FEATS": "c z", "SUBJ": "3"}
    script("train", root, *SMALL, "--num_epochs", 1, "--num_sessions", 1, **knobs, STAGES="pretrain finetune ridge")
    for run in ("finetune", "pretrain", "ridge"):
        script("score", root, *flags, "--run", run, **knobs)
    folder = root / "scores_all/subj03"
    names = ["pretrained_subj03_1sess_ext1_{}_32{}", "multisubject_subj03_ext1_{}_32{}_adapt1sess",
             "ridge_subj03_1sess_ext1_{}"]
    for name in names:
        c, z = (np.load(folder / name.format(*feat) / "nsdgeneral.npy") for feat in (("c", "_mlp"), ("z", "")))
        assert c.shape[1:] == (20, 64) and z.shape[1:] == (4, 16, 16) and len(c) == len(z)


def test_a_launcher_trains_with_two_processes(root, one_launch):
    """From a foreign directory, with the configuration for several GPUs, on the CPU."""
    launch = f"accelerate launch --config_file {REPO}/scripts/accelerate/ddp.yaml --num_processes 2"
    result = script("train", root, *SMALL, "--num_epochs", 1, "--num_sessions", 2, "--tag", "two", FEATS="g_2",
                    STAGES="scratch", LAUNCH=launch, OMP_NUM_THREADS="1")
    assert "; 2 processes, cpu" in result.stdout
    assert (root / "train_logs/scratch_subj01_2sess_ext1_g_2_32_two/last.pth").exists()


def test_train_again_reuses_the_run(root):
    checkpoint = root / "train_logs/multisubject_subj01_ext1_c_32_mlp/last.pth"
    before = checkpoint.stat().st_mtime_ns
    result = script("train", root, *SMALL, "--num_epochs", 1, "--num_sessions", 2, FEATS="c", STAGES="pretrain")
    assert "finished before" in result.stdout and checkpoint.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "flags", "knobs", "words"),
    [
        ("train", ["--hidden_dim", 48], {"ROOT": "nowhere"}, ["--root", "no such folder"]),
        ("train", [], {"SUBJ": "9"}, ["'9' is not a subject"]),
        ("train", ["--feat", "g_3"], {"FEATS": "g_2"}, ["'g_3' is not"]),
        ("train", ["--hidden_dim", 48], {"STAGES": "finetune", "FEATS": "c"}, ["multisubject_subj01_ext1_c_48_mlp"]),
        ("train", [], {"STAGES": "sleep"}, ["STAGES", "sleep"]),
        ("score", ["--hidden_dim", 48], {"FEATS": "c"}, ["pretrained_subj01_40sess_ext1_c_48_mlp", "train"]),
        ("recon", ["--hidden_dim", 48], {}, ["scores", "score"]),
        ("recon", ["--no_such_flag"], {}, ["--no_such_flag"]),
        ("train", [*SMALL, "--num_sessions", 99], {"STAGES": "finetune", "FEATS": "c"}, ["99"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(root, name, flags, knobs, words):
    result = script(name, root, *flags, check=False, **knobs)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "error:" in last and all(word in last for word in words), result.stderr
