#!/usr/bin/env bash
# Train the encoders of FEATS: pretrain on every subject but SUBJ, then fine-tune on SUBJ. Flags go to every training.
#   SUBJ=2 bash scripts/train.sh                      STAGES=finetune FEATS="c g_2" bash scripts/train.sh --num_epochs 10
#   WANDB_LOG=1 bash scripts/train.sh                 STAGES=ridge bash scripts/train.sh    (the linear baseline)
#   STAGES=gnet bash scripts/train.sh                 (the brain encoding model of SUBJ; of all subjects with --multi_subject)
source "$(dirname "$0")/common.sh"

for stage in "${STAGES[@]}"; do
    case $stage in
        pretrain) flags=(--multi_subject) ;;
        finetune) flags=(--multisubject_ckpt auto) ;;
        scratch) flags=() ;;
        ridge) flags=(--model ridge) ;;
        gnet) run "${LAUNCH[@]}" "$REPO/src/train_gnet.py" --subj "$SUBJ" --resume "${LOGGED[@]}" "$@"; continue ;;
        *) echo "error: STAGES: $stage is not a stage; wanted pretrain, finetune, scratch, ridge or gnet" >&2; exit 2 ;;
    esac
    flags+=(--subj "$SUBJ" --resume "${LOGGED[@]}")
    for feat in c z; do
        if wants "$feat"; then run "${LAUNCH[@]}" "$REPO/src/train_$feat.py" "${flags[@]}" "$@"; fi
    done
    if [[ ${#G_FEATS[@]} -gt 0 ]]; then
        run "${LAUNCH[@]}" "$REPO/src/train_g.py" --feat "${G_FEATS[@]}" "${flags[@]}" "$@"
    fi
done
