#!/usr/bin/env bash
# Measure SUBJ's reconstructions and draw the contact sheet: bash scripts/evaluate.sh [flags of evaluate.py]
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/evaluate.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
