"""Programs in files are not run, and secrets of the environment are written nowhere."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import recon
import score_c
import train_c
from damages import Program
from evaluation import networks
from whole_world import FLAGS, NEW

REPO = Path(__file__).resolve().parent.parent


def test_no_file_is_read_that_may_run_a_program():
    """Every call that reads a pickle, or may, is told not to run what it holds."""
    found = []
    for file in [file for folder in ("src", "demo", "benchmarks") for file in (REPO / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (name == "torch.load" and given.get("weights_only") != "True"
                    or name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"
                    or name.split(".")[0] in ("pickle", "dill", "joblib", "marshal", "shelve")
                    or name in ("yaml.load", "yaml.unsafe_load", "eval", "exec") or name.endswith("read_pickle")
                    or given.get("trust_remote_code", "False") != "False"):
                found.append(f"{file.relative_to(REPO)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, found


def test_weights_of_judges_run_no_program(tmp_path, monkeypatch):
    """torchvision and the hub's code load what lies in the hub's folder; here a file that carries a program."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weight": Program(tmp_path / "executed")}, tmp_path / "checkpoints/alexnet.pth")
    networks.load_networks("none", torch.device("cpu"), tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.hub.load_state_dict_from_url("https://nowhere/alexnet.pth")
    assert not (tmp_path / "executed").exists()


def test_secrets_of_the_environment_reach_no_file(whole_world, monkeypatch):
    secrets = {"HF_TOKEN": "hf_" + "thisisasecret" * 3, "WANDB_API_KEY": "5ec7e7" * 7}
    for name, value in {**secrets, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    # a process of its own: W&B's service, once started, would see the environment of no other test
    words = ["--root", whole_world.root, *FLAGS[train_c], "--wandb_log"]
    subprocess.run([sys.executable, REPO / "src/train_c.py", *map(str, words)], check=True, capture_output=True)
    for script, flags in ((score_c, []), (recon, [*NEW, "--limit", 2]), (evaluate, NEW)):
        assert whole_world.run(script, *flags) == 0
    assert list(whole_world.root.rglob("*.wandb"))  # is looked through as well
    for path in whole_world.root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        leaked = [name for name, value in secrets.items() if value.encode() in content]
        assert not leaked, f"{path} holds {leaked}"
