"""W&B: what docs/flags.md and docs/wandb.md promise is logged; offline runs are read back, key by key; nothing of W&B
stops a training."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from wandb.proto import wandb_internal_pb2

import evaluate
import options
import recon
import score_c
import train_c
import train_gnet
import train_z
import utils
import wandb_workspace
from disk.files import archive_hash, load_json
from tiny_runs import SCRATCH, SRC, flags_of, train, write_world
from training.settings import Wandb
from training.tracking import POINTS, THUMBNAIL, Dashboard, Tracker, load_rows

REPO = SRC.parent


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def offline_records(folder):
    """What an offline run would send, from its .wandb file."""
    (file,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # W&B's own process writes it; on a busy machine its last record comes after finish()
        records = [wandb_internal_pb2.Record.FromString(entry) for entry in log_entries(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return records


def offline_rows(folder, axis=None):
    """What an offline run would show: [{key: value}], without W&B's own; of those rows that have the key `axis`."""
    rows = []
    for record in offline_records(folder):
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                key, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if inner:  # of a picture or a table
                    rows[-1].setdefault(key, {})[inner[0]] = value
                elif not key.startswith("_"):
                    rows[-1][key] = value
    return [row for row in rows if axis is None or axis in row]


def offline_run(folder):
    """W&B's record of an offline run: what it is filed under."""
    (run,) = {record.run.run_id: record.run for record in offline_records(folder)
              if record.WhichOneof("record_type") == "run"}.values()
    return run


