#!/usr/bin/env bash
# Clients and peers that the tests drive the server with, apart from its own environment, under build/clients:
#   venv        LangChain, LiteLLM and the Tinker SDK (tests/conformance/clients.txt)
#   node        the official Node client (tests/conformance/node)
#   prometheus  Prometheus and promtool, Debian's package unpacked
# A part that can't be had here is left out with a word why; its tests skip and say so.
# Usage: setup_clients.sh PYTHON
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 clients=$PWD/build/clients sources=$PWD/tests/conformance
mkdir -p "$clients"

# part NAME WHAT_IT_IS_MADE_FROM: make it again when that changed
part() {
    local name=$1 key
    key=$(printf '%s' "$2" | sha256sum | cut -d ' ' -f 1)
    [ "$(cat "$clients/$name/.installed" 2>/dev/null)" = "$key" ] && return
    rm -rf "${clients:?}/$name"
    mkdir -p "$clients/$name"
    if "make_$name" >"$clients/$name.log" 2>&1; then
        printf '%s' "$key" >"$clients/$name/.installed"
    else
        rm -rf "${clients:?}/$name"
        echo "setup: no $name for the conformance tests: $(tail -n 1 "$clients/$name.log") (whole log in build/clients/$name.log)" >&2
    fi
}

make_venv() {
    "$python" -m venv "$clients/venv" &&
        "$clients/venv/bin/python" -m pip --disable-pip-version-check install --quiet -r "$sources/clients.txt"
}

make_node() {
    command -v npm || { echo "npm isn't installed"; return 1; }
    cp "$sources/node/package.json" "$sources/node/package-lock.json" "$clients/node/" &&
        npm --prefix "$clients/node" ci --no-audit --no-fund --omit=optional
}

make_prometheus() {
    local prometheus
    prometheus=$(command -v prometheus) && command -v promtool && {
        mkdir -p "$clients/prometheus/bin" &&
            ln -s "$prometheus" "$(command -v promtool)" "$clients/prometheus/bin/"
        return
    }
    command -v apt-get || { echo "neither prometheus nor apt-get is here"; return 1; }
    (cd "$clients/prometheus" && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } &&
        dpkg -x prometheus_*.deb . && rm prometheus_*.deb && ln -s usr/bin bin)
}

part venv "$(cat "$sources/clients.txt")"
part node "$(cat "$sources/node/package-lock.json")"
part prometheus debian
exit 0
