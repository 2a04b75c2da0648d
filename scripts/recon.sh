#!/usr/bin/env bash
# Turn SUBJ's scores into images: bash scripts/recon.sh [flags of recon.py]
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/recon.sh    (GPUs share the images)
#   bash scripts/recon.sh --use_gnet --gnet_roi V1 --gnet_kappa 1    (the measured response guides too: train GNet first)
#   bash scripts/recon.sh --use_gnet --target_fmri_npy FILE          (towards any response, such as score_gnet.py's voxels.npy)
source "$(dirname "$0")/common.sh"
run "${LAUNCH[@]}" "$REPO/src/recon.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
