#!/usr/bin/env bash
# Fuzzes the parsers, in a virtual environment of its own: make fuzz [FUZZ_SECONDS=600] [FUZZ_TARGET=gguf] [FUZZ_JOBS=1]
# usage: fuzz.sh [OPTION ...], the options of tools/fuzz.py
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/.venv-fuzz

if [ ! -e "$venv/.complete" ] || [ requirements/fuzz.txt -nt "$venv/.complete" ]; then
  python3 -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement requirements/fuzz.txt 2>&1 | grep -v '^WARNING: Location' || true
  "$venv/bin/python" -c 'import atheris' || { echo "fuzz: atheris is not installed in ${venv##*/}; it has wheels for Python 3.11 to 3.13" >&2; exit 1; }
  touch "$venv/.complete"
fi
# By the Python of the tests, whose builders it uses.
python3 -m tests.fuzz.seeds "${CPULLM_CACHE:-$HOME/.cache/cpullm}/fuzz"
exec "$venv/bin/python" -m tools.fuzz "$@"
