#!/usr/bin/env bash
# The whole pipeline on the demo world, on a CPU, without any download but the Python packages: bash scripts/demo.sh
# Everything it makes lies under demo/. Run again, it reuses what exists; `rm -rf demo/*_* demo/nsddata demo/MindEyeV2` starts over.
repo=$(cd "$(dirname "$0")/.." && pwd)
bash "$repo/scripts/setup.sh"
ROOT=$repo/demo
source "$repo/scripts/common.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

SD=$ROOT/models/sd CLIP=$ROOT/models/clip
HIDDEN=(--hidden_dim 256)
IMAGES=("${HIDDEN[@]}" --sd_model "$SD" --clip_model "$CLIP")
METRICS=("${HIDDEN[@]}" --eval_clip "$CLIP")

# Run one stage and keep its seconds; a stage that found its results made keeps the time of making them.
mkdir -p "$ROOT/seconds"
stage() {
    local file=$ROOT/seconds/$1 start=$SECONDS
    shift
    "$@"
    local seconds=$((SECONDS - start))
    [[ -e $file && $(<"$file") -ge $seconds ]] || echo "$seconds" >"$file"
}
script() { local name=$1; shift; bash "$REPO/scripts/$name.sh" "$@"; }

stage mini_nsd run "$PYTHON" "$ROOT/make_mini_nsd.py" --root "$ROOT"
stage features script features --sd_model "$SD" --clip_model "$CLIP"

small=("${HIDDEN[@]}" --n_blocks 2 --prior_depth 2 --batch_size 140 --max_lr 1e-3 --num_workers 1)
g_feats="g_2 g_4 g_6 g_8 g_10 g_12"
FEATS=c STAGES=pretrain stage pretrain_c script train "${small[@]}" --num_epochs 8
FEATS=c STAGES=finetune stage finetune_c script train "${small[@]}" --num_epochs 12
FEATS=$g_feats STAGES=pretrain stage pretrain_g script train "${small[@]}" --num_epochs 3
FEATS=$g_feats STAGES=finetune stage finetune_g script train "${small[@]}" --num_epochs 6

stage score script score "${HIDDEN[@]}"
stage score_shuffled script score "${HIDDEN[@]}" --control shuffle
stage recon script recon "${IMAGES[@]}"
stage recon_unguided script recon "${IMAGES[@]}" --guidance_scale 0
stage recon_shuffled script recon "${IMAGES[@]}" --control shuffle
stage evaluate script evaluate "${METRICS[@]}"
