"""Several processes compute what one computes, and a checkpoint of any launcher goes on under any other.

With dropout off; its masks are each process's own. Real launches: `accelerate launch` with the project's own
configurations, on the CPU: two gloo processes (DDP), and DeepSpeed ZeRO-2 in one (its CPU accelerator takes no more).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils
from models import Decoder
from shared import built_once, one_launch_at_a_time
from tiny_runs import (
    SCRATCH,
    SMALL,
    SRC,
    VARIANTS,
    checkpoint,
    copy_world,
    paths_of,
    stopped_at,
    train,
    write_world,
)
from training.objectives import ComponentObjective
from training.team import ALONE, Team

TESTS = Path(__file__).parent
SCIENCE = ["--dropout", 0, "--num_epochs", 4, "--max_lr", 3e-3, "--resume"]
TOLERANCE = 2e-5  # relative, of an epoch's losses: sums in another order


def team_of(rank, size):
    return Team("cpu", rank, size)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(4, 6), (1, 2, 3), (2,)])
def test_every_row_belongs_to_one_process(size, sizes):
    voxels, start = {}, 0
    for number, n in enumerate(sizes):
        voxels[f"subj{number}"] = torch.arange(start, start + n)
        start += n
    taken = [torch.cat(list(team_of(rank, size).take_voxels(voxels).values())) for rank in range(size)]
    for rank, rows in enumerate(taken):
        assert rows.tolist() == list(range(start))[rank::size] == team_of(rank, size).take(torch.arange(start)).tolist()


@pytest.mark.parametrize("offset", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 5, 6, 7])
def test_join_undoes_take_and_keeps_the_own_gradient(monkeypatch, n, offset):
    """all_gather replaced by what the three processes would send."""
    size, joint = 3, torch.randn(n, 4)
    shares = [team_of(rank, size).take(joint, offset) for rank in range(size)]

    def all_gather(parts, padded):
        for part, share in zip(parts, shares, strict=True):
            part.zero_()
            part[:len(share)] = share

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank in range(size):
        own = shares[rank].clone().requires_grad_()
        joined = team_of(rank, size).join(own, n, offset)
        assert torch.equal(joined, joint)
        weight = torch.randn(n, 4)
        if len(own):
            (gradient,) = torch.autograd.grad((joined * weight).sum(), own)
            assert torch.equal(gradient, team_of(rank, size).take(weight, offset))


@pytest.mark.parametrize(("training", "progress", "mixed"), [(True, 0.2, 1), (True, 0.6, 0), (False, 0.2, 0)])
def test_voxels_are_gathered_only_where_they_are_mixed(monkeypatch, training, progress, mixed):
    widths = []

    def all_gather(parts, padded):
        widths.append(padded.shape[1])
        for part in parts:
            part.copy_(padded)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    objective = ComponentObjective({"c": SimpleNamespace(total=1.0)}, mixup_pct=0.5)
    batch = {"voxels": {"subj01": torch.randn(2, 11)}, "sizes": {"subj01": 4}, "image_ids": torch.arange(4),
             "c": torch.randn(2, 5)}
    objective(Decoder({"subj01": 11}, 8, {"c": 5}).train(training), batch, progress, team=team_of(0, 2))
    assert 5 in widths and widths.count(11) == mixed


def test_alone_is_free():
    rows = torch.randn(5, 2, requires_grad=True)
    assert ALONE.join(rows, 5) is rows and torch.equal(ALONE.take(rows), rows) and not ALONE.any(False)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
@pytest.mark.parametrize("failing", [False, True])
def test_gloos_threads_end_before_python_does(failing):
    """With the network still in a cycle; a thread that lives on can abort the process at its exit."""
    def main(argv):
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        net.itself = [net]
        net(torch.ones(1, 2)).sum().backward()
        assert gloo_threads()
        if failing:
            raise utils.UserError("alone")

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert utils.run_cli(main) == 2 * failing
    assert not torch.distributed.is_initialized()
    soon = time.monotonic() + 2  # the system lists a thread for a moment after its end
    while gloo_threads() and time.monotonic() < soon:
        time.sleep(0.01)
    assert not gloo_threads()


def gloo_threads():
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found += [task] * ("gloo" in (task / "comm").read_text())
    return found


# --- real launches ------------------------------------------------------------------------------------------------


def losses_of(paths, variant):
    return losses_in(paths.run(SCRATCH + variant) / "metrics.jsonl")


def losses_in(file):
    """Losses and R2 of every epoch, (epochs, metrics)."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    keys = sorted(key for key in rows[0] if "loss" in key or "r2" in key)
    return torch.tensor([[row[key] for key in keys] for row in rows])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A world with runs of one process that were stopped after six of their steps, and the losses of whole ones."""
    def build(folder):
        paths = write_world(folder)
        for variant, (objective, flags) in VARIANTS.items():
            run = paths.run(SCRATCH + variant)
            assert train(paths, *SCIENCE, *flags) == 0
            (run / "metrics.jsonl").rename(folder / f"whole{variant}.jsonl")
            shutil.rmtree(run)
            with stopped_at(6, objective):
                assert train(paths, *SCIENCE, *flags) == 143
            assert position(paths, variant) == {"": (1, 2), "_k": (1, 2), "_few": (1, 1)}[variant]

    folder = built_once(tmp_path_factory, "alone", build)
    return paths_of(folder), {variant: losses_in(folder / f"whole{variant}.jsonl") for variant in VARIANTS}


def position(paths, variant):
    state = checkpoint(paths, SCRATCH + variant)
    return state["epoch"], state["step"]


def launched(config, stopped, tmp_path_factory, steps):
    """Train under a configuration of scripts/accelerate, first from nothing, then from the run that was stopped.

    steps: in which of its own steps each of the two is stopped by SIGTERM, 0 = nowhere. Returns Paths of both worlds.
    """
    def build(folder):
        with one_launch_at_a_time():
            launch(config, [copy_world(stopped, folder / name) for name in ("anew", "went_on")], steps)

    folder = built_once(tmp_path_factory, config, build)
    return paths_of(folder / "anew"), paths_of(folder / "went_on")


def launch(config, worlds, steps):
    for variant in VARIANTS:
        shutil.rmtree(worlds[0].run(SCRATCH + variant))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SRC}:{TESTS}", "DS_ACCELERATOR": "cpu"}
    program = [TESTS / "tiny_runs.py", *(f"{world.root}:{step}" for world, step in zip(worlds, steps, strict=True))]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               SRC.parent / f"scripts/accelerate/{config}.yaml", "--num_processes", {"ddp": 2, "zero2": 1}[config],
               *program, *SMALL, *SCIENCE]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    said = {"ddp": "; 2 processes, cpu", "zero2": "; DeepSpeed, 1 process, cpu"}[config]
    assert result.stdout.count(said) == 2 * len(VARIANTS)


@pytest.fixture(scope="module")
def ddp(alone, tmp_path_factory):
    """Two gloo processes; they agree to stop at the end of an epoch, or after 20 steps."""
    return launched("ddp", alone[0], tmp_path_factory, steps=(6, 0))


@pytest.fixture(scope="module")
def zero2(alone, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU communication with g++")
    return launched("zero2", alone[0], tmp_path_factory, steps=(0, 5))


def assert_as_alone(paths, alone, variant):
    expected = alone[1][variant]
    assert len(expected) == 4 and expected.shape[1] >= 5
    torch.testing.assert_close(losses_of(paths, variant), expected, rtol=TOLERANCE, atol=1e-6)


each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_two_processes_compute_what_one_computes_and_one_goes_on_from_them(ddp, alone, variant):
    assert position(ddp[0], variant) == (2, 0)
    assert train(ddp[0], *SCIENCE, *VARIANTS[variant][1]) == 0
    assert_as_alone(ddp[0], alone, variant)


@each_variant
def test_two_processes_go_on_from_one(ddp, alone, variant):
    assert_as_alone(ddp[1], alone, variant)


@each_variant
def test_zero2_computes_what_one_process_computes(zero2, alone, variant):
    assert_as_alone(zero2[0], alone, variant)


@each_variant
def test_zero2_goes_on_from_one_process_and_the_reverse(zero2, alone, variant):
    assert position(zero2[1], variant) == {"": (2, 3), "_k": (2, 3), "_few": (2, 1)}[variant]  # five steps later
    moments = checkpoint(zero2[1], SCRATCH + variant)["optimizer"]
    assert moments["step"] == 11 and len(moments["exp_avg"]) > 10
    assert train(zero2[1], *SCIENCE, *VARIANTS[variant][1]) == 0
    assert_as_alone(zero2[1], alone, variant)
