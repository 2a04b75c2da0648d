"""The SLURM scripts, run as SLURM would run them: its commands are stand-ins that write down how they were called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def slurm(tmp_path):
    """An environment whose SLURM commands log to calls.txt; sbatch prints job numbers 100, 101, ..."""
    commands = tmp_path / "bin"
    commands.mkdir()
    log = tmp_path / "calls.txt"
    for name in ("sbatch", "scontrol", "srun"):
        lines = ["#!/usr/bin/env bash", f'echo "{name} STAGES=${{STAGES:-}} FEATS=${{FEATS:-}} $*" >>"{log}"']
        if name == "srun":  # on one of the machines
            lines.append('shift; SLURM_NODEID=1 "$@"')
        if name == "scontrol":
            lines.append('[[ $1 != show ]] || echo node1')
        if name == "sbatch":
            lines.append(f'echo $((99 + $(grep -c ^sbatch "{log}")))')
        (commands / name).write_text("\n".join(lines) + "\n")
        (commands / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1", "SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "7"}
    return environment, log


@pytest.fixture
def training(tmp_path):
    """A stand-in for Python that trains as a run does: epoch by epoch, from what is saved; SIGTERM ends it, saved, with
    128 + 15 (what test_training.py says of the real one). What it is called with is written down."""
    program = tmp_path / "training"
    program.write_text(f"""#!/usr/bin/env bash
cd "{tmp_path}"
echo "$*" >>words
trap 'sleep 0.3; echo $epoch >saved; exit 143' TERM
epoch=$(cat saved || echo 0)
while true; do epoch=$((epoch + 1)); echo $epoch >>epochs; sleep 0.05; done
""")
    program.chmod(0o755)
    return program


def test_a_job_out_of_time_saves_and_is_queued_again(tmp_path, slurm, training):
    environment, log = slurm
    copy = tmp_path / "slurm_script"  # SLURM runs a copy from its spool folder
    copy.write_bytes((REPO / "scripts/slurm/train.slurm").read_bytes())
    environment |= {"STAGES": "pretrain", "FEATS": "z c", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1",
                    "ROOT": str(tmp_path), "PYTHON": str(training)}
    epochs = tmp_path / "epochs"
    command = ["bash", str(copy), "--hidden_dim", "8"]

    def run_out_of_time(already):
        """Run the job until it has trained an epoch more than `already`; returns the epoch it saved."""
        job = subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
        while job.poll() is None and not (epochs.exists() and len(epochs.read_text().split()) > already):
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        output = job.communicate(timeout=60)
        assert job.returncode == 0, output
        return int((tmp_path / "saved").read_text())

    first = run_out_of_time(0)
    assert "scontrol" in log.read_text() and "requeue 5_1" in log.read_text()
    trained = epochs.read_text().split()
    assert trained == [str(epoch + 1) for epoch in range(first)]
    assert run_out_of_time(first) > first  # from the queue again, and on from there
    again, from_queue = (tmp_path / "words").read_text().splitlines()
    assert again == from_queue and "train_c.py --multi_subject" in again and "--resume" in again
    assert again.endswith("--hidden_dim 8")


def test_a_job_that_fails_is_not_queued_again(tmp_path, slurm):
    environment, log = slurm
    environment |= {"STAGES": "pretrain", "FEATS": "c", "ROOT": str(tmp_path)}
    job = subprocess.run(["bash", str(REPO / "scripts/slurm/train.slurm"), "--no_such_flag"], env=environment,
                         cwd=tmp_path, capture_output=True, text=True, check=False)
    assert job.returncode == 2 and "--no_such_flag" in job.stderr
    assert not log.exists()


@pytest.fixture
def accelerate(tmp_path):
    """A stand-in that writes down its arguments."""
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    (folder / "accelerate").write_text(f'#!/usr/bin/env bash\necho "$*" >>"{tmp_path}/launched.txt"\n')
    (folder / "accelerate").chmod(0o755)
    return folder / "python", tmp_path / "launched.txt"


def test_several_machines_get_one_rank_each(tmp_path, slurm, accelerate):
    environment, _ = slurm
    environment |= {"STAGES": "pretrain", "FEATS": "c", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
                    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "12345", "PYTHON": str(accelerate[0])}
    subprocess.run(["bash", str(REPO / "scripts/slurm/train.slurm"), "--batch_size", "336"], env=environment,
                   cwd=tmp_path, check=True, capture_output=True)
    (call,) = accelerate[1].read_text().splitlines()
    assert "--num_machines 2 --num_processes 8 --main_process_ip node1" in call
    assert "--main_process_port 32345 --machine_rank 1" in call
    assert "multi_node.yaml" in call and "train_c.py --multi_subject" in call and call.endswith("--batch_size 336")


def test_a_users_launcher_is_used(tmp_path, slurm, accelerate):
    environment, _ = slurm
    environment |= {"STAGES": "pretrain", "FEATS": "c", "LAUNCH": "accelerate launch --config_file x.yaml",
                    "PYTHON": str(accelerate[0])}
    subprocess.run(["bash", str(REPO / "scripts/slurm/train.slurm")], env=environment, cwd=tmp_path, check=True,
                   capture_output=True)
    assert accelerate[1].read_text().startswith("launch --config_file x.yaml")


def test_stages_wait_for_each_other(slurm):
    environment, log = slurm
    environment |= {"SUBJ": "2", "FEATS": "c g_2 z g_4"}
    subprocess.run(["bash", str(REPO / "scripts/slurm/submit.sh"), "--wandb_log", "--tag", "a"], env=environment,
                   check=True, capture_output=True)
    pretrain, finetune, score = log.read_text().splitlines()
    assert "STAGES=pretrain FEATS=c g_2 z g_4" in pretrain and "--array 0-2" in pretrain  # c, z, both layers
    assert pretrain.endswith("train.slurm --wandb_log --tag a")
    assert "STAGES=finetune" in finetune and "aftercorr:100" in finetune
    assert "afterok:101" in score and score.endswith("score.sh --wandb_log --tag a")


@pytest.mark.parametrize("file", sorted((REPO / "scripts/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configuration(file):
    """By accelerate's own reader, which refuses unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    assert set(yaml.safe_load(file.read_text())) <= set(vars(config))
