#!/usr/bin/env bash
# See whether everything is there and right, and what mends it: bash scripts/check_data.sh [flags of check_data.py]
#   bash scripts/check_data.sh --subj 1 --stages train score            bash scripts/check_data.sh --deep
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/check_data.py" "${FLAGS[@]}" "$@"
