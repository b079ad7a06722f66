#!/usr/bin/env bash
# Builds the engine for this machine, with our patches and without, makes random models in the cache, and runs the
# benchmarks that need them; then the controller's own.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CPULLM_CACHE:=$HOME/.cache/cpullm}"
export PYTHONPATH=.collections
engine=$CPULLM_CACHE/engine/current/bin
stock=$CPULLM_CACHE/engine-stock/current/bin

# Makes a random model in the cache, once, and prints its first shard.
model() {
  local folder=$CPULLM_CACHE/models/$1
  if [ ! -e "$folder/complete" ]; then
    rm -rf "$folder"
    python -m tools.model.random_model --output "$folder" "${@:2}" >&2
    touch "$folder/complete"
  fi
  find "$folder" -name '*.gguf' | sort | head --lines=1
}

ansible-playbook -i inventories/local tests/engine/build.yml
ansible-playbook -i inventories/local tests/engine/build.yml \
  -e '{"llamacpp_build_patch_set": null}' -e "llamacpp_build_prefix=$CPULLM_CACHE/engine-stock"

python -m bench.load_anonymous --engine "$engine" --model "$(model bench-2.9-gib --size-gib 2.9 --shards 2)"
small=$(model bench-0.97-gib --size-gib 0.97)
middle=$(model bench-moe-5gib --size-gib 5.2)
large=$(model bench-9.8-gib --size-gib 9.8 --shards 2)
python -m bench.load --engine "$engine" --stock "$stock" --model "$middle" --ready "$small" "$middle" "$large"
python -m bench.pages --engine "$engine" --model "$middle"
python -m bench.kernels --stock "$stock" --patched "$engine" \
  --model "$(model bench-moe-5gib --size-gib 5.2)" \
  --dense "$(model bench-dense-1gib --size-gib 1.1 --architecture llama)"
python -m bench.plan_scale
