# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds of the programs that check ggml's CPU kernels."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.cpullm.epyc.plugins.module_utils import _build

from tests.engine.harness import cache

HERE = Path(__file__).resolve().parent
CHECKS = ("attention_check", "matmul_check")
SOAK = os.environ.get("CPULLM_SOAK") == "1"
SEED = int(os.environ.get("CPULLM_KERNEL_SEED") or 1)
SANITIZERS = {
    "address": "-fsanitize=address -fno-omit-frame-pointer",
    # ggml itself reads scales at odd addresses.
    "undefined": "-fsanitize=undefined -fno-sanitize=alignment -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}


def machine_isa() -> str:
    """Return the best instruction set that this machine can run."""
    return _build.choose_isa(None, _build.parse_cpu_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8")))


BEST = machine_isa()
# A build for the best instruction set of this machine, and one that knows AVX2 alone.
ISAS = sorted({BEST, "avx2"})


# Cases of the checks that the running test went through.
counted: list[int] = []


@dataclass(frozen=True)
class Checks:
    """A build of the checks."""

    folder: Path

    def run(self, name: str, *arguments: object, **environment: str) -> str:
        """Return what a check printed; AssertionError with it where the check failed."""
        done = subprocess.run(
            [str(self.folder / name), *map(str, arguments)],
            # Threads that wait for each other must not do so at the cost of others on a busy machine.
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (
            f"{name} {arguments}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done.stdout


def build(tree: Path, folder: Path, isa: str, sanitizer: str = "", targets: Iterable[str] = CHECKS) -> Checks:
    """Build the checks with the kernels of a tree, with the options that the role gives to the engine."""
    options = {option.name: option.value for option in _build.cmake_options(isa, {})}
    options = {name: value for name, value in options.items() if name.startswith(("GGML_", "BUILD_", "CMAKE_"))}
    # Objects of equal sources are found again wherever pytest put them.
    flags = f"-ffile-prefix-map={tree}=llama.cpp -ffile-prefix-map={folder}=build {SANITIZERS.get(sanitizer, '')}"
    options |= {"CMAKE_C_FLAGS": flags, "CMAKE_CXX_FLAGS": flags, "LLAMA_TREE": str(tree)}
    options |= {"CMAKE_C_COMPILER_LAUNCHER": "ccache", "CMAKE_CXX_COMPILER_LAUNCHER": "ccache"}
    if sanitizer:
        # The sanitizers cannot see through OpenMP's own waiting; ggml's threads are plain ones.
        options |= {"GGML_OPENMP": "OFF", "CMAKE_BUILD_TYPE": "RelWithDebInfo"}
    environment = {
        **os.environ,
        **{"CCACHE_DIR": str(cache() / "ccache"), "CCACHE_BASEDIR": str(tree.parent), "CCACHE_NOHASHDIR": "1"},
        **{"CCACHE_COMPILERCHECK": "content", "CC": "gcc", "CXX": "g++"},
    }

    def run(command: Sequence[str]) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"

    given = [f"-D{name}={value}" for name, value in sorted(options.items())]
    run(["cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja", *given])
    run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", *targets])
    return Checks(folder)


@functools.cache
def built(trees: Path, tree: str, isa: str, sanitizer: str = "", targets: tuple[str, ...] = CHECKS) -> Checks:
    """Return programs of the tree `stock` or `patched`, built once in a session."""
    folder = trees / tree / f"build-{isa}{sanitizer}"
    return build(trees / tree / "source", folder, isa, sanitizer, targets)


def cases(output: str) -> int:
    """Return how many cases a check went through without a failure, and count them."""
    found = re.search(r"^cases=(\d+) failures=0$", output, re.M)
    assert found, output
    counted.append(int(found[1]))
    return int(found[1])
