#!/usr/bin/env bash
# Check that all data are there and correct, and say what repairs each defect.
#
#   bash scripts/check_data.sh                                 what all stages and subjects need: a minute, later seconds
#   bash scripts/check_data.sh --subj 1 --stages train score   what subject 1 needs to be trained and scored
#   bash scripts/check_data.sh --deep                          every value of every file, too: minutes to hours
#
# Knobs, in front of the command:
#   FEATS="c z g_2 g_4 g_6 g_8 g_10 g_12"    features to look for; g: all of its layers
#   ROOT=<the repository>                    the folder that holds the data
#   DRY_RUN=0                                1: show the configuration and stop
#   PYTHON=.venv/bin/python                  the Python to use
#   CHECK_DATA_FLAGS=""                      flags to put in front of yours
#
# All flags with their defaults: python3 src/check_data.py --help
source "$(dirname "$0")/common.sh"
[[ ${FEATS[*]} == "$ALL_FEATS" ]] || FLAGS+=(--feats "${FEATS[@]}")
preset CHECK_DATA
run "$PYTHON" "$REPO/src/check_data.py" "${FLAGS[@]}" "$@"
