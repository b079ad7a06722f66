# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What fuzzing starts from: for each target inputs that are right, from the tests' builders and captured machines.

Without them a fuzzer spends its time on the first check of a format.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ansible_collections.cpullm.epyc.plugins.module_utils import _grub, _grubenv, _manifest

from tests.support import gguf_file
from tests.unit import smbios_builder, tree_builder
from tests.unit.test_gguf import TINY
from tests.unit.test_plan import machine, manifest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
# What targets.tree reads of an input.
MOST_FILES = 64
CMDLINE = b"BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro quiet default_hugepagesz=1G hugepagesz=1G hugepages=0:3,1:3\n"


def tree(root: Path, wanted: Callable[[str], bool]) -> bytes:
    """Return files below a root as one input of targets.tree."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    paths = [path for path in paths if wanted(str(path.relative_to(root)))][:MOST_FILES]
    return b"".join(b"== /" + str(path.relative_to(root)).encode() + b"\n" + path.read_bytes() for path in paths)


def built(machine_: tree_builder.Machine, wanted: Callable[[str], bool]) -> bytes:
    """Return the tree of a machine as one input."""
    with tempfile.TemporaryDirectory() as folder:
        tree_builder.build(machine_, Path(folder))
        return tree(Path(folder), wanted)


def gguf() -> Iterable[bytes]:
    """The headers of a whole model and of its shards."""
    for count in (1, 3):
        for part in gguf_file.split(TINY.pairs(), TINY.tensors(), count):
            yield gguf_file.header_bytes(*part)[0]


def lock() -> Iterable[bytes]:
    """A lock of one shard, and one of sixteen."""
    for made in (manifest(TINY, 1, "recite"), manifest()):
        yield _manifest.lock_text(made).encode()


def plan() -> Iterable[bytes]:
    """Machines with one socket and with two, and wishes."""
    data = _manifest.manifest_to_data(manifest(TINY, 1, "recite"))
    for numa, wishes in ((machine([768]), {}), (machine([5, 5], cores=1, smt=1), {"slots": 2, "weights": "hugetlbfs"})):
        yield json.dumps({"numa": numa, "lock": data, "overrides": wishes}).encode()


def hub() -> Iterable[bytes]:
    """Commit, tree and the first bytes of a file."""
    head, size = gguf_file.header_bytes(TINY.pairs()[:8], TINY.tensors()[:3])
    commit = json.dumps({"sha": "ab" * 20}).encode()
    rows = [{"type": "file", "path": "m.gguf", "size": size, "lfs": {"oid": "0" * 64, "size": size}}]
    bodies = [(b"200 OK", commit), (b"200 OK", json.dumps(rows).encode()), (b"206 Partial Content", head)]
    answers = [b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n" % len(body) for status, body in bodies]
    answers[2] += b"Content-Range: bytes 0-%d/%d\r\n" % (len(head) - 1, size)
    yield b"\n====\n".join(answer + b"\r\n" + body for answer, (_status, body) in zip(answers, bodies))


def smbios() -> Iterable[bytes]:
    """Boards under entry points of both kinds, whose length of 0 stands for that of the table."""
    boards = (smbios_builder.single_socket_12, smbios_builder.two_socket_24)
    for table in (*(board() for board in boards), smbios_builder.unequal_24(), smbios_builder.unknown_4()):
        for kind, major in ((65, 3), (64, 2)):
            yield bytes([kind, major, 7, 0, 0, 0]) + smbios_builder.count(table).to_bytes(2, "little") + table


def numa() -> Iterable[bytes]:
    """Small machines as trees, and files of captured ones."""
    for shape in (
        tree_builder.Machine(cores=1, threads=2, cores_per_l3=1),
        tree_builder.Machine(sockets=2, cores=1, threads=1, cores_per_l3=1, gib_per_node=4),
    ):
        yield built(shape, lambda _path: True)
    for captured in sorted(FIXTURES.glob("*/proc")):
        for name in ("zoneinfo", "iomem", "cpuinfo"):
            yield (captured / name).read_bytes()[:16384]
    yield b"0-3,8,10-11\n"


def hugepages() -> Iterable[bytes]:
    """Captured machines with pools, and mounts."""
    for captured in sorted(FIXTURES.iterdir()):
        if captured.is_dir():
            yield tree(captured, lambda path: "hugepages" in path or path.startswith("proc/"))[:8192]
    yield b"hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=1024M 0 0\n"
    yield b"MemTotal: 24646464 kB\nHardwareCorrupted: 0 kB\nHugepagesize: 2048 kB\n"


def condition() -> Iterable[bytes]:
    """Governors, errors and a sensor; a board's controller; a measured rate."""
    edac, cpufreq = "sys/devices/system/edac/mc/mc0", "sys/devices/system/cpu/cpufreq/policy0"
    files = {
        f"{edac}/ce_count": "7",
        f"{edac}/ue_count": "0",
        f"{edac}/dimm0/dimm_ce_count": "7",
        f"{edac}/dimm0/dimm_label": "P0_DIMMA0",
        f"{cpufreq}/scaling_governor": "schedutil",
        f"{cpufreq}/affected_cpus": "0 16",
        "sys/class/hwmon/hwmon0/name": "spd5118",
        "sys/class/hwmon/hwmon0/temp1_input": "91250",
        "sys/class/hwmon/hwmon0/temp1_crit": "85000",
    }
    yield "".join(f"== /{path}\n{text}\n" for path, text in files.items()).encode()
    yield b"P1-DIMMA1 Temp   | 40h | ok  | 32.64 | 48 degrees C\nP1-DIMMB1 Temp   | 41h | ns  | 32.65 | No Reading\n"
    yield json.dumps({"gbs": 2.5, "gbs_min": 2.0, "gbs_max": 3.0, "threads": 2, "bytes": 1 << 30}).encode()


