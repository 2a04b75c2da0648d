#!/usr/bin/env bash
# Predict FEATS of SUBJ's test images from fMRI: bash scripts/score.sh [flags of score_c.py and score_g.py]
source "$(dirname "$0")/common.sh"

if wants c; then run "$PYTHON" "$REPO/src/score_c.py" --subj "$SUBJ" "${FLAGS[@]}" "$@"; fi
if [[ ${#G_FEATS[@]} -gt 0 ]]; then
    run "$PYTHON" "$REPO/src/score_g.py" --feat "${G_FEATS[@]}" --subj "$SUBJ" "${FLAGS[@]}" "$@"
fi
