#!/usr/bin/env bash
# Compute the true features of the stimuli: c (the text embedding), z (the VAE latent) and g_2 ... g_12 (layers of CLIP).
#
#   bash scripts/features.sh                  all features of all images: 49 GB, about an hour on a GPU
#   bash scripts/features.sh --subj 1         only the images that subject 1 saw; run again, it adds what is missing
#   FEATS="c z" bash scripts/features.sh      only these
#   bash scripts/features.sh --test_split synthetic --subj 1   of NSD-synthetic's stimuli, as subject 1 saw them
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/features.sh   GPUs share the images
#
# Knobs, in front of the command:
#   FEATS="c z g_2 g_4 g_6 g_8 g_10 g_12"    features to compute; g: all of its layers
#   ROOT=<the repository>                    the folder that holds the data
#   LAUNCH=""                                accelerate launch ..., for several GPUs
#   DRY_RUN=0                                1: show the configuration and stop
#   PYTHON=.venv/bin/python                  the Python to use
#   FEATURES_FLAGS=""                        flags to put in front of yours
#
# All flags with their defaults: python3 src/img2feat.py --help
source "$(dirname "$0")/common.sh"
[[ ${FEATS[*]} == "$ALL_FEATS" ]] || FLAGS+=(--feats "${FEATS[@]}") # --feats among the user's flags comes later and wins
preset FEATURES
run "${LAUNCH[@]}" "$REPO/src/img2feat.py" "${FLAGS[@]}" "$@"
