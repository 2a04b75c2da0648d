#!/usr/bin/env bash
# Predict FEATS of SUBJ's test images from fMRI: bash scripts/score.sh [flags of score_c.py]
#   STAGES=gnet bash scripts/score.sh [flags of score_gnet.py]      (the reverse: responses to images, predicted by GNet)
source "$(dirname "$0")/common.sh"

if [[ ${STAGES[*]} == gnet ]]; then
    run "$PYTHON" "$REPO/src/score_gnet.py" --subj "$SUBJ" "${FLAGS[@]}" "$@"
    exit
fi
for feat in c z; do
    if wants "$feat"; then run "$PYTHON" "$REPO/src/score_$feat.py" --subj "$SUBJ" "${FLAGS[@]}" "$@"; fi
done
if [[ ${#G_FEATS[@]} -gt 0 ]]; then
    run "$PYTHON" "$REPO/src/score_g.py" --feat "${G_FEATS[@]}" --subj "$SUBJ" "${FLAGS[@]}" "$@"
fi
