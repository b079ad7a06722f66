# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program that measures memory, compiled as the build does, and the module that runs it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.filter.judgement_table import judgement_table
from ansible_collections.cpullm.epyc.plugins.module_utils import _bandwidth, _numa
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from test_facts_modules import documentation, undocumented

CLONE = Path(__file__).resolve().parents[2]
SOURCE = CLONE / "roles" / "llamacpp_build" / "files" / "cpullm-bandwidth.c"
CPU = min(os.sched_getaffinity(0))
SMALL = ("--bytes", "8000000", "--seconds", "0.05")
FLAGS = set(_numa.gather()["cpu"]["flags"])
ANSWER = {"gbs": 431.2, "gbs_min": 425.9, "gbs_max": 433.0, "threads": 16, "bytes": 1 << 30}
MEASURED = {"available": True, "reason": None, "sockets": [{"socket": 0, **ANSWER}]}


def compile_program(directory: Path, isa: str, text: str | None = None) -> Path:
    """Return the program for an instruction set, from the source or from a text in its place."""
    source = directory / "source.c"
    source.write_text(SOURCE.read_text(encoding="utf-8") if text is None else text, encoding="utf-8")
    program = directory / f"cpullm-bandwidth-{isa}"
    define = [f"-DISA_{isa.upper()}"] if isa != "sse2" else []
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *define, "-o", program, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as every x86-64 runs it."""
    return compile_program(tmp_path_factory.mktemp("program"), "sse2")


def run(program: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=60, **options)


# --- The program --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "flag", "register"),
    [
        pytest.param("sse2", "sse2", "xmm", id="plain"),
        pytest.param("avx2", "avx2", "ymm", id="avx2"),
        pytest.param("avx512", "avx512f", "zmm", id="avx512"),
    ],
)
def test_each_instruction_set_reads_with_its_registers(tmp_path: Path, isa: str, flag: str, register: str) -> None:
    built = compile_program(tmp_path, isa)
    code = subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True).stdout
    loop = code.split("<sum_of>:")[1].split("\n\n")[0]
    assert sum("paddq" in line and register in line and "(" in line for line in loop.splitlines()) >= 8, loop
    done = run(built, "--cpus", str(CPU), *SMALL)
    if flag in FLAGS:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["isa"] == isa
    else:
        assert (done.returncode, f"this CPU lacks {flag}" in done.stderr) == (4, True), done.stderr


def test_a_cpu_without_the_instruction_set_is_told_so(tmp_path: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    # AMD's XOP went with Zen, and no Intel CPU ever had it.
    other = text.replace("__builtin_cpu_supports(FEATURE)", '__builtin_cpu_supports("xop")')
    assert other != text
    done = run(compile_program(tmp_path, "avx512", other), "--cpus", str(CPU), *SMALL)
    assert done.returncode == 4
    assert done.stderr == "cpullm-bandwidth: this CPU lacks avx512f; expected one that a build for avx512 runs on\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("sound", "broken"),
    [
        pytest.param("i < count; i += 8) {\n        s[0]", "i < count / 2; i += 8) {\n        s[0]", id="half-is-read"),
        pytest.param("s[5] += data[i + 5];", "s[5] += data[i + 4];", id="one-load-of-eight-is-another"),
        pytest.param("sum += sum_of", "if (i == 0) sum += sum_of", id="read-once-counted-often"),
    ],
)
def test_a_broken_kernel_is_not_fast(tmp_path: Path, sound: str, broken: str) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count(sound) == 1
    done = run(compile_program(tmp_path, "sse2", text.replace(sound, broken)), "--cpus", str(CPU), *SMALL)
    assert (done.returncode, done.stdout) == (1, "")
    assert "passes read another sum than was written" in done.stderr


def test_the_answer_is_one_line_that_the_parser_takes(program: Path) -> None:
    cpus = _numa.format_cpulist(os.sched_getaffinity(0))
    done = run(program, "--cpus", cpus, "--bytes", "40000000", "--seconds", "0.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    threads = len(os.sched_getaffinity(0))
    assert (found["cpus"], found["threads"], found["isa"]) == (cpus, threads, "sse2")
    assert 40000000 <= found["bytes"] <= 40000000 + threads * (2 << 20)
    assert found["passes"] >= 3
    assert found["seconds"] > 0.1
    assert _bandwidth.parse_measurement(done.stdout).threads == threads


def test_the_figure_is_of_the_order_of_another_reader(program: Path) -> None:
    size = 64 << 20
    block = b"\x01" * size
    start = time.perf_counter()
    assert block.find(b"\x02") == -1
    other = size / (time.perf_counter() - start) / 1e9
    found = _bandwidth.parse_measurement(run(program, "--cpus", str(CPU), "--bytes", str(size)).stdout)
    assert other / 100 < found.gbs < other * 100, f"{found.gbs} GB/s, memchr reads {other} GB/s"


def test_the_buffer_is_more_than_the_caches_by_default(program: Path) -> None:
    found = json.loads(run(program, "--cpus", str(CPU), "--seconds", "0.1").stdout)
    l3 = sum(group["bytes"] or 0 for group in _numa.gather()["l3"] if CPU in _numa.parse_cpulist(group["cpus"]))
    usual = max(4 * l3, 1 << 30)
    # Less only on a machine that has less than four times as much to give.
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert max(2 * l3, 64 << 20) <= found["bytes"] <= usual + (2 << 20)
    assert found["bytes"] >= usual or free < 8 * usual


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param((), "usage: cpullm-bandwidth --cpus LIST", id="nothing"),
        pytest.param(("--cpus",), "usage: ", id="no-value"),
        pytest.param(("--cpus", "0", "x"), "usage: ", id="a-word-too-many"),
        pytest.param(("--frob",), "usage: ", id="unknown-option"),
        pytest.param(("--cpus", ""), "--cpus: found '', expected a list", id="no-cpu"),
        pytest.param(("--cpus", "0\n"), "--cpus: found '0\n', expected a list", id="newline"),
        pytest.param(("--cpus", "3-1"), "--cpus: found '3-1', expected a list", id="descending"),
        pytest.param(("--cpus", "0,1024"), "numbers up to 1023", id="beyond-the-set"),
        pytest.param(("--cpus", "99999999999999999999"), "numbers up to 1023", id="overflow"),
        pytest.param(("--cpus", "1023"), "expected CPUs that are online and allowed", id="not-there"),
        pytest.param(("--cpus", "0", "--bytes", "0"), "--bytes: found '0'", id="no-bytes"),
        pytest.param(("--cpus", "0", "--bytes", "-1"), "--bytes: found '-1'", id="negative-bytes"),
        pytest.param(("--cpus", "0", "--bytes", "1G"), "--bytes: found '1G'", id="unit"),
        pytest.param(("--cpus", "0", "--seconds", "0"), "--seconds: found '0'", id="no-time"),
        pytest.param(("--cpus", "0", "--seconds", "61"), "--seconds: found '61'", id="too-long"),
        pytest.param(("--cpus", "0", "--seconds", "nan"), "--seconds: found 'nan'", id="nan"),
        pytest.param(("--cpus", "0", "--seconds", "1s"), "--seconds: found '1s'", id="unit-of-time"),
    ],
)
def test_wrong_arguments_are_refused(program: Path, words: tuple[str, ...], message: str) -> None:
    done = run(program, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


# The facts read five digits, which no kernel exceeds; the program takes any number of zeros before a number.
@given(text=st.text("0123456789,- x", max_size=8).filter(lambda text: not re.search(r"^-|[0-9]{6}", text)))
@settings(max_examples=50, deadline=None)
def test_lists_are_read_as_the_facts_read_them(program: Path, text: str) -> None:
    done = run(program, f"--cpus={text}", "--bytes", "1", "--seconds", "0.001")
    try:
        # The facts strip what the kernel writes around a list; an argument has nothing around it.
        wanted = set(_numa.parse_cpulist(text)) if text == text.strip() else set()
    except ValueError:
        wanted = set()
    there = bool(wanted) and wanted <= os.sched_getaffinity(0)
    assert done.returncode == (0 if there else 2), done.stderr
    if there:
        assert json.loads(done.stdout)["threads"] == len(wanted)


def test_more_than_a_quarter_of_the_free_memory_is_refused(program: Path) -> None:
    done = run(program, "--cpus", str(CPU), "--bytes", str(1 << 50))
    assert (done.returncode, done.stdout) == (3, "")
    assert "MiB free, of which a quarter may be taken; expected room for a buffer of 1073741824 MiB" in done.stderr


def test_memory_that_is_not_given_is_refused(program: Path) -> None:
    limit = 64 << 20
    done = run(program, "--cpus", str(CPU), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert (done.returncode, done.stdout) == (3, "")
    assert f"MiB for CPU {CPU}: Cannot allocate memory" in done.stderr


def test_an_answer_that_cannot_be_written_is_an_error(program: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [program, "--cpus", str(CPU), *SMALL], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "cpullm-bandwidth: standard output: No space left on device\n")


def test_sigterm_ends_it_at_once(program: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    words = ["--cpus", _numa.format_cpulist(cpus), "--bytes", "8000000", "--seconds", "50"]
    with subprocess.Popen([program, *words], stdout=subprocess.PIPE) as process:
        tasks = Path(f"/proc/{process.pid}/task")
        deadline = time.monotonic() + 20
        while len(list(tasks.iterdir())) <= len(cpus):
            assert time.monotonic() < deadline, "the threads did not start"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        # Far from the 50 s that it was asked for, however busy this machine is.
        assert process.wait(20) == -signal.SIGTERM
        assert process.stdout is not None
        assert process.stdout.read() == b""


# --- Its answers --------------------------------------------------------------------------------------------------


def test_an_answer_is_read() -> None:
    text = json.dumps({**ANSWER, "passes": 40, "isa": "avx512"}) + "\n"
    assert _bandwidth.parse_measurement(text) == _bandwidth.Measurement(431.2, 425.9, 433.0, 16, 1 << 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "found '', expected one line of JSON", id="nothing"),
        pytest.param("1 2", "expected one line of JSON", id="two-values"),
        pytest.param("[" * 100000, "expected one line of JSON", id="deep"),
        pytest.param("[]", "expected a JSON object", id="list"),
        pytest.param({"gbs": None}, "found gbs None, expected a number above 0", id="null"),
        pytest.param({"gbs": True}, "found gbs True", id="boolean"),
        pytest.param({"gbs": "431"}, "found gbs '431'", id="text"),
        pytest.param({"gbs": 0}, "found gbs 0", id="zero"),
        pytest.param({"gbs": float("nan")}, "found gbs 'NaN'", id="nan"),
        pytest.param({"gbs_max": float("inf")}, "found gbs_max 'Infinity'", id="infinite"),
        pytest.param({"bytes": 1.5}, "found bytes 1.5, expected a whole number", id="half-a-byte"),
        pytest.param({"threads": -1}, "found threads -1", id="negative"),
        pytest.param({"gbs_min": 432}, "found a median of 431.2 between 432 and 433.0", id="median-below"),
        pytest.param({"gbs_max": 430}, "found a median of 431.2 between 425.9 and 430", id="median-above"),
    ],
)
def test_another_answer_is_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        _bandwidth.parse_measurement(text if isinstance(text, str) else json.dumps({**ANSWER, **text}))
    assert message in str(caught.value)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(st.text() | st.fixed_dictionaries(dict.fromkeys(ANSWER, VALUES)).map(json.dumps))
def test_any_answer_is_a_measurement_or_an_error(text: str) -> None:
    try:
        found = _bandwidth.parse_measurement(text)
    except ValueError as error:
        assert len(str(error)) < 300
        return
    assert 0 < found.gbs_min <= found.gbs <= found.gbs_max
    assert found.threads > 0 < found.bytes


@given(st.lists(st.floats(0.001, 1e6), min_size=3, max_size=3), st.integers(1, 1024), st.integers(1, 1 << 50))
def test_what_is_printed_is_what_is_read(rates: list[float], threads: int, size: int) -> None:
    least, median, most = sorted(rates)
    answer = {"gbs": median, "gbs_min": least, "gbs_max": most, "threads": threads, "bytes": size}
    assert vars(_bandwidth.parse_measurement(json.dumps(answer))) == answer


@pytest.mark.parametrize(
    ("code", "err", "message"),
    [
        pytest.param(
            3, "cpullm-bandwidth: node 0: found 3 MiB\n", "ended with code 3: cpullm-bandwidth: node 0", id="code"
        ),
        pytest.param(-9, "", "ended with signal 9: no message", id="signal"),
    ],
)
def test_a_run_that_failed_says_how(code: int, err: str, message: str) -> None:
    with pytest.raises(ValueError, match="ended with") as caught:
        _bandwidth.read_answer(code, json.dumps(ANSWER), err)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param({}, id="empty"),
        pytest.param({"socket": 0}, id="no-cpus"),
        pytest.param({"socket": 0, "primary_cpus": ""}, id="empty-list"),
        pytest.param({"socket": True, "primary_cpus": "0"}, id="boolean"),
        pytest.param({"socket": "0", "primary_cpus": "0"}, id="text"),
    ],
)
def test_a_socket_of_another_form_is_named(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sockets\[1\]: found socket .* expected entries of ansible_facts"):
        _bandwidth.check_sockets([{"socket": 0, "primary_cpus": "0-7"}, entry])


def test_servers_are_found_by_their_command(tmp_path: Path) -> None:
    for pid, command in (("12", "llama-server"), ("9", "llama-server"), ("7", "llama-bench"), ("self", "llama-server")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(f"{command}\n")
    (tmp_path / "8").mkdir()
    assert _bandwidth.serving(str(tmp_path)) == [9, 12]


# --- The module ---------------------------------------------------------------------------------------------------


def module(**arguments: Any) -> dict[str, Any]:
    """Return what the module answers, run as Ansible runs it."""
    name = "ansible_collections.cpullm.epyc.plugins.modules.memory_bandwidth_facts"
    given_in = {"ANSIBLE_MODULE_ARGS": {"_ansible_check_mode": True, "_ansible_remote_tmp": "/tmp", **arguments}}
    done = subprocess.run(
        [sys.executable, "-m", name],
        input=json.dumps(given_in),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def fact(**arguments: Any) -> dict[str, Any]:
    answer = module(**{"sockets": [{"socket": 3, "primary_cpus": str(CPU)}], "seconds": 0.05, **arguments})
    assert answer["changed"] is False, answer
    found: dict[str, Any] = answer["ansible_facts"]["cpullm_bandwidth"]
    assert set(found) == {"available", "reason", "sockets"}
    assert found["available"] is (found["reason"] is None)
    return found


def test_the_module_measures(program: Path) -> None:
    found = fact(tool=str(program))
    assert found["available"] is True, found["reason"]
    (entry,) = found["sockets"]
    assert set(entry) == {"socket", *ANSWER}
    assert (entry["socket"], entry["threads"]) == (3, 1)


def test_a_host_without_the_program_is_not_failed(tmp_path: Path) -> None:
    found = fact(tool=str(tmp_path / "absent"))
    assert found == _bandwidth.unavailable(found["reason"])
    assert "absent: found no such file" in found["reason"]
    assert "install that first" in found["reason"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param("#!/bin/sh\necho broken memory >&2\nexit 1\n", "ended with code 1: broken memory", id="exit-code"),
        pytest.param("#!/bin/sh\nkill -9 $$\n", "ended with signal 9: no message", id="killed"),
        pytest.param("#!/bin/sh\necho fine\n", "found 'fine\\n', expected one line of JSON", id="no-json"),
        pytest.param("#!/nonexistent\n", "No such file or directory", id="does-not-start"),
    ],
)
def test_a_program_that_fails_is_the_reason(tmp_path: Path, script: str, message: str) -> None:
    tool = tmp_path / "tool"
    tool.write_text(script)
    tool.chmod(0o755)
    found = fact(tool=str(tool))
    assert found["sockets"] == []
    assert message in found["reason"]
    assert found["reason"].startswith(f"{tool} on the CPUs {CPU}: ")


def test_nothing_is_measured_while_a_server_runs(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\necho '{json.dumps(ANSWER)}'\n")
    tool.chmod(0o755)
    server = tmp_path / "llama-server"
    server.symlink_to("/bin/sleep")
    with subprocess.Popen([server, "60"]) as process:
        try:
            reason = fact(tool=str(tool), only_when_idle=True)["reason"]
            assert "found llama-server running (process " in reason
            assert str(process.pid) in reason
            assert fact(tool=str(tool))["sockets"] == [{**ANSWER, "socket": 3}]
        finally:
            process.kill()


def test_the_documentation_tells_what_is_returned() -> None:
    documented = documentation("memory_bandwidth_facts", "RETURN")["ansible_facts"]["contains"]
    assert undocumented(documented["cpullm_bandwidth"], MEASURED, "cpullm_bandwidth") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"sockets": [{"socket": 0}]}, "sockets[0]: found socket 0 with primary_cpus None", id="sockets"),
        pytest.param({"seconds": 0}, "seconds: found 0.0, expected above 0 and up to 60", id="seconds"),
    ],
)
def test_wrong_arguments_fail_the_module(arguments: dict[str, Any], message: str) -> None:
    answer = module(**{"sockets": [], **arguments})
    assert answer["failed"] is True
    assert message in answer["msg"]


# --- What people see ----------------------------------------------------------------------------------------------

ROOF = {"socket": 0, "name": "12 channels", "gbs": 576.0, "hypothesis": False, "tokens": []}
LINKS = {**ROOF, "name": "2 CCDs", "gbs": 280.0, "hypothesis": True}
ATTENTION = {**ROOF, "name": "attention", "gbs": None}


@pytest.mark.parametrize(
    ("roofs", "line"),
    [
        pytest.param(
            [LINKS, ATTENTION, ROOF],
            "measured, socket 0: 431 GB/s, 75% of the memory's 576 GB/s",
            id="share-of-the-memory",
        ),
        pytest.param([LINKS, ATTENTION], "measured, socket 0: 431 GB/s", id="unknown-memory"),
        pytest.param([{**ROOF, "socket": 1}], "measured, socket 0: 431 GB/s", id="memory-of-another-socket"),
    ],
)
def test_the_table_compares_with_the_memory(roofs: list[Any], line: str) -> None:
    judgement = {"findings": [], "roofs": roofs, "measured": [{"socket": 0, "gbs": 431.2, "tokens": []}]}
    assert line in judgement_table(judgement, "r1", 200, MEASURED)


def test_the_table_says_why_nothing_was_measured() -> None:
    judgement: dict[str, Any] = {"findings": [], "roofs": [ROOF], "measured": []}
    assert judgement_table(judgement, "r1", 200, _bandwidth.unavailable("no program"))[2:] == [
        "measured: nothing. no program"
    ]
    assert len(judgement_table(judgement, "r1", 200)) == 2


def test_the_judgement_takes_the_fact() -> None:
    numa = _numa.gather(str(CLONE / "tests" / "fixtures" / "lab-vm-bookworm"))
    assert judge(Host(numa, None, bandwidth=MEASURED))["measured"] == [{"socket": 0, "gbs": 431.2, "tokens": []}]
