#!/usr/bin/env bash
# Builds the engine for this machine, makes a random model in the cache, and runs the benchmarks that need them; then the
# controller's own. Options are those of bench.load_anonymous.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CPULLM_CACHE:=$HOME/.cache/cpullm}"
model=$CPULLM_CACHE/models/bench-2.9-gib

ansible-playbook -i inventories/local tests/engine/build.yml
if [ ! -e "$model/complete" ]; then
  rm -rf "$model"
  python -m tools.model.random_model --size-gib 2.9 --shards 2 --output "$model"
  touch "$model/complete"
fi
first=$(find "$model" -name '*-00001-of-*.gguf')
python -m bench.load_anonymous --engine "$CPULLM_CACHE/engine/current/bin" --model "$first" "$@"
python -m bench.plan_scale
