"""W&B: what docs/flags.md promises is logged, offline runs can be read back, and nothing of W&B stops a training."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from wandb.proto import wandb_internal_pb2

import train_c
import train_gnet
import train_z
import utils
from tiny_runs import SCRATCH, SRC, flags_of, train, write_world
from training.tracking import Tracker, load_rows

REPO = SRC.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def offline_rows(folder):
    """What an offline run would send: [{key: value}], from its .wandb file."""
    (file,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # W&B's own process writes it; on a busy machine its last record comes after finish()
        records = [wandb_internal_pb2.Record.FromString(entry) for entry in log_entries(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records if record.WhichOneof("record_type") == "history"]


def log_entries(content, block=32768, header=7):
    """Entries of a LevelDB log with W&B's seven bytes in front: blocks of pieces (crc, length, type)."""
    position, entry = header, b""
    while position + header <= len(content):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        entry += content[position + header:position + header + length]
        position += header + length
        if kind in (1, 4):  # whole, or the last piece
            yield entry
            entry = b""


def keys_of_the_page(feature):
    """Metric keys in the table of docs/flags.md for c and g, or for z."""
    text = (REPO / "docs/flags.md").read_text()
    (table,) = re.findall(r"\| metric \|.*?(?=\n\n|$(?!\n))", text, re.S)
    rows = [line.split("|")[1:3] for line in table.strip().splitlines()[2:]]
    return {key for keys, of in rows if feature in of.replace(",", " ").split() for key in re.findall(r"`(.+?)`", keys)}


@pytest.mark.parametrize(("script", "feature"), [(train_c, "c"), (train_z, "z")])
def test_every_metric_of_the_page_is_in_an_offline_run(paths, monkeypatch, script, feature):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(paths, "--num_epochs", 2, "--wandb_log", "--tag", "w", script=script) == 0
    run = SCRATCH + "_w" if feature == "c" else "scratch_subj01_3sess_ext1_z_8_w"
    rows = offline_rows(paths.run(run))
    assert [row["_step"] for row in rows] == [1, 2]
    keys = {key for key in rows[0] if not key.startswith("_")}
    assert keys == keys_of_the_page(feature)
    written = [json.loads(line) for line in (paths.run(run) / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in written]


def test_metrics_of_components_are_those_of_the_page(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--model", "components", "--clip_scale", 0.1, "--num_epochs", 1, "--tag", "k", "--wandb_log"]
    assert train(paths, *flags) == 0
    (sent,) = offline_rows(paths.run(SCRATCH + "_k"))
    keys = {key for key in sent if not key.startswith("_")}
    assert {"train/loss_mse", "val/loss_mse", "val/r2_c", "val/loss_clip", "val/fwd_pct_correct"} <= keys
    assert keys <= {key.replace("<feat>", "c") for key in keys_of_the_page("components") | keys_of_the_page("c")}
    (row,) = [json.loads(line) for line in (paths.run(SCRATCH + "_k") / "metrics.jsonl").read_text().splitlines()]
    assert keys == row.keys() - {"step"}


def test_gnets_metrics_are_those_of_the_page(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--root", paths.root, "--num_epochs", 1, "--num_sessions", 3, "--batch_size", 4, "--trunk_width", 4,
             "--pass_through", 4, "--num_workers", 0, "--val_fraction", 0.3, "--device", "cpu", "--wandb_log"]
    assert utils.run_cli(train_gnet.main, [str(flag) for flag in flags]) == 0
    (row,) = offline_rows(paths.run("gnet_subj01"))
    keys = {key for key in row if not key.startswith("_") and not key.endswith("_nsd_general")}
    assert keys == keys_of_the_page("GNet")


def in_a_process(program, *words, **environment):
    """Run a Python program that knows src/, in an environment without W&B's settings but these."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True,
                          check=False, env={**known, "PYTHONPATH": str(SRC), **environment})


def test_not_logged_in_is_one_line_before_any_work(paths, monkeypatch, capsys):
    result = in_a_process("import utils; from training.tracking import check_tracking; "
                          "print(utils.run_cli(lambda argv: check_tracking(True)))", NETRC="/nonexistent")
    (line,) = result.stderr.splitlines()
    assert result.stdout == "2\n" and "wandb login" in line and "WANDB_MODE=offline" in line

    def refuse(wandb_log):
        raise utils.UserError("not logged in" if wandb_log else "not asked to log")

    monkeypatch.setattr("training.runs.check_tracking", refuse)
    monkeypatch.setattr("nsd.trials.load_trials", None)  # no trial is read
    assert train(paths, "--wandb_log", "--tag", "x") == 2
    assert capsys.readouterr() == ("", "error: not logged in\n") and not paths.run(SCRATCH + "_x").exists()


KILLING_THE_SERVICE = """
import os, subprocess, sys
from training.tracking import Tracker
tracker = Tracker(sys.argv[1], "killed", {}, wandb_log=True)
for step in (1, 2, 3):
    if step == 2:
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", "wandb-core"], check=True)
    tracker.log({"loss": 1 / step}, step)
tracker.finish()
"""


def test_an_offline_run_says_where_it_lies_and_nothing_else(tmp_path):
    code = "import sys; from training.tracking import Tracker; Tracker(sys.argv[1], 'x', {}, wandb_log=True).finish()"
    result = in_a_process(code, tmp_path / "a b", WANDB_MODE="offline")
    (line,) = (result.stdout + result.stderr).splitlines()
    (folder,) = tmp_path.glob("a b/wandb/offline-run-*")
    said, _, command = line.partition(": ")
    words = shlex.split(command)
    assert said == "W&B (offline); to send this run" and words[3:] == ["sync", str(folder)]
    subprocess.run([*words[:4], "--help"], capture_output=True, check=True)


def test_losing_wandb_does_not_stop_a_training(tmp_path):
    """All that a training does with W&B, and the service killed under it after the first epoch."""
    result = in_a_process(KILLING_THE_SERVICE, tmp_path, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in load_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_whatever_wandb_raises_costs_its_plots_only(tmp_path, capsys):
    tracker = Tracker(tmp_path, "run", {})
    tracker.wandb_run = object()  # has no method that a run has
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step)
    tracker.finish()
    assert [row["step"] for row in load_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err.count("warning: W&B ") == 1


def test_a_sweeps_trial_trains(paths, tmp_path, monkeypatch):
    """The command of sweep.yaml as W&B's agent would fill it in, for a smaller network; Python notes its words."""
    sweep = yaml.safe_load((REPO / "scripts/sweep.yaml").read_text())
    assert sweep["method"] in ("grid", "random", "bayes") and sweep["metric"]["name"] in keys_of_the_page("components")
    known = vars(train_c.get_parser().parse_args([]))
    assert set(sweep["parameters"]) <= set(known)
    chosen = {name: options["value"] if "value" in options else options.get("values", [options.get("min")])[0]
              for name, options in sweep["parameters"].items()}
    chosen |= {"num_epochs": 1, "n_blocks": 1}
    arguments = [f"--{name}={value}" for name, value in chosen.items()] + flags_of(paths)
    command = []
    for word in sweep["command"]:
        command += arguments if word == "${args}" else [word.replace("${program}", sweep["program"])]
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "WANDB_RUN_ID": "trial7", "PYTHON": str(python)}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    script, *words = result.stdout.splitlines()
    assert script == "src/train_c.py"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert utils.run_cli(train_c.main, words) == 0
    assert (paths.run("multisubject_subj01_ext1_c_8_mlp_trial7") / "last.pth").exists()
