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
SCALE=0.2
IMAGES=("${HIDDEN[@]}" --sd_model "$SD" --clip_model "$CLIP" --guidance_rule norm --guidance_scale "$SCALE"
    --batch_size 50)
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

small=("${HIDDEN[@]}" --n_blocks 2 --prior_depth 2 --batch_size 140 --max_lr 1e-3 --num_workers 0)
g_feats="g_2 g_4 g_6 g_8 g_10 g_12"
FEATS=c STAGES=pretrain stage pretrain_c script train "${small[@]}" --num_epochs 4
FEATS=c STAGES=finetune stage finetune_c script train "${small[@]}" --num_epochs 8
FEATS=$g_feats STAGES=pretrain stage pretrain_g script train "${small[@]}" --num_epochs 2
FEATS=$g_feats STAGES=finetune stage finetune_g script train "${small[@]}" --num_epochs 4

stage score script score "${HIDDEN[@]}"
stage score_shuffled script score "${HIDDEN[@]}" --control shuffle

stage recon script recon "${IMAGES[@]}"
stage recon_unguided script recon "${IMAGES[@]}" --guidance_scale 0
stage recon_shuffled script recon "${IMAGES[@]}" --control shuffle

IMAGES_DIR=$ROOT/outputs_all/subj01
REAL=$IMAGES_DIR/cp_4096_v1/$SCALE/0.2
UNGUIDED=$IMAGES_DIR/cp_4096_v1/0/0
SHUFFLED=$IMAGES_DIR/cp_4096_v1_shuffle/$SCALE/0.2
evaluate() {
    script evaluate "${METRICS[@]}" --images "$UNGUIDED"
    script evaluate "${METRICS[@]}" --images "$SHUFFLED"
    script evaluate "${METRICS[@]}" --images "$REAL" --ground_truth
    script evaluate "${METRICS[@]}" --images "$REAL" --compare "unguided=$UNGUIDED" "shuffled fMRI=$SHUFFLED"
}
stage evaluate evaluate
run "$PYTHON" "$ROOT/summarise.py" --root "$ROOT" --clip "$CLIP" --real "$REAL" --unguided "$UNGUIDED" \
    --shuffled "$SHUFFLED" --ground_truth "$REAL/ground_truth" --seconds "$ROOT/seconds"
