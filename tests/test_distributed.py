"""Several processes compute what one computes, and a checkpoint of any launcher goes on under any other.

With dropout off; its masks are each process's own. Real launches: `accelerate launch` with the project's own
configurations, on the CPU: two gloo processes (DDP), and DeepSpeed ZeRO-2 in one (its CPU accelerator takes no more).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
from tiny_runs import SCRATCH, SRC, checkpoint, flags_of, train, write_world
from training.team import ALONE, Team

REPO = SRC.parent
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
    assert not torch.distributed.is_initialized() and not gloo_threads()


def gloo_threads():
    return [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]


# --- real launches ------------------------------------------------------------------------------------------------


def launch(paths, config, stop_at=None):
    """Train under a configuration of scripts/accelerate; stop_at: the step at which every process gets SIGTERM."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SRC}:{Path(__file__).parent}"}
    environment["DS_ACCELERATOR"] = "cpu"
    processes = {"ddp": 2, "zero2": 1}[config]
    program = [SRC / "train_c.py"] if stop_at is None else [Path(__file__).parent / "tiny_runs.py", stop_at]
    accelerate = Path(sys.executable).parent / "accelerate"
    command = [accelerate, "launch", "--config_file", REPO / f"scripts/accelerate/{config}.yaml", "--num_processes",
               processes, *program, *flags_of(paths, *SCIENCE)]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (stop_at is None), result.stdout + result.stderr
    assert {"ddp": "; 2 processes, cpu", "zero2": "; DeepSpeed, 1 process, cpu"}[config] in result.stdout


def losses_of(paths):
    rows = [json.loads(line) for line in (paths.run(SCRATCH) / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "train/loss_clip", "train/loss_prior", "val/loss", "val/loss_prior")
    return torch.tensor([[row[key] for key in keys] for row in rows])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A world, the losses of a run of one process, and that run's checkpoint after six of its 16 steps."""
    paths = write_world(tmp_path_factory.mktemp("alone"))
    assert train(paths, *SCIENCE) == 0
    whole = losses_of(paths)
    shutil.rmtree(paths.run(SCRATCH))
    output = subprocess.run([sys.executable, str(Path(__file__).parent / "tiny_runs.py"), "6",
                             *flags_of(paths, *SCIENCE)], env={**os.environ, "PYTHONPATH": str(SRC)},
                            capture_output=True, text=True, check=False)
    assert output.returncode == 143, output.stderr
    return paths, whole


@pytest.fixture
def paths(alone, tmp_path, one_launch):
    """The world of `alone`, with its stopped run."""
    shutil.copytree(alone[0].root, tmp_path / "copy")
    return type(alone[0])(tmp_path / "copy", tmp_path / "copy/MindEyeV2/mindeyev2")


def test_two_processes_compute_what_one_computes(paths, alone):
    shutil.rmtree(paths.run(SCRATCH))
    launch(paths, "ddp")
    assert losses_of(paths).shape == (4, 5)
    torch.testing.assert_close(losses_of(paths), alone[1], rtol=TOLERANCE, atol=1e-6)


def test_ddp_goes_on_from_one_process(paths, alone):
    stopped = checkpoint(paths)
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    launch(paths, "ddp")
    torch.testing.assert_close(losses_of(paths), alone[1], rtol=TOLERANCE, atol=1e-6)


def test_one_process_goes_on_from_ddp(paths, alone):
    shutil.rmtree(paths.run(SCRATCH))
    launch(paths, "ddp", stop_at=6)
    assert checkpoint(paths)["epoch"] == 2  # several processes agree to stop at the end of the epoch, or after 20 steps
    assert train(paths, *SCIENCE) == 0
    torch.testing.assert_close(losses_of(paths), alone[1], rtol=TOLERANCE, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
def test_zero2_goes_on_from_one_process_and_the_reverse(paths, alone):
    launch(paths, "zero2", stop_at=5)  # from (1, 2) to (2, 3)
    stopped = checkpoint(paths)
    assert (stopped["epoch"], stopped["step"]) == (2, 3)
    assert stopped["optimizer"]["step"] == 11 and len(stopped["optimizer"]["exp_avg"]) > 10
    assert train(paths, *SCIENCE) == 0
    torch.testing.assert_close(losses_of(paths), alone[1], rtol=TOLERANCE, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
def test_zero2_computes_what_one_process_computes(paths, alone):
    shutil.rmtree(paths.run(SCRATCH))
    launch(paths, "zero2")
    torch.testing.assert_close(losses_of(paths), alone[1], rtol=TOLERANCE, atol=1e-6)
