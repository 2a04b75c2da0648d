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
export PYTHON=$repo/.venv/bin/python
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
train() { env FEATS="$1" STAGES="$2" bash "$scripts/train.sh"; }
recon() { bash "$scripts/recon.sh" "$@"; }
features() {
    beside env FEATS=z bash "$scripts/features.sh" # takes as long as the other two
    beside env FEATS="g c" bash "$scripts/features.sh"
    finish
}
pretrain() {
    beside train "c z g" ridge
    beside train "c z g" pretrain
    finish
}
score() {
    bash "$scripts/score.sh"
    local JOBS=2 # of three scripts, one after another
    beside env JOBS=1 bash "$scripts/score.sh" --control shuffle
    beside env JOBS=1 bash "$scripts/score.sh" --ground_truth
    finish
}
draw() {
    local JOBS=2 # the longest first, so that both cores are busy to the end
    beside recon --use_adapter --use_gnet
    beside recon --use_adapter
    beside recon --use_adapter --control shuffle
    beside recon --use_adapter --run ground_truth
    beside recon --method c --z none --feats none
    beside recon --method cz --feats none
    finish
}
for trained in gnet_subj01 adapter_subj01; do # runs that would take long, where downloaded ones would be
    mkdir -p "$ROOT/train_logs"
    [[ -e $ROOT/train_logs/$trained/best.pth ]] || cp -r "$ROOT/models/$trained" "$ROOT/train_logs/"
done
export JOBS=3 # small networks fill no two cores: what can be is run side by side
sets=$ROOT/outputs_all/subj01 guided=30/0.8
c=$sets/c/0/0 cz=$sets/cz/0/0 full=$sets/cp_4096_v1_adapter/$guided brain=$sets/cp_4096_v1_adapter_gnet_all_0.1/$guided
shuffled=$sets/cp_4096_v1_adapter_shuffle/$guided true=$sets/cp_4096_v1_adapter_ground_truth/$guided

stage mini_nsd "drawing 7,300 scenes and simulating eight brains that see them, about 20 seconds" \
    run "$PYTHON" "$ROOT/make_mini_nsd.py" --root "$ROOT"
stage features "computing the scenes' true features: c (meaning), z (layout) and g (looks, six layers), about 40 seconds" \
    features

stage pretrain "training a decoder of each on seven brains, and a ridge to average them with, about 70 seconds" pretrain
stage finetune "fine-tuning them on subject 1, about 20 seconds" train "c z g" finetune
stage score "decoding 100 test images that no training saw; responses to other images; true features, about 10 seconds" score
stage draw "drawing from c (the right things anywhere), + z (in the right place), + g (the right looks), + the response \
itself; the two controls, about 2 minutes" draw

stage evaluate "comparing all with what was seen, about 45 seconds" bash "$scripts/evaluate.sh" \
    --images "$full" --compare "c=$c" "c+z=$cz" "c+z+g+brain=$brain" "shuffled=$shuffled" "true=$true"
run "$PYTHON" "$ROOT/summarise.py" --root "$ROOT" --evaluated "$full" --seconds "$ROOT/seconds" --sets "c=$c" "c+z=$cz" \
    "c+z+g=$full" "c+z+g+brain=$brain" "shuffled=$shuffled" "true=$true"
echo "report         $full/report/index.html"
