#!/usr/bin/env bash
# Make the virtual environment: torch for this machine's device first, then the project and its tools.
# Usage: setup_venv.sh PYTHON VENV TORCH_VERSION [TORCH_INDEX_URL]
set -euo pipefail
cd "$(dirname "$0")/.."
cmake_minimum=3.25
python=$1 venv=$2 torch_version=$3 torch_index_url=${4:-}

[ -n "$python" ] || { echo "setup: no python3 found; install Python 3.11 or pass PYTHON=..." >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

# A "+cpu" build, where pip's own sources have one, wins over the plain version with "==" and is shut out
# with "===". So a machine without a GPU gets the small build when it can, and one with a GPU never does.
if [ -n "$torch_index_url" ]; then
    "${pip[@]}" --index-url "$torch_index_url" "torch==$torch_version"
elif nvidia-smi -L >/dev/null 2>&1; then
    "${pip[@]}" "torch===$torch_version"
else
    "${pip[@]}" "torch==$torch_version"
fi

# All else as it was locked, file by file. Another platform or Python has other files, and a mirror may lack one:
# then the newest within pyproject.toml's ranges are taken, and `.unlocked` tells the tests so.
unlocked="$venv/.unlocked"
rm -f "$unlocked"
locked_for=$(sed -n '1s/.* for \(.*\)\.$/\1/p' requirements.lock)
here=$("$venv/bin/python" -c 'import platform as p; v = p.python_version_tuple(); print(
    f"{p.system()} {p.machine()}, Python {v[0]}.{v[1]}")')
if [ "$locked_for" != "$here" ]; then
    echo "requirements.lock is for $locked_for, this is $here" >"$unlocked"
elif ! "${pip[@]}" --require-hashes --no-deps --requirement requirements.lock; then
    echo "not every file of requirements.lock could be had" >"$unlocked"
fi
[ ! -e "$unlocked" ] || echo "setup: $(cat "$unlocked"); the newest that pyproject.toml allows are taken" >&2

# Editable, so that a test sees the working tree; the native library is built into the tree by
# build_native.sh, where a change recompiles one file instead of making a wheel again.
"${pip[@]}" --config-settings=wheel.cmake=false --config-settings=editable.mode=inplace \
    --editable '.[test,demo,bench]'

have=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p' || true)
if [ "$(printf '%s\n' "$cmake_minimum" "${have:-0}" | sort -V | head -n 1)" != "$cmake_minimum" ]; then
    "${pip[@]}" "cmake>=$cmake_minimum"
fi
