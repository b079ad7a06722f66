# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build llama.cpp from one pinned archive into one artifact, on the build host.

Copied to the build host beside module_utils/_engine.py. Everything happens in the work directory:
``source/`` (unpacked and patched), ``build/`` (cmake and ninja), ``ID.tar.gz`` with its ``.sha256``.
A run that was killed goes on where it was; the artifact appears complete or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import _engine

NINJA_LINE = re.compile(r"\[(\d+)/(\d+)\] ?(.*)")
# Settings of the caller's environment that would change the result without being part of the id.
FOREIGN_VARIABLE = re.compile(r"(C|CXX|CPP|LD)FLAGS|(CMAKE|CCACHE|GGML|LLAMA)_.*|CC|CXX|SOURCE_DATE_EPOCH")
# What one compiler process may take at its worst on this tree, in bytes.
JOB_MEMORY = 1536 << 20
LOCK_POLL_S = 2.0
# Builds of other ids that nobody finished or fetched for so long are swept away.
FORGOTTEN_S = 7 * 86400


class BuildError(Exception):
    """What went wrong, in words for the operator."""


class Status:
    """The status file of long work: replaced as a whole, at most five times a second."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._written = 0.0
        self._phase = ""

    def show(self, phase: str, done: int, total: int | None, message: str, unit: str = "steps") -> None:
        """Write where the work is; a new phase and the last step are never left out."""
        now = time.time()
        last = total is not None and done >= total
        if self._path is None or (phase == self._phase and not last and now - self._written < 0.2):
            return
        self._phase, self._written = phase, now
        status = {"phase": phase, "done": done, "total": total, "unit": unit, "message": message, "updated": now}
        _engine.write_atomically(self._path, json.dumps(status).encode())


@dataclass(frozen=True)
class Workshop:
    """One build: its recipe, its directory, and what all steps use."""

    recipe: dict[str, Any]
    work: Path
    log: TextIO
    environment: dict[str, str]
    status: Status

    @property
    def tree(self) -> Path:
        """The unpacked and patched source."""
        return self.work / "source"

    @property
    def build(self) -> Path:
        """Where cmake and ninja work."""
        return self.work / "build"

    def run(self, argv: list[str], cwd: Path) -> str:
        """Run a command to its end and return its output, also logged; BuildError where it fails."""
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        self.log.write(f"$ {' '.join(argv)}\n{done.stdout}\n")
        self.log.flush()
        if done.returncode:
            raise BuildError(f"{argv[0]} failed with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def ask(self, *argv: str) -> str:
        """Return what a command prints, whether or not it succeeds."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout


def choose_jobs(wish: int | None, cpus: int, memory_available: int | None) -> int:
    """Return the number of compilers to run at once: the wished one, or what CPUs and memory carry."""
    if wish:
        return wish
    by_memory = cpus if memory_available is None else memory_available // JOB_MEMORY
    return max(1, min(cpus, by_memory))


