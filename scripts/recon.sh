#!/usr/bin/env bash
# Turn SUBJ's scores into pictures: c and z draw them, g steers the drawing.
#
#   bash scripts/recon.sh                                          all test images
#   bash scripts/recon.sh --limit 5 --num_samples 3                three pictures of each of the first five
#   bash scripts/recon.sh --num_samples 4 --select g               of four pictures the one that agrees best with g
#   bash scripts/recon.sh --guidance_rule raw --method raw         the published guidance; a --method for other settings
#   SUBJ=3 bash scripts/recon.sh --run pretrain:1 --method pretrain1   subject 3, by the network pretrained without 1
#   bash scripts/recon.sh --control shuffle                        the null control (score it first)
#   bash scripts/recon.sh --voxels V1,V2                           from these regions alone (score it first)
#   bash scripts/recon.sh --run ground_truth                       the ceiling: of true features (score.sh --ground_truth)
#   bash scripts/recon.sh --use_adapter                            the UNet draws from g and z (train the adapter first)
#   bash scripts/recon.sh --use_gnet --gnet_roi V1                 the measured response guides too (train GNet first)
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/recon.sh   GPUs share the images
#
# Knobs, in front of the command:
#   SUBJ=1                     the subject whose scores are drawn
#   ROOT=<the repository>      the folder that holds data and results
#   LAUNCH=""                  accelerate launch ..., for several GPUs
#   WANDB_LOG=0                1: log to W&B
#   DRY_RUN=0                  1: show the configuration and the folders to write, and stop
#   PYTHON=.venv/bin/python    the Python to use
#   RECON_FLAGS=""             flags to put in front of yours
#
# Pictures go to ROOT/outputs_all/subj01/<method>/<guidance_scale>/<guidance_strength>/ (docs/data.md, Names on disk).
# All flags with their defaults: python3 src/recon.py --help
source "$(dirname "$0")/common.sh"
preset RECON
run "${LAUNCH[@]}" "$REPO/src/recon.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
