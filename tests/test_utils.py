"""Paths, names, files that are whole or absent, seeds, and the rules of the command line."""

import argparse
import json
import os
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import options
import recon
import score_c
import score_g
import score_z
import train_adapter
import train_c
import train_g
import train_gnet
import train_z
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import atomic_path, remove_leftovers, save_json, this_host
from disk.names import Paths, run_name
from disk.scores import load_scores, save_scores


@pytest.mark.parametrize(("arguments", "name"), [  # letter by letter
    (("pretrain", "subj01", "c", 1024), "multisubject_subj01_ext1_c_1024_mlp"),
    (("pretrain", "subj01", "g_2", 1024), "multisubject_subj01_ext1_g_2_1024"),
    (("finetune", "subj01", "z", 1024, 40), "pretrained_subj01_40sess_ext1_z_1024"),
    (("finetune", "subj05", "c", 512, 1), "pretrained_subj05_1sess_ext1_c_512_mlp"),
    (("scratch", "subj05", "g_2", 512, 40, "v2"), "scratch_subj05_40sess_ext1_g_2_512_v2"),
    (("ridge", "subj01", "c", 1024, 1), "ridge_subj01_1sess_ext1_c"),
    (("scratch", "subj01", "gnet", None), "gnet_subj01"),
    (("pretrain", "subj01", "gnet", None, 40, "v2"), "gnet_multisubject_v2"),
    (("scratch", "subj02", "adapter", None, 40, "v2"), "adapter_subj02_v2"),
])
def test_run_names(arguments, name):
    assert run_name(*arguments) == name


def test_paths_on_disk(tmp_path):
    paths = Paths(tmp_path, tmp_path / "MindEyeV2/mindeyev2")
    assert paths.scores("subj01", "run", "g_12") == tmp_path / "scores_all/subj01/run/Linear-12"
    assert paths.scores("subj01", "run_shuffle", "c") == tmp_path / "scores_all/subj01/run_shuffle"
    assert paths.images("subj01", "cp_4096_v1", 3e5, 0.2) == tmp_path / "outputs_all/subj01/cp_4096_v1/300000/0.2"
    assert paths.images("subj01", "cp_4096_v1", 0.0, 0.2) == tmp_path / "outputs_all/subj01/cp_4096_v1/0/0"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.json"
    save_json(path, {"a": 1})
    with pytest.raises(TypeError):
        save_json(path, {"a": object()})
    with pytest.raises(utils.UserError, match="value.json: could not be written: disk full"):
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_checkpoints_round_trip_and_refuse_what_they_are_not(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"model": {"w": torch.arange(3)}, "epoch": 2})
    assert load_checkpoint(path, keys=("model",))["model"]["w"].tolist() == [0, 1, 2]
    torch.save({"model": {}}, path)
    with pytest.raises(utils.UserError, match="format None"):
        load_checkpoint(path)
    path.write_bytes(b"no zip")
    with pytest.raises(utils.UserError, match="not a readable checkpoint"):
        load_checkpoint(path)
    with pytest.raises(utils.UserError, match="not found"):
        load_checkpoint(tmp_path / "none.pth")


def test_scores_must_match_their_ids(tmp_path):
    save_scores(tmp_path, [2, 5, 9], {"nsdgeneral": np.ones((3, 2, 2))}, {})
    ids, scores = load_scores(tmp_path)
    assert ids.tolist() == [2, 5, 9] and scores.shape == (3, 2, 2) and scores.dtype == np.float32
    for wrong in ([2, 9, 5], [2, 5], [2, 5, 5]):
        np.save(tmp_path / "image_ids.npy", np.array(wrong))
        with pytest.raises(utils.UserError, match="ascending"):
            load_scores(tmp_path)


def test_derived_seeds_differ_and_repeat():
    seeds = {utils.derive_seed(seed, image, sample) for seed in range(3) for image in range(50) for sample in range(3)}
    assert len(seeds) == 450 and utils.derive_seed(1, 2, 3) == utils.derive_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_run_cli_prints_one_line(capsys):
    def fail(argv):
        raise utils.UserError("Caught UserError in DataLoader worker process 0.\nTraceback ...\nutils.UserError: row 3")

    assert utils.run_cli(fail, []) == 2
    assert capsys.readouterr().err == "error: row 3\n"
    assert utils.run_cli(lambda argv: None, []) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_scripts_keep_freed_memory():
    program = """if True:
        import mmap
        import numpy as np
        import utils

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE >> 20

        def use(argv=None):
            before = resident()
            np.ones(2**22)  # 32 MB, freed at once
            left.append(resident() - before)

        left = []
        use()
        utils.run_cli(use)
        print(*left)
        """
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONPATH": str(utils.REPOSITORY / "src")})
    before, kept = map(int, shown.stdout.split())
    assert before < 4 and kept > 28


def test_scripts_end_without_looking_for_cycles():
    program = """if True:
        import atexit
        import gc
        import utils

        atexit.register(lambda: print(gc.get_freeze_count()))  # runs after what is registered later
        utils.run_cli(lambda argv: print(gc.get_threshold()[0], gc.isenabled(), gc.get_freeze_count()))
        """
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONPATH": str(utils.REPOSITORY / "src")})
    seldom, enabled, meanwhile, in_the_end = shown.stdout.split()
    assert int(seldom) > 5000 and enabled == "True" and meanwhile == "0" and int(in_the_end) > 1000


