#!/usr/bin/env bash
# Runs `ansible-test sanity` on what the collection ships, in a copy that lies where ansible-test wants it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(python -c 'import sys; print(".".join(map(str, sys.version_info[:2])))')
copy=$PWD/build/sanity/ansible_collections/cpullm/epyc
mkdir -p "$copy"
git ls-files --cached --others --exclude-standard -z -- . \
  ':!.collections' ':!.ci' ':!bench' ':!inventories' ':!lab' ':!molecule' ':!requirements' ':!tests' ':!tools' \
  | while IFS= read -r -d '' file; do [ -e "$file" ] && printf '%s\0' "$file"; done \
  | rsync --archive --delete --delete-missing-args --from0 --files-from=- ./ "$copy"/

# ansible-test fetches a script that installs pip from a host of its own; the Python at hand brings pip along.
home=${CPULLM_CACHE:-$HOME/.cache/cpullm}/ansible-test
mkdir -p "$home/.ansible/test/cache"
for version in 24.2 25.0 25.1 25.2 26.0; do
  printf 'import ensurepip, sys\nensurepip.bootstrap(upgrade=True)\n' >"$home/.ansible/test/cache/get_pip_${version//./_}.py"
done
cd "$copy"
# A repository of its own: the one around it ignores build/, and ansible-test would then see nothing.
git init --quiet
HOME=$home ansible-test sanity --venv --requirements --python "$python" --color no "$@"
