#!/usr/bin/env bash
# Measure SUBJ's pictures against the images that were seen, and write a report beside them.
#
#   bash scripts/evaluate.sh                                     the pictures of recon.sh with the same flags
#   bash scripts/evaluate.sh --images DIR                        those of a folder
#   bash scripts/evaluate.sh --compare unguided=DIR              and compare them with other pictures, image by image
#   bash scripts/evaluate.sh --subjects 1 2 5 7                  a row for each subject, and their mean
#
# Of recon.sh's flags it needs only those that name the folder: --method, --guidance_scale, --guidance_strength,
# --control, --voxels, --without, --test_split, --repeats, --hold_out, --run ground_truth, --use_adapter, --select,
# --use_gnet with --gnet_roi and --gnet_kappa. How the pictures were drawn is read from the folder. A report that is
# there is replaced; --outdir DIR puts the new one elsewhere.
#
# Knobs, in front of the command:
#   SUBJ=1                     the subject
#   ROOT=<the repository>      the folder that holds data and results
#   WANDB_LOG=0                1: log to W&B
#   DRY_RUN=0                  1: show the configuration and stop
#   PYTHON=.venv/bin/python    the Python to use
#   EVALUATE_FLAGS=""          flags to put in front of yours
#
# Null controls and the ceiling, where they were scored and drawn, are found and measured too (docs/evaluation.md).
# All flags with their defaults: python3 src/evaluate.py --help
source "$(dirname "$0")/common.sh"
preset EVALUATE
run "$PYTHON" "$REPO/src/evaluate.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
