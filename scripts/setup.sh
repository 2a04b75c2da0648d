#!/usr/bin/env bash
# Make .venv and install requirements into it, unless they are there already.
#
#   bash scripts/setup.sh                          requirements.txt: the whole pipeline
#   bash scripts/setup.sh requirements-dev.txt     and what the tests need
#   bash scripts/setup.sh requirements-eval.txt    and torchvision, for the metrics that need it
#   bash scripts/setup.sh requirements-wandb.txt   and what makes a workspace on W&B
#   bash scripts/setup.sh requirements-maps.txt    and nilearn, for pictures of maps of the brain
#   bash scripts/setup.sh --renew                  after a pin in requirements*.txt was changed: write constraints.txt
#
# PYTHON=/path/to/python3 chooses the Python that .venv is made of (3.11 or newer).
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
oldest=3.11 # of the Pythons that all pins support
python=${PYTHON:-python3}
[[ ${1:-} == --renew || ! -x .venv/bin/python ]] || python=.venv/bin/python
"$python" -c "import sys; sys.exit(sys.version_info < (${oldest/./, }))" || {
    [[ $python == .venv/* ]] && hint="delete .venv" || hint="set PYTHON=/path/to/python3"
    echo "error: $python is $("$python" -V 2>&1), wanted Python $oldest or newer; $hint" >&2
    exit 2
}

# Write constraints.txt: the newest versions that go with the pins, of everything they bring along.
renew() {
    "$python" -c "import sys; sys.exit(sys.version_info[:2] != (${oldest/./, }))" || {
        echo "error: --renew: $python is $("$python" -V 2>&1), wanted Python $oldest, the oldest: newer ones take its" \
            "versions, too; set PYTHON=/path/to/python$oldest" >&2
        exit 2
    }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" -m venv "$work"
    "$work/bin/python" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
        --report "$work/report.json" -r requirements-dev.txt -r requirements-eval.txt -r requirements-wandb.txt \
        -r requirements-maps.txt
    "$work/bin/python" - "$work/report.json" <<'END' >"$work/constraints.txt"
import json
import re
import sys

print("# Versions of what the pins in requirements*.txt bring along, as tested; written by: bash scripts/setup.sh --renew\n"
      "# CUDA's libraries are left to torch, which knows the ones it was built with.")
for package in sorted(json.load(open(sys.argv[1]))["install"], key=lambda package: package["metadata"]["name"].lower()):
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if not package["requested"] and not re.match(r"(nvidia|cuda|triton)\b", name):
        print(f"{name}=={version}")
END
    mv "$work/constraints.txt" constraints.txt
    git diff --stat -- constraints.txt 2>/dev/null || true
}

if [[ ${1:-} == --renew ]]; then
    renew
    exit 0
fi
requirements=${1:-requirements.txt}
[[ -f $requirements ]] || { echo "error: $requirements: no such file; give requirements.txt, -dev, -eval, -maps or -wandb" >&2; exit 2; }
wanted=(requirements*.txt constraints.txt) # one may name others
stamp=.venv/installed-$(basename "$requirements")
if [[ -f $stamp ]] && cat "${wanted[@]}" | cmp -s - "$stamp"; then
    exit 0
fi
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
echo "installing $requirements into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" -c constraints.txt
cat "${wanted[@]}" >"$stamp"
