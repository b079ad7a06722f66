# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A built engine, its patched source, a small model and the machine's own 1 GiB pages.

Nothing here is skipped: an engine, a model or a page that is missing is a failed test. The environment says where
things are when they are not where the collection puts them:

- CPULLM_ENGINE_BIN: the engine's bin directory, default /opt/llama.cpp/current/bin;
- CPULLM_ENGINE_SOURCE: the pinned sdist, default in the sdist folder of the cache;
- CPULLM_ENGINE_MODEL: the first shard of a model, default tests/models/recite as two files.

With CPULLM_SOAK=1 (`make soak`) tests that passed are not run again until patches or checks change, or all have passed;
then what they measured is kept in bench/results/kernels-soak.json.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import record
from tests.engine import kernels
from tests.engine.harness import Model, Pool, Servers, cache, open_to_all
from tests.engine.progress import Progress, state_of
from tests.engine.source import PATCHES, apply_patches, unpack
from tools.model.merge import merge

HERE = Path(__file__).resolve().parent
CLONE = HERE.parents[1]
SOAKS = cache() / "soak"
progress: Progress | None = None
if kernels.SOAK:
    parts = [*PATCHES.glob("*.patch"), *(file for file in HERE.iterdir() if file.is_file())]
    progress = Progress(SOAKS / "kernels.json", state_of(parts, str(kernels.SEED), kernels.BEST))


def pytest_report_header() -> str:
    """Tell how to draw the same random cases again."""
    return f"kernel checks: seed {kernels.SEED}{', the long form' if kernels.SOAK else ''}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of this folder, since none runs without an engine or its source; let a soak go on."""
    for item in items:
        if Path(item.path).is_relative_to(HERE):
            item.add_marker(pytest.mark.engine)
    if progress:
        done = [item for item in items if item.nodeid in progress.passed]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in progress.passed]


def pytest_runtest_setup() -> None:
    """Count each test's cases by themselves."""
    kernels.counted.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what passed, and what it measured."""
    if progress and report.when == "call" and report.passed:
        progress.add(report.nodeid, {**dict(report.user_properties), "cases": sum(kernels.counted)})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep a soak's figures, once all of it has passed; a soak that has nothing left to do has passed, too."""
    over = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if progress and over and os.environ.get("CPULLM_SOAK_RESULTS") == "1":
        record.keep("kernels-soak", ["make", "soak"], {"seed": kernels.SEED, **progress.figures()})
        progress.end()
        shutil.rmtree(SOAKS / "kernels", ignore_errors=True)
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture
def pool() -> Iterator[Pool]:
    """The machine's 1 GiB pages; what a test reserved is given back after it."""
    it = Pool()
    try:
        yield it
    finally:
        it.close()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the engine's programs: a copy that every user can reach, as under /opt."""
    path = Path(os.environ.get("CPULLM_ENGINE_BIN", "/opt/llama.cpp/current/bin"))
    assert (path / "llama-server").is_file(), f"no llama-server in {path}: build the engine, or set CPULLM_ENGINE_BIN"
    copy = open_to_all(tmp_path_factory.mktemp("engine")) / path.resolve().parent.name
    shutil.copytree(path.resolve().parent, copy, symlinks=True)
    return copy / "bin"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A private copy of the small model, for a test to damage: two shards, as whole GiB are rare after a while."""
    folder = open_to_all(tmp_path) / "model"
    folder.mkdir(mode=0o755)
    given = os.environ.get("CPULLM_ENGINE_MODEL")
    if not given:
        merge(sorted((CLONE / "tests" / "models" / "recite").glob("*.gguf")), folder / "recite.gguf", files=2)
        return Model(tuple(sorted(folder.iterdir())))
    first = Path(given)
    assert first.is_file(), f"CPULLM_ENGINE_MODEL: found no file {first}, expected a first shard"
    shards = sorted(first.parent.glob(first.name.replace("-00001-of-", "-*-of-")))
    for shard in shards:
        shutil.copyfile(shard, folder / shard.name)
    return Model(tuple(folder / shard.name for shard in shards))


@pytest.fixture
def servers(engine: Path, tmp_path: Path) -> Iterator[Servers]:
    """Start llama-server; whatever runs is ended after the test."""
    it = Servers(engine, tmp_path)
    try:
        yield it
    finally:
        for server in it.running:
            server.stop()


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernels' source, stock and patched; each beside its builds, so that they share objects.

    A soak keeps it: what goes on builds nothing again.
    """
    if not progress:
        folder = tmp_path_factory.mktemp("kernels")
    else:
        # Builds remember the clone that they were configured from.
        folder = SOAKS / "kernels" / state_of(PATCHES.glob("*.patch"), str(kernels.HERE))[:12]
        if (folder / "complete").exists():
            return folder
        shutil.rmtree(folder.parent, ignore_errors=True)
    unpack(folder / "stock" / "source")
    apply_patches(unpack(folder / "patched" / "source"))
    (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def patched_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned source with our patches: as the build applies them, and not one line fuzzy."""
    return apply_patches(unpack(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="session")
def mmap_check(patched_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that drives llama_mmap without a model."""
    program = tmp_path_factory.mktemp("check") / "mmap_check"
    source = patched_source / "src"
    command = [
        *("c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
        *(f"-I{source}", f"-I{patched_source / 'include'}", f"-I{patched_source / 'ggml' / 'include'}"),
        *(str(Path(__file__).with_name("mmap_check.cpp")), str(source / "llama-mmap.cpp")),
        *(str(source / "llama-hugepages.cpp"), "-o", str(program), "-pthread"),
        "-Wl,--wrap=pread,--wrap=madvise",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program
