#!/usr/bin/env bash
# Set up, check the style and run all tests, side by side on up to four cores; flags go to pytest.
#
#   bash scripts/test.sh                   all of them: 6 to 8 minutes
#   bash scripts/test.sh -k recon          the tests of this name
#   bash scripts/test.sh -n 0 --pdb        one after another, a debugger at the first failure
#
# PYTHON=/path/to/python3 chooses the Python that .venv is made of (3.11 or newer).
source "$(dirname "$0")/help.sh"
# shellcheck disable=SC2046
unset FEATS STAGES LAUNCH WANDB_LOG DRY_RUN SUBJ ROOT $(compgen -v | grep '_FLAGS$') # the tests set what they mean
source "$(dirname "$0")/common.sh"
cd "$REPO"
bash scripts/setup.sh requirements-dev.txt
export PATH=$REPO/.venv/bin:$PATH PYTHON=$REPO/.venv/bin/python HF_HUB_OFFLINE=1 WANDB_MODE=offline
run ruff check .
run shellcheck -x -P SCRIPTDIR scripts/*.sh scripts/slurm/submit.sh
run shellcheck -x scripts/slurm/train.slurm
# The workers share the cores: a thread each, which sleeps when it waits.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
run "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
