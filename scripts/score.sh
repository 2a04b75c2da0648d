#!/usr/bin/env bash
# Predict FEATS of SUBJ's test images from fMRI: the scores that recon.sh draws from.
#
#   bash scripts/score.sh                                   by the run fine-tuned on SUBJ
#   STAGES=ridge bash scripts/score.sh                      by another of its runs: the same as --run ridge
#   SUBJ=3 bash scripts/score.sh --run pretrain:1           subject 3, by the run pretrained without subject 1
#   bash scripts/score.sh --control shuffle                 the null control (or noise, mean)
#   bash scripts/score.sh --without higher_vis              a lesion: these voxels say nothing; --voxels V1,V2: only these
#   bash scripts/score.sh --ground_truth                    the ceiling: true features instead of decoded ones
#   STAGES=gnet bash scripts/score.sh                       the reverse: GNet predicts the responses to images
#
# Knobs, in front of the command:
#   SUBJ=1                                   the subject to decode
#   FEATS="c z g_2 g_4 g_6 g_8 g_10 g_12"    features to predict; g: all of its layers
#   JOBS=1                                   so many scripts side by side, sharing the cores
#   STAGES="pretrain finetune"               the last one decodes: pretrain, synthetic, finetune, scratch or ridge;
#                                            or gnet
#   ROOT=<the repository>                    the folder that holds data and results
#   WANDB_LOG=0                              1: log to W&B
#   DRY_RUN=0                                1: show the configuration and the folders to write, and stop
#   PYTHON=.venv/bin/python                  the Python to use
#   SCORE_FLAGS="" SCORE_GNET_FLAGS=""       flags to put in front of yours
#
# Give the flags that name a run (--hidden_dim, --num_sessions, --tag) as in its training: docs/data.md, Names on disk.
# All flags with their defaults: python3 src/score_c.py --help; of GNet: python3 src/score_gnet.py --help
source "$(dirname "$0")/common.sh"

decoding=""
for stage in "${STAGES[@]}"; do [[ $stage == gnet || $stage == adapter ]] || decoding=$stage; done
if [[ " ${STAGES[*]} " == *" gnet "* ]]; then
    (preset SCORE_GNET && run "$PYTHON" "$REPO/src/score_gnet.py" --subj "$SUBJ" "${LOGGED[@]}" "$@")
fi
[[ -n $decoding ]] || exit 0
[[ $decoding == finetune ]] || LOGGED+=(--run "$decoding")
preset SCORE
for feat in c z; do
    if wants "$feat"; then beside run "$PYTHON" "$REPO/src/score_$feat.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"; fi
done
if [[ ${#G_FEATS[@]} -gt 0 ]]; then
    beside run "$PYTHON" "$REPO/src/score_g.py" --feat "${G_FEATS[@]}" --subj "$SUBJ" "${LOGGED[@]}" "$@"
fi
finish
