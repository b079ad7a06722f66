#!/usr/bin/env bash
# Installs what the clone needs on a Debian machine: packages through apt, Python parts into a virtual environment.
# usage: setup.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

mapfile -t wanted < <(sed 's/#.*//' requirements/apt.txt lab/packages.txt | awk 'NF { print $1 }' | sort -u)
missing=()
for package in "${wanted[@]}"; do
  # shellcheck disable=SC2016 # the format is dpkg's
  [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "setup: installing Debian packages: ${missing[*]}"
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: not root and no sudo; install them by hand: ${missing[*]}" >&2; exit 1; }
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ ! -x "$venv/bin/python" ]; then
  echo "setup: making the virtual environment ${venv##*/} with $(python3 --version)"
  python3 -m venv "$venv"
fi
echo "setup: installing requirements/test.txt into ${venv##*/}"
"$venv/bin/pip" install --quiet --disable-pip-version-check --requirement requirements/test.txt 2>&1 | grep -v '^WARNING: Location' || true
"$venv/bin/python" -c 'import ansible, molecule, pytest' || { echo "setup: $venv is incomplete; remove it and run make again" >&2; exit 1; }
