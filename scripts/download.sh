#!/usr/bin/env bash
# Fetch data and weights: bash scripts/download.sh [flags of download.py]
#   bash scripts/download.sh --dry_run                bash scripts/download.sh --subj 1 --to /big/disk
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/download.py" "${FLAGS[@]}" "$@"
