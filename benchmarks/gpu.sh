#!/usr/bin/env bash
# What does this card do? Everything that costs time, at NSD's and Stable Diffusion 1.4's sizes with random weights.
#
#   bash benchmarks/gpu.sh [minutes]          10 minutes at most; writes benchmarks/gpu-<card>.md as it goes
#
# Needs the packages of requirements.txt and no network: those of .venv, or of PYTHON=/path/to/python3, whose PYTHONPATH
# may lead to wheels that were brought along (pip install --no-index --target). benchmarks/gpu.py --help says more.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
PYTHONUNBUFFERED=1 exec "$python" benchmarks/gpu.py --minutes "${1:-10}" "${@:2}"
