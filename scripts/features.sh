#!/usr/bin/env bash
# Extract c, z and g_2...g_12 of all stimuli: bash scripts/features.sh [flags of img2feat.py]
source "$(dirname "$0")/common.sh"
run "$PYTHON" "$REPO/src/img2feat.py" "${FLAGS[@]}" "$@"
