#!/usr/bin/env bash
# Compile csrc/ and install the library beside the Python that loads it (coserve/kernels).
# Usage: build_native.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
cmake=$venv/bin/cmake
[ -x "$cmake" ] || cmake=cmake
log=build/native/build.log
mkdir -p build/native
if ! {
    "$cmake" -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$venv/bin/python" &&
    "$cmake" --build build/native --parallel 2 &&
    "$cmake" --install build/native --prefix .
} >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "setup: the native kernels did not build (they need a C++17 compiler and Python's headers; whole log in $log)" >&2
    exit 1
fi
