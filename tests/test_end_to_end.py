"""The bash scripts themselves, on the small demo world: fMRI in, pictures and a report out.

`script` runs one from a foreign directory, as a user would, Python and all. `calls` runs it with a stand-in for Python
that writes down what it was called with, and makes these calls in this process: without the seconds of importing.
"""

import csv
import importlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from shared import built_once

REPO = Path(__file__).resolve().parent.parent
SD, CLIP, TAESD = (REPO / "demo/models" / name for name in ("sd", "clip", "taesd"))
NAMED = ["--hidden_dim", 32, "--num_sessions", 2]  # what names a run
SMALL = ["--n_blocks", 1, "--batch_size", 42, "--num_workers", 0, "--num_epochs", 1]
FEATS = "c z g_2 g_6"


def script(name, root, *flags, check=True, **knobs):
    """Run scripts/NAME.sh; returns the finished process."""
    result = subprocess.run(["bash", str(REPO / f"scripts/{name}.sh"), *map(str, flags)], cwd=root.parent, text=True,
                            capture_output=True, check=False,
                            env={**os.environ, "ROOT": str(root), "FEATS": FEATS, **knobs})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def words_of_calls(name, root, *flags, **knobs):
    """The words of every call that scripts/NAME.sh makes, of the stand-in: Python, and PROGRAM in the knobs."""
    with tempfile.TemporaryDirectory() as folder:
        log, program = Path(folder, "calls"), Path(folder, "program")
        log.touch()
        program.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>{log}; echo >>{log}\n')
        program.chmod(0o755)
        knobs = {key: value.replace("PROGRAM", str(program)) for key, value in knobs.items()}
        script(name, root, *flags, **{"PYTHON": str(program), **knobs})
        return [shlex.split(line) for line in log.read_text().splitlines()]


def calls(name, root, *flags, **knobs):
    """Make the calls of scripts/NAME.sh in this process, up to the first that fails; returns the last exit status."""
    for file, *words in words_of_calls(name, root, *flags, **knobs):
        assert Path(file).parent == REPO / "src"
        status = utils.run_cli(importlib.import_module(Path(file).stem).main, words)
        if status:
            break
    return status


@pytest.fixture(scope="session")
def root(small_nsd, tmp_path_factory):
    """A small world taken through features, both training stages and scores; tests add to it."""
    def build(folder):
        root = folder / "a root"  # a space in the path must not matter
        shutil.copytree(small_nsd.root, root)
        script("features", root, "--sd_model", SD, "--clip_model", CLIP)
        script("train", root, *NAMED, *SMALL, STAGES="pretrain", FEATS="c")
        assert calls("train", root, *NAMED, *SMALL) == 0
        script("score", root, *NAMED, FEATS="c")
        assert calls("score", root, *NAMED) == 0

    return built_once(tmp_path_factory, "end_to_end", build) / "a root"


def recon(run, root, *flags):
    return run("recon", root, *NAMED, "--sd_model", SD, "--clip_model", CLIP, "--guidance_decoder", TAESD, "--feats",
               "g_2", "g_6", "--num_inference_steps", 5, "--limit", 3, "--batch_size", 2, *flags)


def test_runs_leave_weights_settings_and_metrics(root):
    for run, metrics in (("multisubject_subj01_ext1_c_32_mlp", {"val/r2_c", "train/fwd_pct_correct"}),
                         ("pretrained_subj01_2sess_ext1_c_32_mlp", {"val/r2_c", "train/fwd_pct_correct"}),
                         ("multisubject_subj01_ext1_g_32", {"val/r2_g_2", "val/r2_g_6"}),
                         ("pretrained_subj01_2sess_ext1_z_32", {"val/r2_z"})):
        folder = root / "train_logs" / run
        assert {"last.pth", "config.json", "metrics.jsonl"} <= {f.name for f in folder.iterdir()}
        logs = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert {"train/loss", "val/loss"} | metrics <= logs.keys()


def test_scores_carry_ascending_ids(root):
    folder = root / "scores_all/subj01/pretrained_subj01_2sess_ext1_c_32_mlp"
    ids, scores = np.load(folder / "image_ids.npy"), np.load(folder / "nsdgeneral.npy")
    assert len(ids) == len(scores) and np.all(np.diff(ids) > 0) and scores.dtype == np.float32


def test_recon_and_evaluate(root):
    recon(script, root)
    folder = root / "outputs_all/subj01/cp_4096_v1/30/0.8"
    with open(folder / "index.csv", newline="") as file:
        index = list(csv.DictReader(file))
    ids = np.load(root / "scores_all/subj01/pretrained_subj01_2sess_ext1_c_32_mlp/image_ids.npy")
    assert [int(row["image_id"]) for row in index] == ids[:3].tolist()
    assert Image.open(folder / index[0]["file"]).size == (64, 64)
    before = {row["file"]: (folder / row["file"]).stat().st_mtime_ns for row in index}
    assert recon(calls, root) == 0  # again: nothing is made twice
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}

    script("evaluate", root, *NAMED, "--eval_clip", CLIP)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"pixcorr", "ssim"} <= metrics.keys()
    assert min(Image.open(folder / "contact_sheet.png").size) > 64