def test_seeds():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    utils.seed_everything(2**63 - 1)
    ours = drawn()
    random.seed(2**63 - 1)
    np.random.seed(2**32 - 1)
    torch.manual_seed(2**63 - 1)
    assert ours == drawn()


def test_flags(capsys):
    parser = options.Parser("doc")
    options.add_subject(parser)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    args = parser.parse_args(["--subject", "subj02", "--guidance-scale=3e5", "--no-resume"])
    assert (args.subj, args.guidance_scale, args.resume) == ("subj02", 3e5, False)
    assert parser.parse_args(["--subj", "7"]).subj == "subj07"
    for wrong in (["--guidance", "1"], ["--subj", "0"], ["--subj", "100"], ["--subj", "x"], ["--nothing"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(wrong)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("subj", "sessions"), [(1, 40), (3, 32), (4, 30), (8, 30)])
def test_all_sessions_of_the_subject_are_the_default(subj, sessions):
    parser = options.Parser("doc")
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    assert parser.parse_args(["--subj", str(subj)]).num_sessions == sessions
    assert parser.parse_args(["--subj", str(subj), "--num_sessions", "2"]).num_sessions == 2


def test_sessions_of_other_data_are_counted_on_disk(tmp_path):
    shards = tmp_path / "MindEyeV2/mindeyev2/wds/subj01/train"
    assert options.sessions_of("subj01", tmp_path) == 40 and options.sessions_of("subj09", tmp_path) is None
    shards.mkdir(parents=True)
    for number in range(3):
        (shards / f"{number}.tar").touch()
    assert options.sessions_of("subj01", tmp_path) == 3
    assert options.sessions_of("subj01", "/nowhere", tmp_path / "MindEyeV2/mindeyev2") == 3
    design = tmp_path / "nsddata/experiments/nsd/nsd_expdesign.mat"  # NSD's, of which three sessions are there
    design.parent.mkdir(parents=True)
    design.touch()
    assert options.sessions_of("subj01", tmp_path) == 40 and options.sessions_of("subj09", tmp_path) is None
    parser = options.Parser("doc")
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    with pytest.raises(utils.UserError, match=r"--subj 9: no session of subj09 found .* check --subj"):
        parser.parse_args(["--root", str(tmp_path), "--subj", "9"])


def test_dry_run_prints_and_stops(capsys):
    parser = options.Parser("doc")
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--dry_run", "--hidden_dim", "2e3"])
    assert stop.value.code == 0 and json.loads(capsys.readouterr().out)["hidden_dim"] == 2000


@pytest.mark.parametrize(("script", "flags", "folders"), [
    (train_c, ["--multi_subject"], ["train_logs/multisubject_subj01_ext1_c_1024_mlp"]),
    (train_z, ["--model", "ridge", "--tag", "a"], ["train_logs/ridge_subj01_40sess_ext1_z_a"]),
    (train_g, ["--multisubject_ckpt", "auto"], ["train_logs/pretrained_subj01_40sess_ext1_g_1024"]),
    (train_g, ["--model", "mindeye2", "--feat", "g_2", "g_4"],
     [f"train_logs/scratch_subj01_40sess_ext1_g_{k}_1024" for k in (2, 4)]),
    (train_gnet, ["--subj", "2"], ["train_logs/gnet_subj02"]),
    (train_adapter, ["--subj", "2"], ["train_logs/adapter_subj02"]),
    (score_c, ["--control", "shuffle"], ["scores_all/subj01/pretrained_subj01_40sess_ext1_c_1024_mlp_shuffle"]),
    (score_z, ["--ground_truth"], ["scores_all/subj01/ground_truth_subj01_z"]),
    (score_g, ["--feat", "g_2", "--run", "ridge"], ["scores_all/subj01/ridge_subj01_40sess_ext1_g_2/Linear-2"]),
    (recon, [], ["outputs_all/subj01/cp_4096_v1/30/0.8"]),
    (recon, ["--feats", "none"], ["outputs_all/subj01/cp_4096_v1/0/0"]),
    (recon, ["--use_adapter"], ["outputs_all/subj01/cp_4096_v1_adapter/30/0.8"]),
    (recon, ["--outdir", "here"], ["here"]),
])
def test_a_dry_run_shows_the_folders_that_would_be_written(tmp_path, capsys, script, flags, folders):
    with pytest.raises(SystemExit) as stop:
        script.main(["--root", str(tmp_path), "--dry_run", *flags])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["writes"] == [str(tmp_path / folder) for folder in folders]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["g_3", "g_0", "g_", "d", "g_x", ""])
def test_wrong_features(text):
    with pytest.raises(argparse.ArgumentTypeError):
        options.feature(text)


def test_leftovers_of_living_processes_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".a.png.{this_host()}.{pid}.tmp").touch()
    others = {".mine.tmp", f".a.png.another-host.{dead.pid}.tmp"}
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f".a.png.{this_host()}.{os.getpid()}.tmp", *others}