def memory_available() -> int | None:
    """Return MemAvailable in bytes, or None where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


@contextlib.contextmanager
def only_one(path: Path, status: Status) -> Iterator[int]:
    """Wait until no other build runs on this host; the lock lives as long as a process holds the descriptor."""
    with path.open("a+", encoding="ascii") as stream:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                stream.seek(0)
                waited = int(time.monotonic() - started)
                status.show("wait", waited, None, f"process {stream.read().strip()} builds here", "s")
                time.sleep(LOCK_POLL_S)
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield stream.fileno()


def prepare_tree(shop: Workshop, source: Path) -> None:
    """Unpack and patch the source in a temporary directory, and rename it when whole."""
    if shop.tree.is_dir():
        return
    found = _engine.sha256_file(str(source))
    expected = shop.recipe["archive_sha256"]
    if found != expected:
        raise BuildError(f"{source}: found sha256 {found}, expected {expected}; nothing was unpacked")
    temporary = shop.work / "source.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    subdirectory = shop.recipe["source"]["subdirectory"]
    _engine.unpack(str(source), str(temporary), below=subdirectory, strip_top=True)
    if not (temporary / "ggml" / "CMakeLists.txt").is_file():
        raise BuildError(
            f"{source}: found no ggml/CMakeLists.txt below {subdirectory or 'its top directory'};"
            " expected the tree of llama.cpp. Set llamacpp_build_source.subdirectory."
        )
    # A vendored submodule may leave a file .git that names a directory of the packager's machine.
    if (temporary / ".git").is_file():
        (temporary / ".git").unlink()
    for patch in shop.recipe["patches"]:
        apply_patch(shop, patch, temporary)
    temporary.rename(shop.tree)


def write_checked(path: Path, kind: str, entry: dict[str, str]) -> None:
    """Write a file that the recipe carries; BuildError where it is not the one that the id was made of."""
    path.write_bytes(entry["text"].encode("latin-1"))
    found = _engine.sha256_file(str(path))
    if found != entry["sha256"]:
        raise BuildError(f"{kind} {entry['name']}: found sha256 {found}, expected {entry['sha256']}")


def apply_patch(shop: Workshop, patch: dict[str, str], tree: Path) -> None:
    """Apply one patch without fuzz; BuildError names the patch and every file that it does not fit."""
    path = shop.work / "patch"
    write_checked(path, "patch", patch)
    argv = ["patch", "-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch"]
    try:
        shop.run([*argv, "--reject-file=-", f"--input={path}"], tree)
    except BuildError as error:
        raise BuildError(explain_patch(patch["name"], str(error))) from error


def explain_patch(name: str, output: str) -> str:
    """Return one sentence, and the output, of patch(1) for a patch that did not apply."""
    files: list[str] = []
    current = "?"
    named = re.compile(r"(?:patching|checking) file '?(.+?)'?(?: \(.*\))?$|\|(?:\+\+\+|---) (?:[ab]/)?(\S+)")
    for line in output.splitlines():
        if match := named.match(line):
            current = match[1] or match[2]
        if re.search(r"FAILED|No file to patch|previously applied|malformed", line) and current not in files:
            files.append(current)
    return (
        f"patch {name} does not apply to {', '.join(files) or 'the tree'}; nothing was installed."
        " Take the patch set that was made for this source, or set llamacpp_build_patch_set to null"
        f" to build without one.\n{output}"
    )


def configure(shop: Workshop, ccache: bool) -> None:
    """Run cmake with every option spelled out."""
    shop.build.mkdir(exist_ok=True)
    prefix_map = f"-ffile-prefix-map={shop.tree}=llama.cpp -ffile-prefix-map={shop.build}=build"
    options = {option["name"]: option["value"] for option in shop.recipe["options"]}
    for language in ("C", "CXX"):
        name = f"CMAKE_{language}_FLAGS"
        options[name] = f"{options.get(name, '')} {prefix_map}".strip()
        if ccache:
            options[f"CMAKE_{language}_COMPILER_LAUNCHER"] = "ccache"
    options["LLAMA_BUILD_COMMIT"] = shop.recipe["id"]
    options["LLAMA_BUILD_NUMBER"] = str(shop.recipe["source"]["build_number"])
    # One package less on every target where the compiler brings the static form.
    openmp = shop.ask("g++", "-print-file-name=libgomp.a").strip()
    if openmp.startswith("/"):
        options["OpenMP_gomp_LIBRARY"] = openmp
    argv = ["cmake", "-S", str(shop.tree), "-B", str(shop.build), "-G", "Ninja"]
    shop.run(argv + [f"-D{name}={options[name]}" for name in sorted(options)], shop.work)


def compile_targets(shop: Workshop, jobs: int, lock: int) -> None:
    """Run ninja and show each finished step; BuildError carries the first failed command.

    Ninja inherits the lock: where this process is killed, the next run waits until ninja has gone too.
    """
    argv = ["cmake", "--build", str(shop.build), "--parallel", str(jobs), "--target", *shop.recipe["targets"]]
    shop.log.write(f"$ {' '.join(argv)}\n")
    failed: list[str] = []
    with subprocess.Popen(
        argv,
        env={**shop.environment, "NINJA_STATUS": "[%f/%t] "},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock,),
    ) as ninja:
        try:
            for line in ninja.stdout or ():
                shop.log.write(line)
                if match := NINJA_LINE.match(line):
                    message = match[3].strip().rsplit("/", 1)[-1]
                    shop.status.show("build", int(match[1]), int(match[2]), message)
                if line.startswith("FAILED:") or failed:
                    failed.append(line)
        except BaseException:
            ninja.terminate()
            raise
    shop.log.flush()
    if ninja.returncode:
        raise BuildError(f"the compiler failed; {shop.log.name} has everything:\n{''.join(failed[:60])[-6000:]}")


def compile_programs(shop: Workshop) -> None:
    """Compile our own programs, one C file each, to where ninja leaves the engine's."""
    (shop.build / "bin").mkdir(parents=True, exist_ok=True)
    for program in shop.recipe["programs"]:
        path = shop.work / f"{program['name']}.c"
        write_checked(path, "program", program)
        argv = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-pthread", f"-DISA_{shop.recipe['isa'].upper()}"]
        shop.run([*argv, "-o", f"build/bin/{program['name']}", path.name], shop.work)


