# Sourced before anything else by every script here: -h or --help prints the comment at its head, and nothing runs.
# shellcheck shell=bash
for word in "$@"; do
    if [[ $word == -h || $word == --help ]]; then
        sed -n -e 1d -e '/^#/!q' -e '/^# shellcheck/d' -e 's/^# \{0,1\}//p' "$0"
        exit 0
    fi
done
