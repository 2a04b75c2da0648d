#!/usr/bin/env bash
# How little is needed: draw SUBJ's pictures from responses squeezed to a few numbers, and by decoders that learned from
# a few sessions, and compare them with those of recon.sh in one report.
#
#   bash scripts/curves.sh                                   when train.sh, score.sh and recon.sh have run
#   BOTTLENECKS="1 10" SESSIONS="" bash scripts/curves.sh    two bottlenecks alone
#
# Flags go to recon.sh: give it those that the reconstructions were drawn with, but none that names their folder
# (--use_adapter, --method, --guidance_scale, ...): the comparison is with those of recon.sh's own defaults.
#
# Knobs, in front of the command:
#   SUBJ=1                          the subject
#   FEATS="c z g"                   features to train and score
#   BOTTLENECKS="1 2 5 20 100"      numbers that are left of each response (docs/evaluation.md)
#   SESSIONS="1 2 4 10"             sessions to fine-tune on
#   ROOT=<the repository>           the folder that holds data and results
#   PYTHON=.venv/bin/python         the Python to use
#
# A drawing of each goes to its own folder; what is there is kept. SCORE_FLAGS, RECON_FLAGS, ... as in those scripts.
feats=${FEATS:-} # common.sh makes a list of it, which no other script would get
source "$(dirname "$0")/common.sh"

read -ra widths <<<"${BOTTLENECKS-1 2 5 20 100} "
read -ra sessions <<<"${SESSIONS-1 2 4 10} "
for knob in BOTTLENECKS SESSIONS; do
    [[ ${!knob:-} =~ ^[0-9\ ]*$ ]] || refuse "$knob: ${!knob} are no numbers; wanted 1 5 20, or so"
done

for k in ${widths[@]+"${widths[@]}"}; do
    run env FEATS="$feats" bash "$REPO/scripts/score.sh" --control "bottleneck$k"
    run bash "$REPO/scripts/recon.sh" --control "bottleneck$k" "$@"
done
compared=()
for n in ${sessions[@]+"${sessions[@]}"}; do
    run env FEATS="$feats" STAGES="finetune ridge" bash "$REPO/scripts/train.sh" --num_sessions "$n"
    run env FEATS="$feats" bash "$REPO/scripts/score.sh" --num_sessions "$n"
    run bash "$REPO/scripts/recon.sh" --num_sessions "$n" --method "sessions$n" "$@"
    for folder in "$ROOT/outputs_all/subj$(printf %02d "$((10#${SUBJ#subj}))")/sessions$n"/*/*; do
        [[ ! -e $folder/index.csv ]] || compared+=("sessions $n=$folder")
    done
done
run bash "$REPO/scripts/evaluate.sh" ${compared[@]+--compare "${compared[@]}"}