def runtime_packages(shop: Workshop, programs: list[Path]) -> list[str]:
    """Return the packages that own the shared libraries of the programs; empty where dpkg does not know."""
    libraries = set()
    for program in programs:
        libraries |= set(re.findall(r"=> (/\S+)", shop.ask("ldd", str(program))))
    packages = set()
    for library in sorted(libraries):
        # A package may have registered its file below /usr/lib or, before the merge of /usr, below /lib.
        real = str(Path(library).resolve())
        for candidate in dict.fromkeys([library, real, real.replace("/usr/lib", "/lib", 1)]):
            if match := re.match(r"([a-z0-9.+-]+)(:\w+)?: ", shop.ask("dpkg", "-S", candidate)):
                packages.add(match[1])
                break
    return sorted(packages)


def stage(shop: Workshop) -> Path:
    """Return a directory with the programs, the chat templates, the licences and BUILD.json."""
    staging = shop.work / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    programs = []
    for target in [*shop.recipe["targets"], *(program["name"] for program in shop.recipe["programs"])]:
        program = staging / "bin" / target
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shop.build / "bin" / target, program)
        program.chmod(0o755)
        programs.append(program)
    copies = [(path, "share/templates") for path in sorted((shop.tree / "models" / "templates").glob("*.jinja"))]
    copies += [(path, "share/licenses") for path in sorted((shop.tree / "licenses").glob("*"))]
    copies += [(path, "share/licenses") for path in [shop.tree / "LICENSE"]]
    for path, place in copies:
        if path.is_file():
            (staging / place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / place / path.name)
    tools = [
        {"name": name, "version": shop.ask(name, "--version").split("\n")[0]} for name in ("cmake", "g++", "ninja")
    ]
    record = {name: shop.recipe[name] for name in ("id", "isa", "release", "version", "source", "archive_sha256")}
    record.update(
        schema=1,
        patches=[{"name": patch["name"], "sha256": patch["sha256"]} for patch in shop.recipe["patches"]],
        programs=[{"name": program["name"], "sha256": program["sha256"]} for program in shop.recipe["programs"]],
        options=shop.recipe["options"],
        tools=tools,
        runtime_packages=runtime_packages(shop, programs),
        files=_engine.list_files(str(staging)),
    )
    _engine.write_atomically(str(staging / _engine.RECORD), _engine.to_json(record))
    return staging


def pack(staging: Path, identifier: str, artifact: Path) -> str:
    """Write the artifact and its .sha256 and return the hash: equal trees give equal bytes."""
    descriptor, temporary = tempfile.mkstemp(prefix=".artifact-", dir=artifact.parent)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0)
            with packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
                tar.add(staging, identifier, filter=_neutral)
            raw.flush()
            os.fchmod(raw.fileno(), 0o644)
            os.fsync(raw.fileno())
        digest = _engine.sha256_file(temporary)
        Path(temporary).replace(artifact)
    except BaseException:
        Path(temporary).unlink()
        raise
    _engine.write_atomically(f"{artifact}.sha256", f"{digest}  {artifact.name}\n".encode())
    return digest


def _neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without owner, time and accidental mode bits (tarfile adds names in sorted order)."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def finished(artifact: Path) -> str | None:
    """Return the hash of an artifact that is already whole, or None."""
    try:
        digest = Path(f"{artifact}.sha256").read_text(encoding="ascii").split()[0]
        return digest if _engine.sha256_file(str(artifact)) == digest else None
    except (OSError, IndexError):
        return None


