# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llama-server with its weights in anonymous 1 GiB pages, against the same server without."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.engine.harness import Model, Pool, Server, Servers, count, free_pages, open_to_all, wait_for_free

MAPPED = 1048576  # KiB per page


def numbers(model: Model, free: int) -> str:
    """Return the beginning of the message on the pages of the whole model."""
    files = f"model of {len(model.shards)} files, {model.bytes} bytes"
    return f"{files}: {model.pages} pages of 1 GiB needed, {free} free of "


def failure(server: Server) -> str:
    """Return the log of a server that ended by itself with an error, and not by a signal."""
    assert not server.ready
    assert server.process.returncode > 0, server.log
    return server.log


# Become nobody without any right, then the command of the arguments.
HARDENED = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
libc = ctypes.CDLL(None, use_errno=True)
for option in (PR_SET_NO_NEW_PRIVS, PR_SET_MDWE):
    if libc.prctl(option, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def stock(servers: Servers, model: Model) -> list[tuple[int, float]]:
    """A greedy completion without 1 GiB pages."""
    server = servers.start(model)
    said = server.complete()
    server.stop()
    return said


def test_off_is_stock(servers: Servers, model: Model, stock: list[tuple[int, float]]) -> None:
    server = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="off")
    assert server.complete() == stock
    assert server.status("HugetlbPages") == 0
    assert "hugepages:" not in server.log
    for shard in model.shards:
        assert str(shard) in server.maps()


def test_require_serves_from_pages(servers: Servers, model: Model, pool: Pool, stock: list[tuple[int, float]]) -> None:
    pool.free_exactly(model.pages)
    server = servers.start(model, ["--no-repack"], LLAMA_WEIGHTS_HUGEPAGES="require")
    assert server.ready, server.log
    assert server.complete() == stock
    assert server.status("HugetlbPages") == model.pages * MAPPED
    assert "hugepages: " + numbers(model, model.pages) in server.log
    for shard in model.shards:
        size = shard.stat().st_size
        assert re.search(
            rf"hugepages: {re.escape(str(shard))}: 1 pages of 1 GiB, {size} bytes in \d+\.\d\d s, \d+\.\d\d GiB/s ",
            server.log,
        ), server.log
    # no second copy: neither a mapped file nor a repacked buffer
    assert ".gguf" not in server.maps()
    assert "CPU_REPACK" not in server.log
    assert "failed" not in server.log
    server.stop()
    wait_for_free(model.pages)


def test_try_with_pages_is_require(servers: Servers, model: Model, pool: Pool, stock: list[tuple[int, float]]) -> None:
    pool.free_exactly(model.pages)
    server = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="try")
    assert server.complete() == stock
    assert server.status("HugetlbPages") == model.pages * MAPPED


@pytest.mark.parametrize("free", [0, 1])
def test_try_without_enough_serves_and_warns(
    servers: Servers, model: Model, pool: Pool, stock: list[tuple[int, float]], free: int
) -> None:
    pool.free_exactly(free)
    server = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="try")
    assert server.complete() == stock
    assert server.status("HugetlbPages") == free * MAPPED
    assert "hugepages: " + numbers(model, free) in server.log
    assert f"hugepages: {model.shards[free]}: 1 pages of 1 GiB needed, 0 free of " in server.log
    assert "LLAMA_WEIGHTS_HUGEPAGES=try: going on in small pages" in server.log


def test_a_killed_server_keeps_no_page(servers: Servers, model: Model, pool: Pool) -> None:
    pool.free_exactly(model.pages)
    server = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="require")
    assert server.ready, server.log
    server.process.kill()
    server.process.wait()
    wait_for_free(model.pages)


def test_require_one_page_short(servers: Servers, model: Model, pool: Pool) -> None:
    pool.free_exactly(model.pages - 1)
    log = failure(servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="require"))
    assert "LLAMA_WEIGHTS_HUGEPAGES=require: " + numbers(model, model.pages - 1) in log
    assert free_pages() == model.pages - 1


def test_a_second_server_finds_no_page(servers: Servers, model: Model, pool: Pool) -> None:
    pool.free_exactly(model.pages)
    first = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="require")
    log = failure(servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="require"))
    assert numbers(model, 0) in log
    assert first.complete()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLAMA_WEIGHTS_HUGEPAGES", "on"), ("LLAMA_WEIGHTS_THREADS", "many")],
)
def test_refuses_an_unknown_value(servers: Servers, model: Model, pool: Pool, variable: str, value: str) -> None:
    pool.free_exactly(model.pages)
    environment = {"LLAMA_WEIGHTS_HUGEPAGES": "require", variable: value}
    log = failure(servers.start(model, **environment))
    assert f"{variable} is '{value}', expected " in log


