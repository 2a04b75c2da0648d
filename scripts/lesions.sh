#!/usr/bin/env bash
# What each region contributes: draw SUBJ's pictures without some regions of interest, and from some alone, and compare
# them with those of recon.sh in one report, as rows of its table and of its contact sheet.
#
#   bash scripts/lesions.sh                                   when train.sh, score.sh and recon.sh have run
#   WITHOUT="V1 V2 V3" ONLY="" bash scripts/lesions.sh        three regions, one at a time
#   WITHOUT="V1,V2,V3" ONLY="" bash scripts/lesions.sh        the same three together
#
# Flags go to recon.sh: give it those that the reconstructions were drawn with, but none that names their folder
# (--use_adapter, --method, --guidance_scale, ...): the comparison is with those of recon.sh's own defaults.
#
# Knobs, in front of the command:
#   SUBJ=1                                   the subject
#   FEATS="c z g"                            features to score
#   WITHOUT="V1,V2,V3 V4 higher_vis"         lesions: these voxels have their mean response (docs/maps.md)
#   ONLY="V1,V2,V3 V4 higher_vis"            the reverse: all other voxels have theirs
#   ROOT=<the repository>                    the folder that holds data and results
#   PYTHON=.venv/bin/python                  the Python to use
#
# A drawing of each goes to its own folder; what is there is kept. What each region contributes to c, z and g, in
# numbers with intervals: bash scripts/maps.sh. SCORE_FLAGS, RECON_FLAGS, ... as in those scripts.
feats=${FEATS:-} # common.sh makes a list of it, which no other script would get
source "$(dirname "$0")/common.sh"

read -ra without <<<"${WITHOUT-V1,V2,V3 V4 higher_vis} "
read -ra only <<<"${ONLY-V1,V2,V3 V4 higher_vis} "
lesions=()
for regions in ${without[@]+"${without[@]}"}; do lesions+=("--without $regions"); done
for regions in ${only[@]+"${only[@]}"}; do lesions+=("--voxels $regions"); done
for lesion in ${lesions[@]+"${lesions[@]}"}; do
    read -ra flags <<<"$lesion"
    run env FEATS="$feats" bash "$REPO/scripts/score.sh" "${flags[@]}"
    run bash "$REPO/scripts/recon.sh" "${flags[@]}" "$@"
done
run bash "$REPO/scripts/evaluate.sh"
