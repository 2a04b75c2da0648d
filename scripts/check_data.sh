#!/usr/bin/env bash
# Check that everything is there and correct, and say what repairs it: bash scripts/check_data.sh [flags of check_data.py]
#   bash scripts/check_data.sh --subj 1 --stages train score            bash scripts/check_data.sh --deep
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/check_data.py" "${FLAGS[@]}" "$@"
