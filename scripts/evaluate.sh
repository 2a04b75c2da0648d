#!/usr/bin/env bash
# Measure SUBJ's reconstructions and write a report: bash scripts/evaluate.sh [flags of evaluate.py]
#   bash scripts/evaluate.sh --compare unguided=DIR           bash scripts/evaluate.sh --subjects 1 2 5 7
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/evaluate.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