def cmdline() -> Iterable[bytes]:
    """A command line with pages on two nodes, and the kernel that knows it."""
    yield CMDLINE + b"6.1.0-40-amd64"
    yield b'a="b c" hugepages=7 hugepagesz=2M\n5.10.0-30-amd64'


def grub() -> Iterable[bytes]:
    """A host with GRUB's files, and each of them."""
    drop_in = _grub.render_drop_in(["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"])
    entry = "menuentry 'Debian' --class debian {\n\tlinux\t/boot/vmlinuz root=UUID=1 ro quiet hugepages=3\n}\n"
    config = f"### BEGIN /etc/grub.d/10_linux ###\n{entry}### END /etc/grub.d/10_linux ###\n"
    defaults = 'GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT="quiet hugepages=4"\n'
    files = {
        "etc/default/grub": defaults,
        _grub.DROP_IN.lstrip("/"): drop_in,
        "boot/grub/grub.cfg": config,
        "usr/sbin/grub-mkconfig": 'for x in "${sysconfdir}"/default/grub.d/*.cfg ; do\n. "$x"\ndone\n',
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu pdpe1gb avx2\n",
        "proc/meminfo": "MemTotal:        8123000 kB\nHugepagesize:    2048 kB\n",
        "proc/cmdline": CMDLINE.decode(),
        "proc/iomem": "00100000-bfffffff : System RAM\n100000000-23fffffff : System RAM\n",
        "proc/self/mounts": "",
        "proc/sys/kernel/random/boot_id": "11111111-2222-3333-4444-555555555555\n",
        "proc/sys/kernel/osrelease": "6.1.0-40-amd64\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:  8123000 kB\n",
    }
    yield "".join(f"== /{path}\n{text}" for path, text in files.items()).encode()
    for text in (defaults, drop_in, config):
        yield text.encode()


def grubenv() -> Iterable[bytes]:
    """A block with an entry that is to boot once, and hosts with it on a partition and on a mapping."""
    block = (_grubenv.SIGNATURE + "# WARNING: by grub-editenv\nsaved_entry=a\\\\b\nnext_entry=cpullm\n").encode()
    yield block.ljust(_grubenv.SIZE, b"#")
    for device, files in (("8:2", {"partition": "2\n"}), ("253:0", {"dm/uuid": "LVM-x\n", "dm/name": "vg-root\n"})):
        mounts = f"25 1 {device} / / rw,relatime shared:1 - ext4 /dev/x rw\n30 25 0:5 / /dev rw - devtmpfs udev rw\n"
        yield mounts.encode()
        parts = {f"sys/dev/block/{device}/{name}": text for name, text in files.items()}
        parts = {"proc/self/mountinfo": mounts, **parts, "boot/grub/grubenv": block.decode().ljust(1024, "#")}
        yield "".join(f"== /{path}\n{text}" for path, text in parts.items()).encode()


def settings() -> Iterable[bytes]:
    """Settings with a file that undoes one of them, and an os-release."""
    yield (
        b"== /proc/sys/vm/swappiness\n60\n== /sys/kernel/mm/transparent_hugepage/enabled\nalways [madvise] never\n"
        b"== /etc/sysctl.d/99-x.conf\n# ours\nvm.swappiness = 60\n"
        b'== /var/lib/cpullm/record.json\n{"/proc/sys/vm/swappiness": "60"}\n'
    )
    yield b'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n'


def serving() -> Iterable[bytes]:
    """A completion, and the kernel's words on a process."""
    message = {"role": "assistant", "content": "it becomes necessary", "reasoning_content": None}
    timings = {"predicted_per_second": 21.5}
    yield json.dumps({"choices": [{"index": 0, "message": message}], "timings": timings}).encode()
    yield (
        b"VmRSS:\t   32000 kB\nHugetlbPages:\t 3145728 kB\n"
        b"7f0000000000 bind:0 anon=3 dirty=3 N0=3 kernelpagesize_kB=1048576\n"
    )


def progress() -> Iterable[bytes]:
    """A status, and a record of one."""
    status = {"phase": "download", "done": 5, "total": 10, "unit": "bytes", "message": "a.gguf", "updated": 1.5}
    yield json.dumps(status).encode()
    yield json.dumps({"host": "h", "title": "t", "status": status, "started": 1.0, "shown": 2.0}).encode()


def engine() -> Iterable[bytes]:
    """An archive of a build."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (
            ("a/BUILD.json", b'{"schema": 1, "id": "id", "files": []}'),
            ("a/bin/llama-server", b"x" * 64),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    yield out.getvalue()


SEEDS: dict[str, Callable[[], Iterable[bytes]]] = {
    seeds.__name__: seeds
    for seeds in (
        gguf,
        lock,
        plan,
        hub,
        smbios,
        numa,
        hugepages,
        condition,
        cmdline,
        grub,
        grubenv,
        settings,
        serving,
        progress,
        engine,
    )
}


def main() -> None:
    """Write the seeds of each target into a folder of its name, below the folder that is given."""
    for name, seeds in SEEDS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds()):
            (folder / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