def artifacts(folder, used):
    """{name: record} of the artifacts that an offline run uses, or those that it makes; without W&B's own of tables."""
    records = [record.artifact for record in offline_records(folder) if record.WhichOneof("record_type") == "artifact"]
    return {record.name: record for record in records if record.use_after_commit == used and record.type != "run_table"}


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
    rows = offline_rows(paths.run(run), "epoch")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0].keys() - {"epoch"} == keys_of_the_page(feature)
    written = [json.loads(line) for line in (paths.run(run) / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in written]


def test_metrics_of_components_are_those_of_the_page(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--model", "components", "--clip_scale", 0.1, "--num_epochs", 1, "--tag", "k", "--wandb_log"]
    assert train(paths, *flags) == 0
    (sent,) = offline_rows(paths.run(SCRATCH + "_k"), "epoch")
    keys = sent.keys() - {"epoch"}
    assert {"train/loss_mse", "val/loss_mse", "val/r2_c", "val/loss_clip", "val/fwd_pct_correct"} <= keys
    assert keys <= {key.replace("<feat>", "c") for key in keys_of_the_page("components") | keys_of_the_page("c")}
    (row,) = [json.loads(line) for line in (paths.run(SCRATCH + "_k") / "metrics.jsonl").read_text().splitlines()]
    assert keys == row.keys() - {"step"}


def test_gnets_metrics_are_those_of_the_page(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--root", paths.root, "--num_epochs", 1, "--num_sessions", 3, "--batch_size", 4, "--trunk_width", 4,
             "--pass_through", 4, "--num_workers", 0, "--val_fraction", 0.3, "--device", "cpu", "--wandb_log"]
    assert utils.run_cli(train_gnet.main, [str(flag) for flag in flags]) == 0
    (row,) = offline_rows(paths.run("gnet_subj01"), "epoch")
    keys = {key for key in row.keys() - {"epoch"} if not key.endswith("_nsd_general")}
    assert keys == keys_of_the_page("GNet")


def test_curves_per_step_and_the_ridges_line(paths, monkeypatch):
    """An epoch's mean is the mean of its steps, which have as many trials each."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--model", "components", "--num_epochs", 2]
    assert train(paths, "--model", "ridge") == 0
    assert train(paths, *flags, "--wandb_log", "--tag", "steps") == 0
    folder = paths.run(SCRATCH + "_steps")
    steps, epochs = offline_rows(folder, "step"), offline_rows(folder, "epoch")
    assert [row["step"] for row in steps] == list(range(1, 9))
    for name in ("loss", "loss_mse", "fwd_pct_correct"):
        means = np.reshape([row[f"step/{name}"] for row in steps], (2, 4)).mean(1)
        assert means == pytest.approx([row[f"train/{name}"] for row in epochs], rel=1e-5)
    assert [steps[3]["step/lr"], steps[7]["step/lr"]] == [row["train/lr"] for row in epochs]
    (ridge,) = load_rows(paths.run("ridge_subj01_3sess_ext1_c") / "metrics.jsonl")
    assert [row["val/r2_c_ridge"] for row in epochs] == [ridge["val/r2_c"]] * 2
    assert "val/r2_c_ridge" not in (folder / "metrics.jsonl").read_text()  # it is not this run's
    for other in (["--num_sessions", 2], ["--seed", 1], ["--val_fraction", 0.3]):  # than the ridge's
        assert train(paths, *flags, "--wandb_log", "--tag", f"other{other[0]}", *other) == 0
        (folder,) = paths.root.glob(f"train_logs/*other{other[0]}")
        assert "val/r2_c_ridge" not in offline_rows(folder, "epoch")[0]


def test_metrics_are_the_same_without_wandb(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = []
    for tag, more in (("on", ["--wandb_log"]), ("off", [])):
        assert train(paths, "--model", "components", "--num_epochs", 2, "--tag", tag, *more) == 0
        found = load_rows(paths.run(f"{SCRATCH}_{tag}") / "metrics.jsonl")
        rows.append([{key: value for key, value in row.items() if "_per_s" not in key and "wait" not in key}
                     for row in found])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_scalars_of_steps_reach_wandb_in_order_and_of_a_long_training_not_all(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, "long", {}, Wandb(log=True, project="p"), n_steps=3 * POINTS)
    for step in range(1, 200):
        tracker.log_step({"half": torch.tensor(step / 2), "step": step}, step)
    tracker.log_epoch({"train/loss": 0.5}, 1)
    tracker.finish()
    rows = offline_rows(tmp_path)
    assert rows == [{"step": step, "step/half": step / 2, "step/step": step} for step in range(3, 200, 3)] + [
        {"epoch": 1, "train/loss": 0.5}]
    axes = {record.metric.glob_name: record.metric.step_metric for record in offline_records(tmp_path)
            if record.WhichOneof("record_type") == "metric" and record.metric.glob_name}
    assert axes == {"step/*": "step", "train/*": "epoch", "val/*": "epoch"}


STAGES = {  # of a chain in the whole world: flags after which it is logged
    "pretrain": (train_c, ["--multi_subject", "--tag", "w"]),
    "finetune": (train_c, ["--multisubject_ckpt", "auto", "--tag", "w"]),
    "score": (score_c, ["--tag", "w"]),
    "recon": (recon, ["--tag", "w", "--method", "w", "--feats", "none", "--z", "none"]),
    "evaluate": (evaluate, ["--tag", "w", "--images", "outputs_all/subj01/w/0/0"])}


def test_a_chain_of_stages_is_one_lineage(whole_world, monkeypatch):
    """What a stage uses is what the one before made: W&B takes artifacts of one name and digest for one."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = whole_world.root
    for script, flags in STAGES.values():
        assert whole_world.run(script, *flags, "--wandb_log") == 0
    run = "subj01_ext1_c_8_mlp_w"
    folders = {"pretrain": root / f"train_logs/multisubject_{run}",
               "finetune": root / f"train_logs/pretrained_{run.replace('_ext1', '_3sess_ext1')}",
               "score": root / f"scores_all/subj01/pretrained_{run.replace('_ext1', '_3sess_ext1')}",
               "recon": root / "outputs_all/subj01/w/0/0", "evaluate": root / "outputs_all/subj01/w/0/0"}
    runs = {}
    for stage, folder in folders.items():
        (file,) = [file for file in folder.glob("wandb/offline-run-*") if (stage == "evaluate") == (
            "evaluate" in file.name)]
        runs[stage] = root / f"{stage}_alone"
        (runs[stage] / "wandb").mkdir(parents=True)
        file.rename(runs[stage] / "wandb" / file.name)

    tags = {"pretrain": ["c", "mindeye2"], "finetune": ["c", "mindeye2"], "score": ["c", "finetune"],
            "recon": ["w", "finetune", "raw"], "evaluate": ["w"]}
    for stage, folder in runs.items():
        filed = offline_run(folder)
        assert (filed.run_group, filed.job_type) == ("subj01_w", stage)
        assert sorted(filed.tags) == sorted(["subj01", *tags[stage]])
    kinds = ["checkpoint", "checkpoint", "scores", "pictures"]
    for before, after, kind in zip(list(runs)[:-1], list(runs)[1:], kinds, strict=True):
        made, used = artifacts(runs[before], used=False), artifacts(runs[after], used=True)
        (name,) = used.keys() & made.keys()
        assert used[name].digest == made[name].digest and used[name].type == made[name].type == kind
        assert used[name].user_created and not made[name].user_created
    for folder in runs.values():  # by reference: nothing is sent
        for record in (*artifacts(folder, used=False).values(), *artifacts(folder, used=True).values()):
            (entry,) = record.manifest.contents
            assert entry.ref.startswith("file:///") and not entry.local_path
            assert entry.path.startswith(json.loads(record.metadata)["hash"] + "/")
    assert artifacts(runs["pretrain"], used=True) == {}
    used = json.loads(artifacts(runs["score"], used=True)[f"{folders['finetune'].name}-last.pth"].metadata)["hash"]
    assert used == load_json(folders["score"] / "config.json")["checkpoint_hash"]
    hashes = load_json(folders["recon"] / "config.json")["score_hashes"]
    (scores,) = artifacts(runs["recon"], used=True).values()
    assert json.loads(scores.metadata)["hash"] == hashes["c"]
    recon_shows_the_images(runs["recon"], folders["recon"])
    evaluate_shows_a_table(runs["evaluate"], folders["evaluate"])
    score_rows = offline_rows(runs["score"])
    r2 = load_json(folders["score"] / "config.json")["r2"]
    assert score_rows == [{f"score/r2_c_{name}": value for name, value in r2.items()}] and r2


def media(folder, found):
    """The files that an offline run would show for a value, in the order of its captions."""
    (files,) = folder.glob("wandb/offline-run-*/files")
    return [files / name for name in found["filenames"]]


def recon_shows_the_images(folder, drawn):
    (row,) = offline_rows(folder)
    ids = [int(line.split(",")[1]) for line in (drawn / "index.csv").read_text().splitlines()[1:]]
    found = row["recon/images"]
    assert found["captions"] == [f"id {i}" for i in ids] and len(ids) <= recon.SHOWN
    for file, picture in zip(media(folder, found), sorted(drawn.glob("0*.png")), strict=True):
        assert np.array_equal(Image.open(file), Image.open(picture))


def evaluate_shows_a_table(folder, outdir):
    rows = {key: value for row in offline_rows(folder) for key, value in row.items()}
    entry = load_json(outdir / "metrics.json")["pixcorr"]
    assert [rows[f"eval/pixcorr{end}"] for end in ("", "_low", "_high")] == [
        entry["value"], entry["ci_low"], entry["ci_high"]]
    summary = {item.key or item.nested_key[0] for record in offline_records(folder)
               if record.WhichOneof("record_type") == "summary" for item in record.summary.update}
    assert {"eval/pixcorr", "eval/pixcorr_low", "eval/pixcorr_high"} <= summary
    files = {entry.path: entry.local_path for record in offline_records(folder) if record.artifact.type == "run_table"
             for entry in record.artifact.manifest.contents}  # of both tables, and their pictures
    table = json.loads(Path(files["eval/images.table.json"]).read_text())
    per_image = [line.split(",") for line in (outdir / "metrics_per_image.csv").read_text().splitlines()]
    n_sets = len(table["columns"]) - len(per_image[0])
    assert table["columns"][:3] == ["image_id", "seen images", "reconstructed"] and n_sets >= 2
    assert table["columns"][1 + n_sets:] == per_image[0][1:]
    for cells, wanted in zip(table["data"], per_image[1:], strict=True):
        assert [cells[0], *cells[1 + n_sets:]] == pytest.approx([float(value) for value in wanted])
        for cell in cells[1:1 + n_sets]:
            assert max(Image.open(files[cell["path"]]).size) <= THUMBNAIL
    metrics = json.loads(Path(files["eval/metrics.table.json"]).read_text())
    assert metrics["columns"][:3] == ["set", "metric", "value"]
    assert {"eval/images", "eval/metrics"} <= rows.keys()
    (sheet,) = media(folder, rows["eval/contact_sheet"])
    assert Image.open(sheet).size == Image.open(outdir / "contact_sheet.png").size


def test_a_sweep_shows_the_same_images_at_every_setting(whole_world, monkeypatch):
    """Also where fewer are shown than drawn; of a selection the chosen ones."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(recon, "SHOWN", 2)
    shown = []
    for method, flags in (("a", []), ("b", ["--cfg_scale", 2]), ("c", ["--num_samples", 2, "--select", "g"])):
        words = ["--method", method, "--limit", 3, "--wandb_log", "--wandb_group", "sweep", *flags]
        assert whole_world.run(recon, *words) == 0
        (folder,) = {file.parent for file in whole_world.root.glob(f"outputs_all/subj01/{method}/*/*/wandb")}
        assert offline_run(folder).run_group == "sweep"
        (row,) = offline_rows(folder)
        shown.append(row["recon/images"]["captions"])
    ids = np.load(whole_world.root / "scores_all/subj01/pretrained_subj01_3sess_ext1_c_8_mlp/image_ids.npy")
    assert shown == [[f"id {ids[0]}", f"id {ids[2]}"]] * 3
    selected = next(whole_world.root.glob("outputs_all/subj01/c_select_g/*/*"))
    assert np.array_equal(Image.open(media(folder, row["recon/images"])[1]), Image.open(selected / "00002.png"))


def test_files_are_sent_when_asked(paths, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--model", "components", "--num_epochs", 1, "--tag", "up", "--wandb_log", "--wandb_upload"]
    assert train(paths, *flags) == 0
    folder = paths.run(SCRATCH + "_up")
    made = artifacts(folder, used=False)
    for name in ("last.pth", "best.pth"):
        (reference,) = made[f"{folder.name}-{name}"].manifest.contents
        (content,) = made[f"{folder.name}-{name}-files"].manifest.contents
        assert not reference.local_path and Path(content.local_path) == folder / name
        assert reference.path == f"{archive_hash(folder / name)}/{name}"


def test_a_checkpoint_that_was_replaced_is_another_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    file, digests = tmp_path / "train_logs/a b/last.pth", []
    file.parent.mkdir(parents=True)
    for content in (1, 2, 1):
        torch.save(content, file)
        board = Dashboard(tmp_path / str(len(digests)), "x", {}, Wandb(log=True, project="p"))
        board.makes("checkpoint", file, archive_hash)
        board.finish()
        (record,) = artifacts(tmp_path / str(len(digests)), used=False).values()
        assert record.name == "a_b-last.pth"
        digests.append(record.digest)
    assert digests[0] == digests[2] != digests[1]


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
from training.settings import Wandb
tracker = Tracker(sys.argv[1], "killed", {}, Wandb(log=True, project="p"))
for step in (1, 2, 3):
    if step == 2:
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", "wandb-core"], check=True)
    tracker.log_step({"loss": 1 / step}, step)
    tracker.log_epoch({"train/loss": 1 / step}, step)
tracker.finish()
"""


def test_an_offline_run_says_where_it_lies_and_nothing_else(tmp_path):
    code = ("import sys; from training.settings import Wandb; from training.tracking import Dashboard; "
            "Dashboard(sys.argv[1], 'x', {}, Wandb(log=True, project='p')).finish()")
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
    tracker = Tracker(tmp_path, "run", {}, Wandb())
    tracker.wandb_run = object()  # has no method that a run has
    for step in (1, 2):
        tracker.log_step({"loss": 1.0}, step)
        tracker.log_epoch({"train/loss": 1.0}, step)
    tracker.uses("checkpoint", tmp_path / "metrics.jsonl", "abc")
    tracker.makes("checkpoint", tmp_path / "metrics.jsonl", "abc")
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


def test_the_workspace_shows_keys_that_are_logged(monkeypatch):
    """Those that the tests above find in offline runs, and the metrics of the pages."""
    page = (REPO / "docs/flags.md").read_text() + (REPO / "docs/wandb.md").read_text()
    documented = {key.replace("<feat>", feat).replace("<metric>", metric) for key in re.findall(r"`([\w/<>]+)`", page)
                  for feat in options.FEATURES for metric in wandb_workspace.MEASURES}
    workspace = wandb_workspace.make_workspace("me", "mine")
    panels = [panel for section in workspace.sections for panel in section.panels]
    shown = [key for panel in panels for key in wandb_workspace.keys_of(panel)]
    assert set(shown) <= documented and len(shown) == len(set(shown))
    evaluated = (REPO / "docs/evaluation.md").read_text()
    assert all(f"`{name}`" in evaluated for name in wandb_workspace.MEASURES)
    spec = workspace._to_model().model_dump(by_alias=True)["spec"]["section"]
    assert [section["name"] for section in spec["panelBankConfig"]["sections"]] == [
        section.name for section in workspace.sections]
    assert [key["name"] for key in spec["runSets"][0]["grouping"]] == ["group", "jobType"]


def test_a_workspace_that_cannot_be_saved_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert utils.run_cli(wandb_workspace.main, ["--dry_run"]) == 0
    assert "val/r2_c_ridge" in capsys.readouterr().out
    monkeypatch.setattr("wandb.login", lambda **settings: False)
    assert utils.run_cli(wandb_workspace.main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wandb login" in line
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces")
    assert utils.run_cli(wandb_workspace.main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bash scripts/setup.sh requirements-wandb.txt" in line
