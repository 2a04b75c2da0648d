#!/usr/bin/env bash
# Fetch data and weights. The same command continues a download that was interrupted.
#
#   bash scripts/download.sh --dry_run                       the plan: what, how large, where to; needs no network
#   bash scripts/download.sh                                 everything for all eight subjects: 62 GB
#   bash scripts/download.sh --subj 1 --to /big/disk         one subject (49 GB) to another disk, linked into ROOT
#   bash scripts/download.sh --what betas trials --verify    groups of files, also compared with published checksums
#
# Knobs, in front of the command:
#   ROOT=<the repository>      the folder that the data go to
#   DRY_RUN=0                  1: as --dry_run
#   PYTHON=.venv/bin/python    the Python to use
#   DOWNLOAD_FLAGS=""          flags to put in front of yours
#
# All flags with their defaults: python3 src/download.py --help
source "$(dirname "$0")/common.sh"
preset DOWNLOAD
run "$PYTHON" "$REPO/src/download.py" "${FLAGS[@]}" "$@"
