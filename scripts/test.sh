#!/usr/bin/env bash
# Set up and run all tests, side by side on up to four cores: bash scripts/test.sh [flags of pytest, such as -k recon]
source "$(dirname "$0")/common.sh"
cd "$REPO"
bash scripts/setup.sh requirements-dev.txt
export PATH=$REPO/.venv/bin:$PATH PYTHON=$REPO/.venv/bin/python HF_HUB_OFFLINE=1 WANDB_MODE=offline
run ruff check .
run shellcheck -x -P SCRIPTDIR scripts/*.sh scripts/slurm/submit.sh
run shellcheck -x scripts/slurm/train.slurm
export OMP_NUM_THREADS=1 # the tests share the cores
run "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