def test_the_data_are_looked_at_and_fetched(root):
    assert " 0 fail" in script("check_data", root, "--subj", 1, "--stages", "score").stdout
    assert "--what" in script("download", root, "--help").stdout


def test_another_subject_few_sessions_and_the_other_ways_to_a_score(root):
    flags = ["--hidden_dim", 32, "--num_sessions", 1]
    assert calls("train", root, *flags, *SMALL, FEATS="c z", SUBJ="3", STAGES="pretrain finetune ridge") == 0
    for run in ("finetune", "pretrain", "ridge"):
        assert calls("score", root, *flags, "--adapt_epochs", 1, "--run", run, FEATS="c z", SUBJ="3") == 0
    folder = root / "scores_all/subj03"
    names = ["pretrained_subj03_1sess_ext1_{}_32{}", "multisubject_subj03_ext1_{}_32{}_adapt1sess",
             "ridge_subj03_1sess_ext1_{}"]
    for name in names:
        c, z = (np.load(folder / name.format(*feat) / "nsdgeneral.npy") for feat in (("c", "_mlp"), ("z", "")))
        assert c.shape[1:] == (24, 64) and z.shape[1:] == (4, 16, 16) and len(c) == len(z)


def test_a_launcher_is_put_before_every_training(tmp_path):
    """Real ones launch in test_distributed.py."""
    launch = f"PROGRAM launch --config_file {REPO}/scripts/accelerate/ddp.yaml --num_processes 2"
    made = words_of_calls("train", tmp_path / "a root", "--tag", "two", STAGES="scratch", LAUNCH=launch, FEATS="c g_2")
    for words, name in zip(made, ("train_c.py", "train_g.py"), strict=True):
        assert words[:5] == ["launch", *launch.split()[2:]] and words[5] == str(REPO / "src" / name)
        assert words[-4:] == ["--root", str(tmp_path / "a root"), "--tag", "two"]


def test_train_again_reuses_the_run(root, capsys):
    checkpoint = root / "train_logs/multisubject_subj01_ext1_c_32_mlp/last.pth"
    before = checkpoint.stat().st_mtime_ns
    assert calls("train", root, *NAMED, *SMALL, FEATS="c", STAGES="pretrain") == 0
    assert "already finished" in capsys.readouterr().out and checkpoint.stat().st_mtime_ns == before


@pytest.mark.parametrize(("name", "flags", "knobs", "words"), [
    ("train", ["--feat", "g_3"], {"FEATS": "g_2"}, ["'g_3' is not"]),
    ("recon", ["--no_such_flag"], {}, ["--no_such_flag"]),
])
def test_bad_flags_end_a_script_with_one_line_and_exit_2(tmp_path, name, flags, knobs, words):
    result = script(name, tmp_path, *flags, check=False, **knobs)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout.count("+ ") == 1, "nothing runs after what failed"
    (line,) = result.stderr.strip().splitlines()
    assert "error:" in line and all(word in line for word in words), result.stderr


@pytest.mark.parametrize(("name", "flags", "knobs", "words"), [
    ("train", ["--hidden_dim", 48], {"ROOT": "nowhere"}, ["--root", "no such folder"]),
    ("train", ["--hidden_dim", 48], {"STAGES": "finetune", "FEATS": "c"},
     ["multisubject_subj01_ext1_c_48_mlp", "(--hidden_dim 32)", "SUBJ=1 STAGES=pretrain FEATS=c bash"]),
    ("train", ["--hidden_dim", 32], {"SUBJ": "2", "STAGES": "finetune", "FEATS": "c"},
     ["(--multisubject_ckpt multisubject_subj01_ext1_c_32_mlp)", "SUBJ=2 STAGES=pretrain FEATS=c"]),
    ("train", [*SMALL, "--hidden_dim", 32, "--num_sessions", 99], {"STAGES": "finetune", "FEATS": "c"}, ["99"]),
    ("score", ["--hidden_dim", 48], {"FEATS": "c"}, ["pretrained_subj01_40sess_ext1_c_48_mlp",
     "(--num_sessions 2 --hidden_dim 32)", 'SUBJ=1 STAGES="pretrain finetune" FEATS=c bash scripts/train.sh']),
    ("recon", ["--hidden_dim", 48], {}, ["scores", "score"]),
])
def test_bad_input_is_one_line_and_exit_2(root, capsys, name, flags, knobs, words):
    assert calls(name, root, *flags, **knobs) == 2
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert "Traceback" not in error and last.startswith("error:") and all(word in last for word in words), error
