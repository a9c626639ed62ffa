#!/usr/bin/env bash
# Regenerates coserve/server/grpc_gen from proto/. Usage: scripts/proto.sh VENV [OUTPUT_DIRECTORY]
# The stubs import each other from that package: protoc itself would make it `coserve.v1`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$(cd "$1" && pwd)
out=${2:-$root/coserve/server/grpc_gen}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root/proto"
"$venv/bin/python" -m grpc_tools.protoc -I. --python_out="$work" --grpc_python_out="$work" coserve/v1/*.proto
for file in "$work"/coserve/v1/*.py; do
    sed -i 's/^from coserve\.v1 import /from coserve.server.grpc_gen import /' "$file"
    target=$out/$(basename "$file")
    cmp -s "$file" "$target" || cp "$file" "$target"
done
