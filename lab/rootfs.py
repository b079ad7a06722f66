# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Debian root file system that both kinds of host are made from: one tar per release and recipe.

It holds what a fresh cloud host of that release would have, and nothing that the collection installs. It has no kernel
and no boot loader (lab/image.py adds them for VMs), no ssh host key, no authorized key, and an empty machine id.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lab.state import RELEASES, LabError, folder, lock, prune, say

RECIPE_VERSION = 1

# What a cloud image of Debian has beyond minbase, as far as Ansible and the collection's roles may lean on it.
PACKAGES = (
    "apt-utils",
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "netbase",
    "openssh-server",
    "procps",
    "python3",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "zstd",
)

# Nothing below is read on a server in the lab, and it is a third of the size.
_PATHS_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/doc/*")
_PATHS_KEPT = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")

# Timers that would take the CPU from a two-core lab at a time of their own. A test that needs one unmasks it.
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")

_HOOK = """
set -eu
root="$1"
printf 'lab\\n' > "$root/etc/hostname"
printf '127.0.0.1 localhost\\n::1 localhost ip6-localhost\\n' > "$root/etc/hosts"
: > "$root/etc/machine-id"
printf 'LANG=C.UTF-8\\n' > "$root/etc/default/locale"
rm -f "$root"/etc/ssh/ssh_host_*
for unit in MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
mkdir -p "$root/etc/ssh/sshd_config.d" "$root/root/.ssh"
chmod 0700 "$root/root/.ssh"
printf 'UseDNS no\\nGSSAPIAuthentication no\\nHostKey /etc/ssh/ssh_host_ed25519_key\\n' \\
    > "$root/etc/ssh/sshd_config.d/lab.conf"
rm -f "$root/etc/resolv.conf" "$root"/var/cache/apt/*.bin "$root"/var/log/*.log "$root"/var/log/apt/*
"""


def packages() -> tuple[str, ...]:
    """Return the packages that are installed beyond Debian's minbase, sorted."""
    return tuple(sorted(PACKAGES))


def mirrors(sources: Sequence[Path] | None = None) -> tuple[str, str]:
    """Return the URLs of Debian and of its security archive, as this machine's own apt uses them.

    Raises LabError where apt's sources name no Debian archive.
    """
    plain = security = ""
    if sources is None:
        sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in sources:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        for url in re.findall(r"https?://[^\s\]]+", "\n".join(lines)):
            stripped = url.rstrip("/")
            if stripped.endswith("/debian-security"):
                security = stripped
            elif stripped.endswith("/debian"):
                plain = stripped
    if not plain:
        raise LabError("apt's sources name no Debian archive (an address that ends in /debian); add one and run again")
    return plain, security or f"{plain}-security"


def sources_text(release: str, urls: tuple[str, str]) -> str:
    """Return the deb822 sources file of a release: main, updates and security."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    return "\n".join(
        f"Types: deb\nURIs: {url}\nSuites: {suites}\nComponents: main\nSigned-By: {keyring}\n"
        for url, suites in ((urls[0], f"{release} {release}-updates"), (urls[1], f"{release}-security"))
    )


def hook_text() -> str:
    """Return the shell script that settles the file system before it is packed."""
    return _HOOK.replace("MASKED", " ".join(_MASKED))


def recipe_hash(release: str, urls: tuple[str, str]) -> str:
    """Return 16 hex digits that change with everything that goes into the tar but the archive's present content."""
    recipe = [RECIPE_VERSION, release, packages(), sources_text(release, urls), hook_text()]
    recipe += [_PATHS_LEFT_OUT, _PATHS_KEPT]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def require_programs(names: Sequence[str]) -> None:
    """Raise LabError with the way out if a program is missing on this machine, or if the user is not root."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [name for name in names if shutil.which(name, path=search) is None]
    if missing:
        listed = Path(__file__).with_name("packages.txt")
        words = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
        wanted = " ".join(word for word in words if word and not word.startswith("#"))
        raise LabError(
            f"missing on this machine: {', '.join(missing)}; "
            f"install with: apt-get install --no-install-recommends {wanted}"
        )
    if os.geteuid() != 0:
        raise LabError("the lab needs root (it makes file systems, mounts and namespaces): run it as root or with sudo")


def build(release: str) -> Path:
    """Return the tar of a release's root file system, made if it is not in the cache (about 40 s)."""
    if release not in RELEASES:
        raise LabError(f"release {release!r}: expected one of {', '.join(RELEASES)}")
    urls = mirrors()
    digest = recipe_hash(release, urls)
    path = folder("rootfs") / f"{release}-{digest}.tar"
    if path.exists():
        path.touch()
        return path
    require_programs(["mmdebstrap", "ssh-keygen"])
    with lock(f"rootfs-{release}"):
        if path.exists():
            return path
        say(f"making the root file system of Debian {release} (about a minute)")
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".work-") as work:
            result = _mmdebstrap(release, urls, Path(work))
            os.replace(result, path)
        say(f"root file system ready after {time.monotonic() - begin:.0f} s: {path.stat().st_size >> 20} MiB")
        prune(path.parent.glob(f"{release}-*.tar"), keep=path)
    return path


def _mmdebstrap(release: str, urls: tuple[str, str], work: Path) -> Path:
    sources = work / "lab.sources"
    sources.write_text(sources_text(release, urls), encoding="utf-8")
    hook = work / "settle.sh"
    hook.write_text(hook_text(), encoding="utf-8")
    result = work / "root.tar"
    log = folder("rootfs") / f"{release}.log"
    argv = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(packages())}",
        "--aptopt=Apt::Install-Recommends false",
        "--aptopt=Acquire::Retries 3",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _PATHS_LEFT_OUT),
        *(f"--dpkgopt=path-include={pattern}" for pattern in _PATHS_KEPT),
        f'--customize-hook=sh {hook} "$1"',
        # The options above serve the building; a host must behave like any other Debian.
        '--customize-hook=rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap" "$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap"',
        release,
        str(result),
        str(sources),
    ]
    environment = {**os.environ, "TMPDIR": str(work), "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    environment["PATH"] = environment.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise LabError(
            f"mmdebstrap of {release} failed with {done.returncode}; is {urls[0]} within reach? {log} ends with:\n"
            + "\n".join(lines)
        )
    return result
