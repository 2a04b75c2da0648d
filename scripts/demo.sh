#!/usr/bin/env bash
# Run the whole pipeline on the demo world, on a CPU, without any download but the Python packages.
#
#   bash scripts/demo.sh
#
# Everything it makes is under demo/. Run again, it reuses what exists; `git clean -fdX demo` starts over. Afterwards
# `source demo/settings.sh` lets the other scripts work on this world: see "Play with the demo" in README.md.
# PYTHON=/path/to/python3 chooses the Python that .venv is made of (3.11 or newer); there are no other knobs, no flags.
repo=$(cd "$(dirname "$0")/.." && pwd)
source "$repo/scripts/help.sh"
[[ $# -eq 0 ]] || { echo "error: $1: demo.sh takes no flags; see bash scripts/demo.sh --help" >&2; exit 2; }
bash "$repo/scripts/setup.sh" || exit
# shellcheck disable=SC2046
unset FEATS STAGES LAUNCH WANDB_LOG DRY_RUN $(compgen -v | grep '_FLAGS$')
source "$repo/demo/settings.sh"
source "$repo/scripts/common.sh"
scripts=$REPO/scripts

# Say what a stage does, run it and record its seconds (one that finds its results made keeps the time of making them):
# stage NAME "what it does, how long" command ...   (times: on two quiet cores)
mkdir -p "$ROOT/seconds"
total=$(grep -c '^stage ' "$scripts/demo.sh") number=0
stage() {
    local file=$ROOT/seconds/$1 start=$SECONDS
    number=$((number + 1))
    printf '\n[%d/%d] %s\n' "$number" "$total" "$2"
    "${@:3}"
    local seconds=$((SECONDS - start))
    [[ -e $file && $(<"$file") -ge $seconds ]] || echo "$seconds" >"$file"
}
train() { env JOBS=3 FEATS="$1" STAGES="$2" bash "$scripts/train.sh"; } # side by side: small networks fill no two cores
sets=$ROOT/outputs_all/subj01
real=$sets/cp_4096_v1/300/0.4 unguided=$sets/cp_4096_v1/0/0 shuffled=$sets/cp_4096_v1_shuffle/300/0.4

stage mini_nsd "drawing 7,300 scenes and simulating eight brains that see them, about 20 seconds" \
    run "$PYTHON" "$ROOT/make_mini_nsd.py" --root "$ROOT"
stage features "computing the scenes' true features c, z and g, about 1 minute" bash "$scripts/features.sh"

stage pretrain "training decoders of c (meaning), z (layout) and g (looks, six layers) on seven brains, about 1 minute" \
    train "c z g" pretrain
stage finetune "fine-tuning them on subject 1, about 40 seconds" train "c z g" finetune
stage ridge "fitting a ridge to all of them, which the decoders are averaged with, about 6 seconds" train "c z g" ridge

stage score "decoding 100 test images that no training saw, about 20 seconds" bash "$scripts/score.sh"
stage score_shuffled "the same from the responses to other images, a null control, about 20 seconds" \
    bash "$scripts/score.sh" --control shuffle

stage recon "drawing what was decoded, about 40 seconds" bash "$scripts/recon.sh"
stage recon_unguided "the same without guidance by g, about 30 seconds" bash "$scripts/recon.sh" --guidance_scale 0
stage recon_shuffled "drawing the null control, about 40 seconds" bash "$scripts/recon.sh" --control shuffle

stage evaluate "comparing the pictures with what was seen, about 40 seconds" bash "$scripts/evaluate.sh" \
    --images "$real" --compare "unguided=$unguided" "shuffled fMRI=$shuffled"
stage evaluate_shuffled "measuring the null control, about 10 seconds" bash "$scripts/evaluate.sh" \
    --images "$shuffled" --no-controls
stage evaluate_unguided "measuring the unguided pictures, about 10 seconds" bash "$scripts/evaluate.sh" \
    --images "$unguided" --no-controls
stage evaluate_seen "measuring the seen images themselves: the best there can be, about 10 seconds" \
    bash "$scripts/evaluate.sh" --images "$real" --seen
run "$PYTHON" "$ROOT/summarise.py" --root "$ROOT" --clip "$ROOT/models/clip" --real "$real" --unguided "$unguided" \
    --shuffled "$shuffled" --seen "$real/seen" --seconds "$ROOT/seconds"
echo "report         $real/report/index.html"
