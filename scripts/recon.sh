#!/usr/bin/env bash
# Turn SUBJ's scores into images: bash scripts/recon.sh [flags of recon.py]
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/recon.py" --subj "$SUBJ" "${LOGGED[@]}" "$@"
