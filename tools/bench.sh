#!/usr/bin/env bash
# Builds the engine for this machine, makes random models in the cache, and runs the benchmarks that need them; then the
# controller's own. Options are those of bench.load_anonymous.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CPULLM_CACHE:=$HOME/.cache/cpullm}"
engine=$CPULLM_CACHE/engine/current/bin

# The first shard of a random model of that many GiB, made where it is not there yet.
model() {
  local folder=$CPULLM_CACHE/models/bench-$1-gib
  if [ ! -e "$folder/complete" ]; then
    rm -rf "$folder"
    python -m tools.model.random_model --size-gib "$1" --shards "$2" --output "$folder" >&2
    touch "$folder/complete"
  fi
  find "$folder" -name '*.gguf' | sort | head --lines=1
}

ansible-playbook -i inventories/local tests/engine/build.yml
first=$(model 2.9 2)
python -m bench.load_anonymous --engine "$engine" --model "$first" "$@"
small=$(model 0.97 1) middle=$(model 5.4 2) large=$(model 9.8 2)
python -m bench.load --engine "$engine" --model "$middle" --ready "$small" "$middle" "$large"
python -m bench.plan_scale
