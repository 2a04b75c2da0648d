#!/usr/bin/env bash
# Train the decoders of FEATS: pretrain on every subject but SUBJ, then fine-tune on SUBJ. Flags go to every training;
# one that was interrupted continues.
#
#   bash scripts/train.sh                                            everything: a run of c, of z, of all layers of g
#   SUBJ=2 FEATS="c z" bash scripts/train.sh --num_epochs 10         another subject, two features, ten epochs
#   STAGES=finetune bash scripts/train.sh --num_sessions 1           on the first session (an hour of scanning) of SUBJ
#   STAGES="pretrain finetune ridge" bash scripts/train.sh           also the ridge that score.sh averages them with
#   bash scripts/train.sh --model mindeye2 --tag mindeye2            the published networks instead
#   STAGES=gnet bash scripts/train.sh                                SUBJ's encoding model, image -> voxels
#   STAGES=adapter bash scripts/train.sh                             what lets Stable Diffusion draw from g and z
#   STAGES="synthetic finetune" bash scripts/train.sh --num_sessions 1    on what it simulated first: docs/flags.md
#   WANDB_LOG=1 WANDB_MODE=offline bash scripts/train.sh --tag a     log to W&B on this disk; variants side by side
#   LAUNCH="accelerate launch --config_file scripts/accelerate/ddp.yaml" bash scripts/train.sh   several GPUs
#
# Knobs, in front of the command:
#   SUBJ=1                                   the subject
#   FEATS="c z g_2 g_4 g_6 g_8 g_10 g_12"    features to train; g: all of its layers
#   STAGES="pretrain finetune"               one after another; also scratch (on SUBJ alone), ridge (the linear
#                                            baseline), gnet, adapter, and, before finetune, synthetic (on simulated
#                                            responses)
#   JOBS=1                                   so many trainings of a stage side by side, sharing the cores
#   ROOT=<the repository>                    the folder that holds data and results
#   LAUNCH=""                                accelerate launch ..., for several GPUs
#   WANDB_LOG=0                              1: log to W&B
#   DRY_RUN=0                                1: show the configuration and the folders to write, and stop
#   PYTHON=.venv/bin/python                  the Python to use
#   TRAIN_FLAGS=""                           flags to put in front of yours; also of one stage, or of one stage and
#                                            feature: PRETRAIN_FLAGS, FINETUNE_Z_FLAGS, ... (Z, C or G)
#   TRAIN_GNET_FLAGS="" TRAIN_ADAPTER_FLAGS=""    the same of these stages
#
# A run lies in ROOT/train_logs/ and is named by stage, SUBJ, --num_sessions, feature (g: all of its layers),
# --hidden_dim and --tag:
# docs/data.md, Names on disk.
# All flags with their defaults: python3 src/train_c.py --help (train_z.py and train_g.py take one or two more)
source "$(dirname "$0")/common.sh"

# Train by one script: train c STAGE [flags]. In a subshell, so that what is preset for it stays with it.
train() (
    upper=$(tr '[:lower:]' '[:upper:]' <<<"$2_$1")
    preset TRAIN "${upper%_*}" "$upper"
    run "${LAUNCH[@]}" "$REPO/src/train_$1.py" "${@:3}" "${LOGGED[@]}" ${given[@]+"${given[@]}"}
)

given=("$@")
start=auto # what fine-tuning starts from
for stage in "${STAGES[@]}"; do
    case $stage in
        pretrain) flags=(--multi_subject) ;;
        synthetic) flags=(--synthetic --multisubject_ckpt auto) start=synthetic ;;
        finetune) flags=(--multisubject_ckpt "$start") ;;
        scratch) flags=() ;;
        ridge) flags=(--model ridge) ;;
        gnet | adapter)
            preset="TRAIN_$(tr '[:lower:]' '[:upper:]' <<<"$stage")"
            (preset "$preset" && run "${LAUNCH[@]}" "$REPO/src/train_$stage.py" --subj "$SUBJ" --resume "${LOGGED[@]}" "$@")
            continue
            ;;
    esac
    flags+=(--subj "$SUBJ" --resume)
    for feat in c z; do
        if wants "$feat"; then beside train "$feat" "$stage" "${flags[@]}"; fi
    done
    if [[ ${#G_FEATS[@]} -gt 0 ]]; then beside train g "$stage" --feat "${G_FEATS[@]}" "${flags[@]}"; fi
    finish # fine-tuning starts from what pretraining made
done