def sweep(work: Path, before: float) -> None:
    """Remove the directories of other builds that were last touched before a time."""
    for other in work.parent.iterdir():
        ours = _engine.BUILD_NAME.fullmatch(other.name) is not None and (other / "recipe.json").is_file()
        if other != work and ours and other.stat().st_mtime < before:
            shutil.rmtree(other, ignore_errors=True)


def check_release(wanted: str) -> None:
    """Raise BuildError where this host runs another release than the recipe (see _build.parse_os_release)."""
    fields = {}
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        name, _separator, value = line.strip().partition("=")
        fields[name] = value.strip("\"'")
    found = (fields.get("ID", "") + (fields.get("VERSION_ID") or fields.get("VERSION_CODENAME", ""))).lower()
    if found != wanted:
        raise BuildError(
            f"llamacpp_build_host: found {found}; expected {wanted}, the release of the hosts that get this build"
            " (its C library must not be newer than theirs). Set llamacpp_build_host to null or to such a host."
        )


def clean_environment(work: Path, ccache: str | None) -> dict[str, str]:
    """Return the environment of all tools: English messages, no foreign flags, git confined to the tree."""
    environment = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLE.fullmatch(name)}
    environment.update(LC_ALL="C.UTF-8", GIT_CEILING_DIRECTORIES=str(work), CC="gcc", CXX="g++")
    if ccache:
        # With the base directory, builds with other flags or patches share what is equal.
        environment.update(
            CCACHE_DIR=ccache, CCACHE_BASEDIR=str(work), CCACHE_COMPILERCHECK="content", CCACHE_NOHASHDIR="1"
        )
    return environment


def build_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the artifact, or find it made; return its path, hash and whether anything was done."""
    recipe = json.loads(arguments.recipe.read_text(encoding="utf-8"))
    work = arguments.work.resolve()
    status = Status(arguments.status)
    check_release(recipe["release"])
    artifact = work / f"{recipe['id']}.tar.gz"
    with only_one(work.parent / "lock", status) as lock:
        digest = finished(artifact)
        if digest is not None:
            return {"artifact": str(artifact), "sha256": digest, "changed": False}
        with (work / "build.log").open("a", encoding="utf-8") as log:
            shop = Workshop(recipe, work, log, clean_environment(work, arguments.ccache), status)
            status.show("unpack", 0, None, f"{recipe['id']}: source and {len(recipe['patches'])} patches")
            prepare_tree(shop, arguments.source)
            status.show("configure", 0, None, "cmake")
            configure(shop, bool(arguments.ccache))
            jobs = choose_jobs(arguments.jobs, len(os.sched_getaffinity(0)), memory_available())
            compile_targets(shop, jobs, lock)
            compile_programs(shop)
            status.show("pack", 0, None, "artifact")
            staging = stage(shop)
            digest = pack(staging, recipe["id"], artifact)
        if not arguments.keep_tree:
            for directory in (shop.tree, shop.build, staging):
                shutil.rmtree(directory, ignore_errors=True)
            if arguments.source.resolve().parent == work:
                arguments.source.unlink()
        sweep(work, time.time() - FORGOTTEN_S)
        status.show("pack", 1, 1, "artifact")
    return {"artifact": str(artifact), "sha256": digest, "changed": True}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="JSON: what to build, made on the controller")
    parser.add_argument("--source", type=Path, required=True, help="the pinned archive")
    parser.add_argument("--work", type=Path, required=True, help="a directory for this build alone")
    parser.add_argument("--status", help="file for the state of the work")
    parser.add_argument("--jobs", type=int, help="compilers at once; default: what CPUs and memory carry")
    parser.add_argument("--ccache", help="directory of a compiler cache")
    parser.add_argument("--keep-tree", action="store_true", help="leave source and objects for a look")
    return parser.parse_args(argv)


def main() -> int:
    """Print one line of JSON: the artifact and its hash; errors go to stderr."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    os.umask(0o022)
    # A host that serves meanwhile keeps its cores.
    os.nice(10)
    try:
        result = build_engine(parse_arguments(sys.argv[1:]))
    except (BuildError, ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
