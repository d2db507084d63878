#!/bin/sh
# Make .venv with everything the project needs, at the versions in constraints.txt. Safe to run again.
set -eu
cd "$(dirname "$0")/.."

fail() { printf 'Set-up failed: %s\n' "$1" >&2; exit 1; }

# A Python that is new enough; the user's choice first.
python=""
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 to 3.13 is needed. On Debian or Ubuntu: sudo apt install python3 python3-venv"

if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || { rm -rf .venv; fail "venv is missing. On Debian or Ubuntu: sudo apt install python3-venv"; }
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch first, so that nothing pulls gigabytes of CUDA onto a machine without an NVIDIA GPU.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "Installing torch $torch ..."
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        pip install -q "torch==$torch"
    elif [ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ]; then
        # The CPU build: from the user's own index if it has it, else from torch's, else whatever there is.
        pip install -q "torch==$torch+cpu" 2>/dev/null ||
            pip install -q "torch==$torch" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            pip install -q "torch==$torch"
    else
        pip install -q "torch==$torch"
    fi
fi
echo "Installing internlm2 and its tools ..."
pip install -q -c constraints.txt -e '.[dev]'
touch .venv/.ready
echo "Ready: .venv/bin/internlm2"
