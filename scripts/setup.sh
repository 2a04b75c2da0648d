#!/usr/bin/env bash
# Make .venv and install a requirements file into it, unless it is installed already: bash scripts/setup.sh [requirements.txt]
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
requirements=$repo/${1:-requirements.txt}
[[ -f $requirements ]] || { echo "error: $requirements: no such file; give requirements.txt, -dev or -eval" >&2; exit 2; }
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: $python is $("$python" -V 2>&1), wanted Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 2; }

stamp=$repo/.venv/installed-$(basename "$requirements")
if [[ -f $stamp ]] && cmp -s <(cat "$repo/requirements.txt" "$requirements") "$stamp"; then
    exit 0
fi
[[ -x $repo/.venv/bin/python ]] || "$python" -m venv "$repo/.venv"
echo "installing $(basename "$requirements") into .venv"
"$repo/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
cat "$repo/requirements.txt" "$requirements" >"$stamp"
