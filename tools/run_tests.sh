#!/usr/bin/env bash
# Runs the parts of the tests, each with its time, and stops at the first that fails.
# usage: run_tests.sh all | PART ...
# All of them run in two lanes side by side: an emulated machine keeps one core busy at most.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CPULLM_CACHE:=$HOME/.cache/cpullm}"

# What needs 1 GiB pages comes before what scatters this machine's memory. A lane that is through with its own parts
# takes the next of the others.
parts=(lint engine containers)
beside=(sites boots)
either=(vms next sanity unit)

lint() {
  ruff check .
  ruff format --check .
  mypy lab plugins tools bench
  # Programs that run on a host beside a copy of their library.
  MYPYPATH=plugins/module_utils:roles/systemd_service/files mypy --follow-imports=silent roles/*/files
  yamllint --strict .
  git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
  ansible-lint
  ansible-playbook --syntax-check -i inventories/example site.yml playbooks/*.yml
}

unit() {
  python -m pytest -q tests/unit tests/repo tests/browser
}

# The quick checks on the newest ansible-core that a Python of this machine runs.
next() {
  local python='' candidate
  for candidate in python3.14 python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[234]*/bin/python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "next: no Python 3.12 or newer here, which ansible-core 2.21 needs; checked with 2.19 alone"
    return
  fi
  local venv=$PWD/.venv-next
  if [ ! -e "$venv/.complete" ] || [ requirements/next.txt -nt "$venv/.complete" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement requirements/next.txt 2>&1 | grep -v '^WARNING: Location' || true
    touch "$venv/.complete"
  fi
  "$venv/bin/python" -c 'import ansible.release; print("next: ansible-core", ansible.release.__version__)'
  PATH=$venv/bin:$PATH "$venv/bin/python" -m pytest -q tests/unit -p no:cacheprovider
  PATH=$venv/bin:$PATH "$venv/bin/ansible-playbook" --syntax-check -i inventories/example site.yml playbooks/*.yml
}

sanity() {
  tools/sanity.sh
}

# The engine for this machine's CPU, built by the role as an operator's controller would.
engine() {
  ansible-playbook -i inventories/local tests/engine/build.yml
  CPULLM_ENGINE_BIN=$CPULLM_CACHE/engine/current/bin python -m pytest -q tests/engine
}

# The whole form of the kernels' tests: longer than CI has, and not part of `all`. Goes on where it was stopped.
soak() {
  ansible-playbook -i inventories/local tests/engine/build.yml
  CPULLM_SOAK=1 CPULLM_SOAK_RESULTS=1 CPULLM_ENGINE_BIN=$CPULLM_CACHE/engine/current/bin \
    python -m pytest -v tests/engine/test_kernels.py tests/engine/test_decode_kernels.py tests/engine/test_outputs.py
}

containers() {
  python -m pytest -q tests/acceptance -m 'lab and not vm and not faults'
  scenarios --files-without-match
}

vms() {
  python -m pytest -q tests/acceptance -m 'vm and not boots and not faults'
}

# The whole of site.yml on VMs.
sites() {
  scenarios --files-with-matches
}

# Kernel command lines that are refused, verified or survived, in one VM.
boots() {
  python -m pytest -q tests/acceptance -m boots
}

# Hosts that are broken on purpose, longer than CI has, and not part of `all`.
faults() {
  python -m pytest -q tests/acceptance -m faults
}

# The molecule scenarios with or without a VM.
scenarios() {
  local file scenario
  local -a files
  mapfile -t files < <(grep "$1" --word-regexp 'kind: vm' molecule/*/molecule.yml)
  for file in "${files[@]}"; do
    scenario=$(basename "$(dirname "$file")")
    timed "molecule $scenario" command molecule test --scenario-name "$scenario"
  done
}

timed() {
  local begin=$SECONDS
  echo "==> $1"
  "${@:2}"
  echo "==> $1: $((SECONDS - begin)) s"
}

hosts() {
  python3 -m lab list | awk 'NR > 1 { print $1 }' | sort
}

# A scenario that is ended cannot stop its own.
hub=$PWD/tests/support/hub.py

# What a test could leave on this machine.
belongings() {
  cat /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages
  losetup --all
  ip netns list | sort
  findmnt --raw --noheadings --output TARGET | grep -vx /run/netns | sort
  local name
  for name in qemu-system systemd-nspawn slirp4netns llama-server aria2c; do
    # Not the dead: when they are collected is up to the machine's first process.
    printf '%s %s\n' "$name" "$(pgrep --runstates D,R,S,T,I --count "^$name" || true)"
  done
  pgrep --list-full --full "$hub" | cut --delimiter=' ' --fields=2- || true
}

# Whatever happened: no host of the lab stays that was not there before, and nothing else does either.
clean() {
  local status=$? made left
  end_lanes
  wait
  mapfile -t made < <(comm -13 <(echo "$hosts_before") <(hosts))
  pkill --full "$hub" || true
  if ((${#made[@]})); then python3 -m lab down "${made[@]}" || true; fi
  if ! left=$(diff <(echo "$belongings_before") <(belongings)); then
    echo "==> left behind, or gone:" "$left" >&2
    ((status)) || status=1
  fi
  exit "$status"
}

run() {
  local part
  for part; do
    timed "$part" "$part"
  done
}

# The parts of a lane, then what no lane has taken of the others; a folder is made by one of them only.
lane() {
  local taken=$1 part
  run "${@:2}"
  for part in "${either[@]}"; do
    if mkdir "$taken/$part" 2>/dev/null; then run "$part"; fi
  done
}

# The first lane's output comes as it goes, the second one's at its end. When one fails, the other is ended, and what the
# failed one said of it comes last: a log may be kept by its end alone.
lanes=()
both_lanes() {
  local logs i failed status=0 first=
  logs=$(mktemp --directory)
  # With job control each lane is a process group, and can be ended whole.
  set -m
  (lane "$logs" "${parts[@]}" 2>&1 | tee "$logs/0") &
  lanes+=($!)
  (lane "$logs" "${beside[@]}") >"$logs/1" 2>&1 &
  lanes+=($!)
  set +m
  echo "==> beside these, shown at the end: ${beside[*]}; from the lane that is free, ${either[*]}"
  wait -n -p first "${lanes[@]}" || status=$?
  if ((status)); then end_lanes; fi
  for i in 0 1; do
    failed=0
    wait "${lanes[i]}" || failed=$?
    if ((failed && !status)); then status=$failed first=${lanes[i]}; fi
  done
  cat "$logs/1"
  if ((status)); then
    i=0
    if [ "$first" = "${lanes[1]}" ]; then i=1; fi
    echo "==> what failed, again:"
    python tools/failures.py "$logs/$i"
  fi
  rm -r "$logs"
  return "$status"
}

end_lanes() {
  local lane
  for lane in "${lanes[@]}"; do kill -- "-$lane" 2>/dev/null || true; done
}

begin=$SECONDS
if [[ " ${*:-all} " =~ \ (all|engine|containers|vms|sites|boots|faults)\  ]]; then
  hosts_before=$(hosts)
  belongings_before=$(belongings)
  trap clean EXIT
fi
if [ "${*:-all}" = all ]; then both_lanes; else run "$@"; fi
echo "==> ${*:-all}: $((SECONDS - begin)) s"
