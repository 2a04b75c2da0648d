#!/usr/bin/env bash
# Extract c, z and g_2...g_12 of the stimuli: bash scripts/features.sh [flags of img2feat.py]
#   bash scripts/features.sh --subj 1                 (only the images that subject 1 saw; run again, it adds what is missing)
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/features.sh     (GPUs share the images)
source "$(dirname "$0")/common.sh"
run "${LAUNCH[@]}" "$REPO/src/img2feat.py" "${FLAGS[@]}" "$@"