@pytest.mark.parametrize("load_mode", ["none", "dio", "mlock"])
def test_require_refuses_a_load_mode_that_copies(servers: Servers, model: Model, pool: Pool, load_mode: str) -> None:
    pool.free_exactly(model.pages)
    log = failure(servers.start(model, ["--load-mode", load_mode], LLAMA_WEIGHTS_HUGEPAGES="require"))
    assert "LLAMA_WEIGHTS_HUGEPAGES=require: this load mode copies the weights into small pages" in log
    assert "(expected: --load-mode mmap)" in log


def test_try_takes_a_load_mode_that_copies(
    servers: Servers, model: Model, pool: Pool, stock: list[tuple[int, float]]
) -> None:
    pool.free_exactly(model.pages)
    server = servers.start(model, ["--load-mode", "dio"], LLAMA_WEIGHTS_HUGEPAGES="try")
    assert server.complete() == stock
    assert server.status("HugetlbPages") == 0
    assert "this load mode copies the weights into small pages" in server.log


def test_pages_need_no_lock(servers: Servers, model: Model, pool: Pool) -> None:
    """A 1 GiB page is never swapped out: mlock would add nothing but the need of a limit."""
    pool.free_exactly(model.pages)
    server = servers.start(
        model,
        ["--load-mode", "mmap+mlock"],
        ["prlimit", "--memlock=0:0"],
        LLAMA_WEIGHTS_HUGEPAGES="require",
    )
    assert server.status("HugetlbPages") == model.pages * MAPPED
    assert server.status("VmLck") == 0


def test_an_ordinary_user_needs_no_right(
    servers: Servers, model: Model, pool: Pool, stock: list[tuple[int, float]]
) -> None:
    """No root, no locked memory, no memory that is both written and executed, as a hardened service has it."""
    pool.free_exactly(model.pages)
    open_to_all(model.shards[0].parent)
    server = servers.start(model, wrapper=[sys.executable, "-c", HARDENED], LLAMA_WEIGHTS_HUGEPAGES="require")
    assert server.ready, server.log
    assert server.complete() == stock
    assert server.status("HugetlbPages") == model.pages * MAPPED
    assert "O_DIRECT" in server.log


@pytest.mark.parametrize("mode", ["off", "try", "require"])
def test_a_truncated_shard_fails_the_load(servers: Servers, model: Model, pool: Pool, mode: str) -> None:
    pool.free_exactly(model.pages)
    shard = model.shards[-1]
    os.truncate(shard, shard.stat().st_size - 4096)
    log = failure(servers.start(model, LLAMA_WEIGHTS_HUGEPAGES=mode))
    assert "corrupted or incomplete" in log
    assert free_pages() == model.pages


@pytest.fixture
def repackable(servers: Servers, model: Model) -> Model:
    """The model in Q4_0, which llama.cpp repacks on x86; Q8_0 it does not."""
    target = model.shards[0].with_name("q4_0.gguf")
    command = [str(servers.engine / "llama-quantize"), "--allow-requantize", str(model.shards[0]), str(target), "Q4_0"]
    environment = {**os.environ, "LLAMA_WEIGHTS_HUGEPAGES": "require"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hugepages:" not in result.stderr, "a quantizer reads each tensor once"
    return Model((target,))


def test_refuses_to_repack_out_of_the_pages(servers: Servers, repackable: Model, pool: Pool) -> None:
    pool.free_exactly(1)
    log = failure(servers.start(repackable, LLAMA_WEIGHTS_HUGEPAGES="require"))
    assert "and others like it are copied into a CPU_REPACK buffer (expected: --no-repack)" in log
    server = servers.start(repackable, ["--no-repack"], LLAMA_WEIGHTS_HUGEPAGES="require")
    assert server.ready, server.log
    assert server.status("HugetlbPages") == MAPPED
    assert "model buffer size" not in "".join(line for line in server.log.splitlines() if "CPU_REPACK" in line)


def test_tests_leave_the_pool_alone(pool: Pool) -> None:
    before = count("nr_hugepages")
    pool.free_exactly(free_pages() + 1)
    pool.close()
    assert count("nr_hugepages") == before
