# Sourced by every script here: strict mode, the Python to use, and the knobs (environment variables with defaults).
#   SUBJ=1  ROOT=<repository>  FEATS="c z g_2 ..."  STAGES="pretrain finetune"  LAUNCH=""  WANDB_LOG=0  DRY_RUN=0
# shellcheck shell=bash disable=SC2034
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT=${ROOT:-$REPO}
SUBJ=${SUBJ:-1}
read -ra FEATS <<<"${FEATS:-c z g_2 g_4 g_6 g_8 g_10 g_12}"
read -ra STAGES <<<"${STAGES:-pretrain finetune}"
read -ra LAUNCH <<<"${LAUNCH:-}"
[[ -n ${PYTHON:-} ]] || { [[ -x $REPO/.venv/bin/python ]] && PYTHON=$REPO/.venv/bin/python || PYTHON=python3; }
[[ $PYTHON != */* ]] || export PATH=${PYTHON%/*}:$PATH # LAUNCH="accelerate launch ..." finds its own accelerate
[[ ${#LAUNCH[@]} -gt 0 ]] || LAUNCH=("$PYTHON")

# Flags of every stage, and of the stages that can log to W&B. (Never empty: bash 3 takes an empty array for unset.)
FLAGS=(--root "$ROOT")
[[ ${DRY_RUN:-0} != 1 ]] || FLAGS+=(--dry_run)
LOGGED=("${FLAGS[@]}")
[[ ${WANDB_LOG:-0} != 1 ]] || LOGGED+=(--wandb_log)

# The g layers among FEATS (they share a process), and whether FEATS holds a feature.
G_FEATS=()
for feat in "${FEATS[@]}"; do [[ $feat != g_* ]] || G_FEATS+=("$feat"); done
wants() { [[ " ${FEATS[*]} " == *" $1 "* ]]; }

# Print a command, then run it.
run() {
    printf '+'; printf ' %q' "$@"; printf '\n'
    "$@"
}
