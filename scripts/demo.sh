#!/usr/bin/env bash
# The whole pipeline on the demo world, on a CPU, without any download but the Python packages: bash scripts/demo.sh
# Everything it makes is under demo/. Run again, it reuses what exists; `git clean -fdX demo` starts over.
repo=$(cd "$(dirname "$0")/.." && pwd)
bash "$repo/scripts/setup.sh"
unset FEATS STAGES LAUNCH WANDB_LOG DRY_RUN
ROOT=$repo/demo
export SUBJ=1
source "$repo/scripts/common.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Sizes and schedules for a small world; everything else is the paper's default.
SD=$ROOT/models/sd CLIP=$ROOT/models/clip
hidden=(--hidden_dim 384)
network=("${hidden[@]}" --n_blocks 2 --prior_depth 2 --batch_size 70 --num_workers 0)
# Guidance as benchmarks/README.md recommends (300000 suits 512 pixels; at 64 the gradient is larger).
scale=300 strength=0.4
images=("${hidden[@]}" --sd_model "$SD" --clip_model "$CLIP" --num_inference_steps 25 --cfg_scale 5 --strength 0.7
    --guidance_strength "$strength" --guidance_grad x0)
scripts=$REPO/scripts

# Run one stage and record its seconds; a stage that finds its results made keeps the time it took to make them.
mkdir -p "$ROOT/seconds"
stage() {
    local file=$ROOT/seconds/$1 start=$SECONDS
    shift
    "$@"
    local seconds=$((SECONDS - start))
    [[ -e $file && $(<"$file") -ge $seconds ]] || echo "$seconds" >"$file"
}

stage mini_nsd run "$PYTHON" "$ROOT/make_mini_nsd.py" --root "$ROOT"
stage features bash "$scripts/features.sh" --sd_model "$SD" --clip_model "$CLIP"

g_feats="g_2 g_4 g_6 g_8 g_10 g_12"
train() { env FEATS="$1" STAGES="$2" bash "$scripts/train.sh" "${network[@]}" "${@:3}"; }
stage pretrain_c train c pretrain --num_epochs 5 --max_lr 1.5e-3
stage finetune_c train c finetune --num_epochs 10 --max_lr 1e-3
stage pretrain_g train "$g_feats" pretrain --num_epochs 2 --max_lr 1.5e-3
stage finetune_g train "$g_feats" finetune --num_epochs 6 --max_lr 1e-3
stage pretrain_z train z pretrain --num_epochs 3 --max_lr 1.5e-3 --decoder_channels 32 64 128
stage finetune_z train z finetune --num_epochs 8 --max_lr 1e-3 --decoder_channels 32 64 128

# One step of the prior predicts the mean, which so small a UNet draws better than a sample.
stage score bash "$scripts/score.sh" "${hidden[@]}" --prior_steps 1
stage score_shuffled bash "$scripts/score.sh" "${hidden[@]}" --prior_steps 1 --control shuffle

stage recon bash "$scripts/recon.sh" "${images[@]}" --guidance_scale "$scale"
stage recon_unguided bash "$scripts/recon.sh" "${images[@]}" --guidance_scale 0
stage recon_shuffled bash "$scripts/recon.sh" "${images[@]}" --guidance_scale "$scale" --control shuffle

sets=$ROOT/outputs_all/subj01
real=$sets/cp_4096_v1/$scale/$strength
shuffled=$sets/cp_4096_v1_shuffle/$scale/$strength
unguided=$sets/cp_4096_v1/0/0
evaluate() { bash "$scripts/evaluate.sh" "${hidden[@]}" --eval_clip "$CLIP" --images "$@"; }
stage evaluate evaluate "$real" --compare "unguided=$unguided" "shuffled fMRI=$shuffled"
stage evaluate_shuffled evaluate "$shuffled" --no-controls
stage evaluate_unguided evaluate "$unguided" --no-controls
stage evaluate_ground_truth evaluate "$real" --ground_truth
run "$PYTHON" "$ROOT/summarise.py" --root "$ROOT" --clip "$CLIP" --real "$real" --unguided "$unguided" \
    --shuffled "$shuffled" --ground_truth "$real/ground_truth" --seconds "$ROOT/seconds"
echo "report: $real/report/index.html"
