#!/usr/bin/env bash
# Look requirements.lock up in an advisory database, with pip-audit in an environment of its own.
# Needs a network that reaches one; fails when a locked version is known to be vulnerable.
# Usage: audit.sh PYTHON [REQUIREMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 requirements=${2:-requirements.lock} venv=build/audit

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! "$venv/bin/python" -m pip --disable-pip-version-check install --quiet pip-audit; then
    echo "audit: pip-audit can't be had here" >&2
    exit 2
fi
exec "$venv/bin/pip-audit" --requirement "$requirements" --require-hashes --disable-pip --progress-spinner off
