#!/usr/bin/env bash
# Turn SUBJ's scores into images: bash scripts/recon.sh [flags of recon.py]
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/recon.sh    (GPUs share the images)
source "$(dirname "$0")/common.sh"
run "${LAUNCH[@]}" "$REPO/src/recon.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
