# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pinned source, and our patches to it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

from tests.engine.harness import cache

PATCHES = Path(__file__).resolve().parents[2] / "patches" / "llama-cpp-python-0.3.36"
SDIST = "llama_cpp_python-0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# What the patches touch and the tests build, below llama.cpp.
PARTS = (
    "src/",
    "include/",
    "tools/server/",
    "ggml/CMakeLists.txt",
    "ggml/cmake/",
    "ggml/include/",
    "ggml/src/ggml-cpu/",
    "tests/test-",
)


def wanted(name: str) -> bool:
    """Tell whether the tests need a file of llama.cpp's tree."""
    return name.startswith(PARTS) or (name.startswith("ggml/src/") and name.count("/") == 2)


def unpack(root: Path) -> Path:
    """Unpack what the tests need of llama.cpp, and return the tree."""
    archive = Path(os.environ.get("CPULLM_ENGINE_SOURCE") or cache() / "sdist" / f"{SDIST}.tar.gz")
    assert archive.is_file(), f"no {archive}: fetch the pinned sdist, or set CPULLM_ENGINE_SOURCE"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found == SDIST_SHA256, f"{archive}: sha256 {found}, expected {SDIST_SHA256}"
    top = f"{SDIST}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(top)
            if not member.isfile() or name == member.name or not wanted(name):
                continue
            content = tar.extractfile(member)
            assert content is not None
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content.read())
    return root


def apply_patches(root: Path) -> Path:
    """Apply our patches as the build does, and not one line fuzzy; return the tree."""
    series = sorted(PATCHES.glob("*.patch"))
    assert series, f"no patch in {PATCHES}"
    for patch in series:
        command = ["patch", "-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "-i", str(patch)]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{patch.name}: {result.stdout}{result.stderr}"
        assert "offset" not in result.stdout, f"{patch.name}: {result.stdout}"
    return root
