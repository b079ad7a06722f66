# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The disk that VMs start from: GPT, GRUB for BIOS and UEFI, ext4, a kernel; one qcow2 per release and recipe.

A host's own disk is a qcow2 overlay on it, so the image is never written again. lab/make-image.sh does the work that
needs root; this module decides what goes in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from lab import rootfs, ssh
from lab.state import LabError, folder, lock, prune, say

RECIPE_VERSION = 1
DISK_GIB = 32

_SCRIPT = Path(__file__).with_name("make-image.sh")

# (path, mode) -> content. What makes a Debian root file system a VM of the lab.
_GRUB = """\
# The lab's console: the menu and the kernel on the serial port, and a short menu.
GRUB_TIMEOUT=1
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
GRUB_CMDLINE_LINUX_DEFAULT="quiet"
"""
_NETWORK = """\
[Match]
Name=en* eth*

[Network]
DHCP=ipv4
LinkLocalAddressing=no
LLMNR=no
MulticastDNS=no
IPv6AcceptRA=no
"""
# A root shell without password or session: it must work on a host that has lost its network, and cost no boot time.
_CONSOLE = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --skip-login --login-program /bin/bash --keep-baud 115200,57600,38400,9600 - $TERM
"""
# Loaded for the emulated CPU's features, used by nothing here, a second or so each under emulation.
_MODULES = """\
blacklist aesni_intel
blacklist crc32_pclmul
blacklist crct10dif_pclmul
blacklist ghash_clmulni_intel
blacklist serio_raw
blacklist sha1_ssse3
blacklist sha256_ssse3
blacklist sha512_ssse3
"""
# Drivers of the one machine that the image boots on, instead of every driver there is: less to load and unpack.
_INITRAMFS_MODULES = "virtio_pci\nvirtio_blk\next4\n"
_INITRAMFS = "MODULES=list\nCOMPRESS=zstd\n"


def overlay(keys: ssh.Keys) -> Mapping[str, tuple[int, str]]:
    """Return the files that are laid over the root file system: path to (mode, content)."""
    return {
        "etc/default/grub.d/10_lab.cfg": (0o644, _GRUB),
        "etc/initramfs-tools/conf.d/lab.conf": (0o644, _INITRAMFS),
        "etc/initramfs-tools/modules": (0o644, _INITRAMFS_MODULES),
        "etc/modprobe.d/lab.conf": (0o644, _MODULES),
        "etc/systemd/network/20-lab.network": (0o644, _NETWORK),
        "etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": (0o644, _CONSOLE),
        "etc/ssh/ssh_host_ed25519_key": (0o600, keys.host.read_text(encoding="ascii")),
        "etc/ssh/ssh_host_ed25519_key.pub": (0o644, keys.host_public + "\n"),
        "root/.ssh/authorized_keys": (0o600, keys.client_public + "\n"),
    }


def recipe_hash(base: Path, files: Mapping[str, tuple[int, str]], script: str) -> str:
    """Return 16 hex digits that change with everything that goes into the image."""
    recipe = [RECIPE_VERSION, DISK_GIB, base.name, {path: list(value) for path, value in files.items()}, script]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def build(release: str) -> Path:
    """Return the qcow2 image of a release, made if it is not in the cache (about a minute)."""
    base = rootfs.build(release)
    files = overlay(ssh.keys())
    digest = recipe_hash(base, files, _SCRIPT.read_text(encoding="utf-8"))
    path = folder("images") / f"{release}-{digest}.qcow2"
    if path.exists():
        path.touch()
        return path
    rootfs.require_programs(["unshare", "setpriv", "sfdisk", "losetup", "mkfs.ext4", "mkfs.vfat", "qemu-img", "tar"])
    with lock(f"image-{release}"):
        if path.exists():
            return path
        for stale in path.parent.glob(f".work-{release}-*"):
            _detach(stale)
            shutil.rmtree(stale, ignore_errors=True)
        say(f"making the disk image of Debian {release} (about a minute)")
        begin = time.monotonic()
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".work-{release}-"))
        try:
            result = _make(release, base, files, work)
            os.replace(work / "vmlinuz", kernel(path))
            os.replace(result, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        prune(path.parent.glob(f"{release}-*"), keep=path)
        say(f"disk image ready after {time.monotonic() - begin:.0f} s: {path.stat().st_size >> 20} MiB")
    return path


def kernel(path: Path) -> Path:
    """Return the copy of an image's kernel that lies beside it, for probes that boot without the disk."""
    return path.with_suffix(".vmlinuz")


def sweep() -> None:
    """Remove what builds that were killed left: work folders, and loop devices that still hold a deleted disk."""
    images = folder("images")
    for stale in images.glob(".work-*"):
        _, release, *rest = stale.name.split("-")
        # A booted state's work folder is lab.vm's, under that state's own lock.
        with lock("-".join([release, *rest]) if rest[:1] == ["booted"] else f"image-{release}"):
            _detach(stale)
            shutil.rmtree(stale, ignore_errors=True)


def _detach(work: Path) -> None:
    argv = ["losetup", "--noheadings", "--raw", "--list", "--output", "NAME,BACK-FILE"]
    listed = subprocess.run(argv, check=False, capture_output=True, text=True, env=_environment()).stdout
    for line in listed.splitlines():
        name, _, file = line.partition(" ")
        if file.startswith(str(work)):
            subprocess.run(["losetup", "--detach", name], check=False, env=_environment())


def _make(release: str, base: Path, files: Mapping[str, tuple[int, str]], work: Path) -> Path:
    tree = work / "overlay"
    for name, (mode, content) in files.items():
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        file.chmod(mode)
    (tree / "root").chmod(0o700)
    (tree / "root/.ssh").chmod(0o700)
    raw = work / "disk.raw"
    log = folder("images") / f"{release}.log"
    argv = ["setpriv", "--pdeathsig", "KILL"]
    argv += ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv += ["sh", str(_SCRIPT), str(base), str(raw), str(DISK_GIB), str(tree)]
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False, env=_environment()
        )
    if done.returncode != 0:
        raise LabError(
            f"making the image of {release} failed with {done.returncode}; {log} ends with:\n{ssh.tail(log)}"
        )
    result = work / "disk.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(result)]
    subprocess.run(convert, check=True, stdin=subprocess.DEVNULL)
    return result


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}
