#!/usr/bin/env bash
# Map SUBJ's brain: how well each voxel is predicted, what decoders read from it, what each region contributes.
#
#   bash scripts/maps.sh                                     when train.sh has run
#   FEATS="c z" bash scripts/maps.sh                         of two features' decoders alone
#   bash scripts/maps.sh --run ridge --outdir outputs_all/subj01/maps_ridge     of other decoders, kept beside
#   bash scripts/maps.sh --gnet_run gnet_published           by another encoding model
#
# Knobs, in front of the command:
#   SUBJ=1                                   the subject
#   FEATS="c z g_2 g_4 g_6 g_8 g_10 g_12"    features whose decoders are mapped; without it those that were trained
#   ROOT=<the repository>                    the folder that holds data and results
#   DRY_RUN=0                                1: show the configuration and the folder to write, and stop
#   PYTHON=.venv/bin/python                  the Python to use
#   MAPS_FLAGS=""                            flags to put in front of yours
#
# Volumes, tables and pictures go to ROOT/outputs_all/subj01/maps/; pictures need nilearn (bash scripts/setup.sh
# requirements-maps.txt). What they show, and how to look at them: docs/maps.md.
# All flags with their defaults: python3 src/map_brain.py --help
source "$(dirname "$0")/common.sh"
[[ ${FEATS[*]} == "$ALL_FEATS" ]] || FLAGS+=(--feats "${FEATS[@]}") # --feats among the user's flags comes later and wins
preset MAPS
run "$PYTHON" "$REPO/src/map_brain.py" --subj "$SUBJ" "${FLAGS[@]}" "$@"
