#!/usr/bin/env bash
# The suite with the oldest versions that requirements.txt admits, in a venv of its own (OLDEST_VENV, .venv-oldest):
#     tests/oldest.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${OLDEST_VENV:-.venv-oldest}
oldest=$(mktemp)
trap 'rm -f "$oldest"' EXIT
# Both files are one here, so that no line takes the other in as it is
sed -E '/^-r /d; s/^([A-Za-z0-9_.-]+)>=([0-9.]+)[^#]*/\1==\2  /' requirements.txt requirements-dev.txt > "$oldest"
test -d "$venv" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$oldest"
"$venv/bin/python" -m pip freeze
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q --numprocesses "${TEST_PROCESSES:-logical}" --maxprocesses 4 \
    --dist worksteal "$@"
