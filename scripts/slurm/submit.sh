#!/usr/bin/env bash
# Queue a subject's whole training on SLURM: a job per stage for c, for z and for all layers of g; each fine-tuning
# waits for its pretraining, the scores for all. Flags go to every training.
#
#   SUBJ=1 bash scripts/slurm/submit.sh --wandb_log
#   SBATCH_PARTITION=gpu FEATS="c z" bash scripts/slurm/submit.sh      sbatch reads its own settings from SBATCH_...
#
# Knobs, in front of the command, are those of train.sh but STAGES: bash scripts/train.sh --help
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/../common.sh"
cd "$REPO" # (strict mode: common.sh)
export SUBJ
feats="${FEATS[*]}" launch=""
[[ ${LAUNCH[*]} == "$PYTHON" ]] || launch=${LAUNCH[*]}
# scoring needs the flags that name a run, and W&B's
named=()
words=("$@")
for i in "${!words[@]}"; do
    case ${words[i]} in
        --hidden_dim | --num_sessions | --tag | --data_path | --wandb_project | --wandb_group) named+=("${words[i]}" "${words[i + 1]}") ;;
        --hidden_dim=* | --num_sessions=* | --tag=* | --data_path=* | --wandb_*) named+=("${words[i]}") ;;
    esac
done
# Queue one stage: queue STAGE [flags of sbatch] -- [flags of the training]
queue() {
    local stage=$1 options=()
    shift
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    env STAGES="$stage" FEATS="$feats" LAUNCH="$launch" sbatch --parsable --array "0-$((${#RUNS[@]} - 1))" "${options[@]}" \
        scripts/slurm/train.slurm "$@"
}
pretrain=$(queue pretrain --job-name pretrain -- "$@")
finetune=$(queue finetune --job-name finetune --dependency "aftercorr:$pretrain" -- "$@")
score=$(env FEATS="$feats" sbatch --parsable --dependency "afterok:$finetune" --gres gpu:1 --cpus-per-task 8 --mem 48G \
    --time 1:00:00 --job-name score --wrap "bash scripts/score.sh${named[*]:+ ${named[*]}}")
echo "pretraining $pretrain, fine-tuning $finetune, scores $score; squeue --me shows them"
