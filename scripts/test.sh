#!/usr/bin/env bash
# Set up and run all tests, several at a time: bash scripts/test.sh [flags of pytest, such as -n 0 or -k recon]
source "$(dirname "$0")/common.sh"
cd "$REPO"
bash scripts/setup.sh requirements-dev.txt
# A test's networks are too small for several threads; tests side by side make better use of them.
export OMP_NUM_THREADS=1
export PATH=$REPO/.venv/bin:$PATH PYTHON=$REPO/.venv/bin/python HF_HUB_OFFLINE=1 WANDB_MODE=offline
run ruff check .
run shellcheck -x -P SCRIPTDIR scripts/*.sh scripts/slurm/submit.sh
run shellcheck -x scripts/slurm/train.slurm
run "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
