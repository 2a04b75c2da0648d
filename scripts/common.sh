# Sourced by every script here: strict mode, the Python to use, and the knobs (environment variables with defaults),
# whose values are checked before anything runs.
# shellcheck shell=bash disable=SC2034 source-path=SCRIPTDIR
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/help.sh"

refuse() {
    echo "error: $1" >&2
    exit 2
}

if [[ -z ${ROOT:-} && ${0##*/} =~ ^(train|score|recon|evaluate|maps)\.sh$ && -e $REPO/demo/nsddata/experiments &&
    ! -e $REPO/nsddata/experiments ]]; then
    echo "note: there is no data in $REPO yet; to work on the demo world: source demo/settings.sh" >&2
fi
export ROOT=${ROOT:-$REPO}
SUBJ=${SUBJ:-1}
[[ $SUBJ =~ ^(subj)?(0?[1-9]|[1-9][0-9])$ ]] || refuse "SUBJ: $SUBJ is not a subject; wanted 1 ... 99 (of NSD 1 ... 8)"
for knob in WANDB_LOG DRY_RUN; do
    [[ ${!knob:-0} == [01] ]] || refuse "$knob: ${!knob} is not a setting; wanted 1 (yes) or 0 (no)"
done

# Names that a knob may be mistaken for: near_miss NAME KNOB PATTERN. What is meant for another program has other values.
near_miss() {
    [[ ! ${!1:-} =~ ^($3)([\ ,].*)?$ ]] || refuse "$1: no such knob; wanted $2"
}
for name in FEAT FEATURES; do near_miss $name FEATS "[czg]|g_?[0-9]+"; done
ALL_STAGES="pretrain synthetic finetune scratch ridge gnet adapter"
near_miss STAGE STAGES "${ALL_STAGES// /|}"
for name in SUB SUBJECT SUBJECTS; do near_miss $name SUBJ "(subj)?(0?[1-9]|[1-9][0-9])"; done
near_miss JOB JOBS "[0-9]+"

export JOBS=${JOBS:-1}
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "JOBS: $JOBS is not a number of jobs; wanted 1, 2, ..."

# Features, g standing for all of its layers; G_FEATS: the layers among them, which share a process.
ALL_G="g_2 g_4 g_6 g_8 g_10 g_12"
ALL_FEATS="c z $ALL_G"
read -ra words <<<"${FEATS:-} "
[[ ${#words[@]} -gt 0 ]] || words=(c z g)
list=" "
for word in "${words[@]}"; do
    [[ $word != g ]] || word=$ALL_G
    [[ $word == "$ALL_G" || $word =~ ^(c|z|g_([2468]|[1-9][0-9]*[02468]))$ ]] ||
        refuse "FEATS: $word is not a feature; wanted c, z, g_2 ... g_12, or g for all of its layers"
    for feat in $word; do [[ $list == *" $feat "* ]] || list+="$feat "; done
done
read -ra FEATS <<<"$list"
G_FEATS=()
for feat in "${FEATS[@]}"; do [[ $feat != g_* ]] || G_FEATS+=("$feat"); done
# The runs that FEATS are trained in, each a list of features: c, z, and all layers of g together.
RUNS=()
for feat in "${FEATS[@]}"; do [[ $feat == g_* ]] || RUNS+=("$feat"); done
[[ ${#G_FEATS[@]} -eq 0 ]] || RUNS+=("${G_FEATS[*]}")
wants() { [[ " ${FEATS[*]} " == *" $1 "* ]]; }

read -ra STAGES <<<"${STAGES:-} "
[[ ${#STAGES[@]} -gt 0 ]] || STAGES=(pretrain finetune)
for word in "${STAGES[@]}"; do
    [[ " $ALL_STAGES " == *" $word "* ]] || refuse "STAGES: $word is not a stage; wanted ${ALL_STAGES// /, }"
done

[[ -n ${PYTHON:-} ]] || { [[ -x $REPO/.venv/bin/python ]] && PYTHON=$REPO/.venv/bin/python || PYTHON=python3; }
[[ $PYTHON != */* ]] || export PATH=${PYTHON%/*}:$PATH # LAUNCH="accelerate launch ..." finds its own accelerate
command -v "$PYTHON" >/dev/null || refuse "PYTHON: $PYTHON is not a program; bash scripts/setup.sh makes .venv/bin/python"
read -ra LAUNCH <<<"${LAUNCH:-} "
[[ ${#LAUNCH[@]} -gt 0 ]] || LAUNCH=("$PYTHON")
command -v "${LAUNCH[0]}" >/dev/null || refuse "LAUNCH: ${LAUNCH[0]} is not a program; wanted accelerate launch ..."

# Flags of every stage, and of the stages that can log to W&B. (Never empty: bash 3 takes an empty array for unset.)
FLAGS=(--root "$ROOT")
[[ ${DRY_RUN:-0} != 1 ]] || FLAGS+=(--dry_run)
LOGGED=("${FLAGS[@]}")
[[ ${WANDB_LOG:-0} != 1 ]] || LOGGED+=(--wandb_log)

# Add what the environment's NAME_FLAGS say (demo/settings.sh sets some), for each NAME: preset NAME ...
# They stand before the user's own flags, which win.
preset() {
    local name words
    for name in "$@"; do
        name=${name}_FLAGS
        read -r -d '' -a words <<<"${!name:-}" || true
        [[ ${#words[@]} -eq 0 ]] || { FLAGS+=("${words[@]}"); LOGGED+=("${words[@]}"); }
    done
}

# Print a command, then run it.
run() {
    printf '+'; printf ' %q' "$@"; printf '\n'
    "$@"
}

# Run a command beside others, JOBS at a time, as soon as there is room; a bar is then lines, as in a log: beside COMMAND
# `finish` waits for all of them and returns the status of one that failed. Each job is a process group of its own (set
# -m), so that Ctrl-C and kill reach all that it has started, as SIGTERM.
beside() {
    if [[ $JOBS == 1 ]]; then
        "$@"
        return
    fi
    trap 'stop 130' INT
    trap 'stop 143' TERM
    until room; do sleep 0.1; done # (wait -n is not in bash 3)
    set -m
    # Each has its share of the cores. What it says when it is stopped still gets through.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + JOBS - 1) / JOBS))} "$@" 2> >(trap '' TERM; cat >&2) &
    jobs+=($!)
    set +m
}
room() {
    local running
    running=$(builtin jobs -rp)
    [[ $(wc -w <<<"$running") -lt $JOBS ]]
}
finish() {
    local status=0 job
    for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || status=$?; done
    jobs=()
    return $status
}
stop() {
    local job
    for job in ${jobs[@]+"${jobs[@]}"}; do kill -TERM -- "-$job" 2>/dev/null || true; done
    wait
    exit "$1"
}
jobs=() cores=$(getconf _NPROCESSORS_ONLN)
