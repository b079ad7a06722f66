# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure servers of this host over their HTTP interface.

Runs on the host from a copy of this folder's part of the collection, with nothing but the standard library:

``measure``  measure, and write the result; an earlier result of the same request that nobody fetched is kept instead
``restore``  end what a measurement that was killed has left running, and start what it had stopped

Two variants are measured in turns: each run of the one is followed by the same run of the other, and the next round
begins with the other one. Where memory has no room for both, the servers themselves take turns, and the instance is
down meanwhile. A variant may also be another instance that runs already, as an upgrade has it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark as bench
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark_host as host
from ansible_collections.cpullm.epyc.plugins.module_utils import _front as front

HOME = Path("/run/cpullm/benchmark")
UNITS = Path("/run/systemd/system")
FRONT = Path("/run/haproxy/admin.sock")
# What is undone by `restore` is written here before it is done.
STATE = HOME / "state.json"
PREFIX = "cpullm-benchmark-"
# Runs of one round before it is given up.
TRIES = 3
# A server beside another needs more than what the other one holds by itself.
ROOM_KIB = 256 << 10
# Nothing else may work on the server; health checks and clients that come and go are waited for.
QUIET_S = 30.0
# The kernel counts CPU time by its ticks: within a run of some milliseconds it may see none, whoever computes beside.
JUDGED_S = 0.5


class Refused(Exception):
    """Nothing can be measured; the message has found, expected and the way out."""


# --- systemd --------------------------------------------------------------------------------------------------------


def systemctl(*words: str, check: bool = True) -> str:
    """Return what systemctl prints; raises Refused where it fails."""
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if check and done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise Refused(f"systemctl {' '.join(words)} ended with {done.returncode}: {said}")
    return done.stdout


def show(unit: str) -> dict[str, str]:
    """Return properties of a unit."""
    names = "ActiveState,SubState,MainPID,FragmentPath,InactiveExitTimestampMonotonic,ActiveEnterTimestampMonotonic"
    return dict(
        line.split("=", 1) for line in systemctl("show", f"--property={names}", unit).splitlines() if "=" in line
    )


def load_seconds(shown: Mapping[str, str]) -> float:
    """Return how long the last start took, until the model was loaded: that is when the unit counts as active."""
    return (int(shown["ActiveEnterTimestampMonotonic"]) - int(shown["InactiveExitTimestampMonotonic"])) / 1e6


# --- A server -------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server that can be asked."""

    name: str
    unit: str
    pid: int
    url: str
    key: str | None
    certificate: str | None
    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    context: int = 0
    slots: int = 0
    vocabulary: int = 0
    model_bytes: int = 0
    load_s: float = 0.0

    @property
    def port(self) -> int:
        """Return the port that it listens on."""
        return urlsplit(self.url).port or 0

    def ask(self, path: str, payload: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> tuple[int, Any]:
        """Return status and body of an answer; raises OSError and http.client.HTTPException where none comes."""
        parts = urlsplit(self.url)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            # The very certificate of the unit, whatever name it is for: this is the host's own address.
            context = ssl.create_default_context(cafile=self.certificate)
            context.check_hostname = False
            context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
            connection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            body = None if payload is None else json.dumps(payload)
            connection.request("GET" if payload is None else "POST", path, body=body, headers=headers)
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(raw)
        except (ValueError, RecursionError):
            return answer.status, None

    def introduce(self) -> None:
        """Ask what the server is; raises Refused where it does not say."""
        try:
            status, health = self.ask("/health")
            if status != 200:
                raise Refused(f"{self.unit}: GET /health answers {status} {health}, expected 200. Wait for its load.")
            _status, props = self.ask("/props")
            _status, models = self.ask("/v1/models")
            meta = models["data"][0]["meta"]
            self.context, self.slots = int(props["default_generation_settings"]["n_ctx"]), int(props["total_slots"])
            self.vocabulary, self.model_bytes = int(meta["n_vocab"]), int(meta["size"])
        except (OSError, http.client.HTTPException) as error:
            raise Refused(
                f"{self.unit}: {self.url} does not answer: {error}; expected the server. Start it."
            ) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Refused(
                f"{self.unit}: /props and /v1/models lack {error}, expected a llama-server whose key is known here."
            ) from error

    def ticks(self) -> int:
        """Return the CPU time that it took so far; raises OSError where it is gone."""
        return host.snapshot(self.pid, self.cpus).server

    def idle(self, seconds: float = 0.25) -> bool:
        """Return whether it works for nobody."""
        before = self.ticks()
        time.sleep(seconds)
        return self.ticks() - before <= host.IDLE_TICKS


def read_key(path: str | None) -> str | None:
    """Return the first key of a file; raises Refused where it cannot be read."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Refused(f"{path}: {error}; expected the service's keys") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise Refused(f"{path}: found no key, expected one a line")
    return keys[0]


def instance(number: int) -> tuple[Server, str, host.Unit]:
    """Return a running instance, the text of its unit's files, and what that says; raises Refused."""
    unit = f"llama-server@{number}.service"
    shown = show(unit)
    if shown.get("ActiveState") != "active":
        raise Refused(f"{unit}: found it {shown.get('ActiveState')}, expected active. Run site.yml first.")
    text = systemctl("cat", "--no-pager", unit)
    try:
        parsed = host.parse_unit(text)
    except ValueError as error:
        raise Refused(f"{unit}: {error}") from error
    pid = int(shown["MainPID"])
    server = Server(
        "running",
        unit,
        pid,
        parsed.url,
        read_key(parsed.key_file),
        parsed.certificate,
        allowed_cpus(pid),
        parsed.nodes,
        load_s=load_seconds(shown),
    )
    server.introduce()
    return server, text, parsed


def allowed_cpus(pid: int) -> tuple[int, ...]:
    """Return the CPUs that a process may run on."""
    for line in host.read(f"/proc/{pid}/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return host.cpus_of(line.partition(":")[2])
    raise Refused(f"process {pid} is gone, expected the server")


# --- The front ------------------------------------------------------------------------------------------------------


def lead(number: int, state: str) -> None:
    """Have the front send requests to an instance (ready) or hold them (drain); nothing is done where there is none."""
    command = f"set server llama/i{number} state {state}"
    try:
        said = front.ask(str(FRONT), command).strip()
    except OSError:
        return
    if said:
        raise Refused(f"{FRONT}: HAProxy answers {said!r} to {command!r}, expected nothing. Run site.yml.")


@contextlib.contextmanager
def held(number: int, deadline: float) -> Iterator[None]:
    """Hold an instance's requests in the front, those in flight ended; raises Refused where they do not end in time."""
    lead(number, "drain")
    try:
        server, _text, _unit = instance(number)
        while not server.idle(0.5):
            if time.monotonic() > deadline:
                raise Refused(
                    f"{server.unit}: found it still at work for a client, though nothing more was sent to it, expected "
                    "an idle server. Wait, or let requests wait longer."
                )
        yield
    finally:
        lead(number, "ready")


# --- What is done ---------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """How one instance is measured."""

    number: int
    server: Server
    text: str
    unit: host.Unit
    mode: str
    reason: str
    steps: list[bench.Step]
    omitted: list[dict[str, str]]


def is_running(variant: Mapping[str, Any]) -> bool:
    """Return whether a variant is the instance as it runs."""
    return not (variant.get("binary") or variant.get("arguments") or variant.get("environment") or runs_as(variant))


def runs_as(variant: Mapping[str, Any]) -> int:
    """Return the number of the other instance that a variant is, or 0."""
    return int(variant.get("instance") or 0)


def look_at(number: int, request: Mapping[str, Any]) -> Plan:
    """Return how an instance can be measured; raises Refused where it cannot."""
    server, text, unit = instance(number)
    if request.get("hold_s") is None and not server.idle(0.5):
        raise Refused(
            f"{server.unit}: found it at work for a client, expected an idle server. Take it out of service, or wait."
        )
    variants = request["variants"]
    mode, reason = "live", "the running server is asked"
    if variants:
        for variant in variants:
            binary = variant.get("binary")
            if binary and not os.access(binary, os.X_OK):
                raise Refused(
                    f"benchmark_variants: {variant['name']}: {binary}: found no such program, expected a build"
                )
        mode, reason = room_for(server, variants, bool(request["downtime_allowed"]))
    steps, omitted = bench.steps(request["lengths"], request["depths"], request["tokens"], server.context, server.slots)
    if mode == "live" and not request["downtime_allowed"]:
        omitted.append({"figure": "restart", "reason": "benchmark_downtime_allowed is false"})
    if not steps:
        raise Refused(
            f"{server.unit}: a context of {server.context} tokens has room for no length and no depth that was asked "
            "for. Name shorter ones in benchmark_lengths and benchmark_depths."
        )
    return Plan(number, server, text, unit, mode, reason, steps, omitted)


def room_for(server: Server, variants: Sequence[Mapping[str, Any]], downtime: bool) -> tuple[str, str]:
    """Return whether variants run beside each other or in turns, and why; raises Refused where neither may be."""
    held = host.memory(server.pid)
    own_huge = host.anonymous_huge_kib(host.read(f"/proc/{server.pid}/numa_maps"))
    new = [variant for variant in variants if not is_running(variant) and not runs_as(variant)]
    own = [
        variant
        for variant in new
        if str((variant.get("environment") or {}).get("LLAMA_WEIGHTS_HUGEPAGES", "")) != "off"
    ]
    need_pages = -(-own_huge // (1 << 20)) * len(own)
    need_kib = (held["anonymous_kib"] + ROOM_KIB) * len(new)
    free_pages, free_kib = host.free_pages(nodes=server.nodes), host.available_kib()
    numbers = (
        f"{len(new)} more server(s) need {need_pages} pages of 1 GiB and {need_kib >> 10} MiB, "
        f"found {free_pages} pages and {free_kib >> 10} MiB free"
    )
    if free_pages >= need_pages and free_kib >= need_kib:
        return "beside", numbers
    if downtime:
        return "turns", numbers
    raise Refused(
        f"{server.unit}: {numbers}. Set benchmark_downtime_allowed to true: the instance then stops, and the variants "
        "take turns in its place."
    )


def in_words(plan: Plan, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan for people."""
    return {
        "instance": plan.number,
        "unit": plan.server.unit,
        "mode": plan.mode,
        "reason": plan.reason,
        "context": plan.server.context,
        "slots": plan.server.slots,
        "figures": [step.figure for step in plan.steps],
        "runs": len(plan.steps) * request["repeats"] * max(1, len(request["variants"])),
        "omitted": plan.omitted,
    }


# --- Measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The status that cpullm.epyc.job shows."""

    path: Path | None
    total: int
    done: int = 0
    # No run begins later.
    deadline: float = math.inf

    def tell(self, message: str, phase: str = "measure") -> None:
        """Write the status."""
        if self.path is None:
            return
        status = {"phase": phase, "done": min(self.done, self.total), "total": self.total, "unit": "units of work"}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({**status, "message": message, "updated": time.time()}), encoding="ascii")
        fresh.replace(self.path)


@dataclass
class Watch:
    """Counts the connections of others to a server while a run lasts."""

    server: Server
    own: int
    others: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        # A proxy keeps connections open that carry nothing.
        self._before = host.connections(self.server.pid, self.server.port)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = 0
        while not self._stop.wait(0.1):
            extra = host.connections(self.server.pid, self.server.port) - self.own - self._before
            # A health check is gone by the next look.
            self.others = max(self.others, min(last, extra))
            last = extra


def counters_after(server: Server, before: host.Snapshot) -> host.Snapshot:
    """Return the counters after a run, once the kernel's clock of CPU time had the time to show what others take."""
    time.sleep(max(0.0, before.seconds + JUDGED_S - time.monotonic()))
    return host.snapshot(server.pid, server.cpus)


def quiet(server: Server) -> bool:
    """Wait until a server works for nobody; return whether it came to that."""
    end = time.monotonic() + QUIET_S
    while not server.idle():
        if time.monotonic() > end:
            return False
    return True


def payload(step: bench.Step, prompt: Sequence[int], seed: int) -> dict[str, Any]:
    """Return a request: sampling as clients have it, never an early end, one slot for all that is asked alone."""
    return {
        "prompt": list(prompt),
        "n_predict": step.tokens,
        "ignore_eos": True,
        "cache_prompt": step.cached,
        "id_slot": 0 if step.parallel == 1 else -1,
        "seed": seed,
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 1.0,
        "min_p": 0.0,
        "stream": False,
    }


def once(server: Server, step: bench.Step, number: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return one run."""
    run: dict[str, Any] = {"figure": step.figure, "round": number, "value": None, "reasons": []}
    if not quiet(server):
        return {**run, "reasons": [f"the server worked for others for {QUIET_S:.0f} s"]}
    seed = int(request["seed"])
    bodies = [payload(step, prompt, seed) for prompt in bench.prompts(step, number, seed, server.vocabulary)]
    if step.cached:
        # The way to the depth: kept by the server, so that only the first run of a depth walks it.
        server.ask("/completion", {**bodies[0], "n_predict": 1}, request["request_timeout_s"])
    before = host.snapshot(server.pid, server.cpus)
    with Watch(server, step.parallel) as watch, ThreadPoolExecutor(step.parallel) as pool:
        start = time.monotonic()
        answers = list(pool.map(lambda body: server.ask("/completion", body, request["request_timeout_s"]), bodies))
        seconds = time.monotonic() - start
    after = counters_after(server, before)
    wrong = [f"the server answers {status}: {body!r:.200}" for status, body in answers if status != 200]
    if wrong:
        return {**run, "reasons": wrong}
    timings = [body.get("timings") or {} for _status, body in answers]
    value, reasons = bench.rate(step, timings, seconds)
    reasons += host.disturbances(before, after, len(server.cpus), float(request["other_load"]))
    if watch.others:
        reasons.append(f"{watch.others} connection(s) of others were open")
    worked = sum(float(row.get("prompt_ms") or 0) + float(row.get("predicted_ms") or 0) for row in timings) / 1000
    if step.parallel == 1 and seconds - worked > 0.5 + 0.1 * seconds:
        reasons.append(f"the request waited {seconds - worked:.1f} of {seconds:.1f} s for the server")
    if not server.idle():
        reasons.append("the server worked on for others")
    return {**run, "value": value, "seconds": round(seconds, 3), "reasons": reasons}


def rounds(
    servers: Sequence[tuple[Server, dict[str, Any]]],
    step: bench.Step,
    numbers: Sequence[int],
    request: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Measure one step on servers in turns, and keep the runs in their measurements; a disturbed one is repeated.

    Every other round goes the other way, so that what one server leaves behind in the caches hits both. Once clients
    have waited long enough, no further run begins.
    """
    for number in numbers:
        for server, measurement in servers if number % 2 == 0 else reversed(servers):
            for attempt in range(TRIES):
                if time.monotonic() > progress.deadline:
                    return
                again = f", again ({attempt + 1})" if attempt else ""
                progress.tell(f"{server.name}: {step.figure}, round {number + 1}{again}")
                run = once(server, step, number, request)
                measurement["runs"].append(run)
                if not run["reasons"]:
                    break
            progress.done += step.cost


def bandwidth(server: Server, binary: str, request: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a run of the read rate of the server's CPUs, one thread on each core, while the server is idle."""
    tool = str(Path(binary).parent / "cpullm-bandwidth")
    run: dict[str, Any] = {"figure": "read", "round": number, "value": None, "reasons": []}
    cpus = ",".join(map(str, host.primary_cpus(server.cpus)))
    if not quiet(server):
        return {**run, "reasons": ["the server worked for others"]}
    before = host.snapshot(server.pid, server.cpus)
    try:
        done = subprocess.run(
            [tool, "--cpus", cpus, "--seconds", str(request["bandwidth_seconds"])],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            return {**run, "reasons": [f"{tool} ended with {done.returncode}: {done.stderr.strip()[-200:]}"]}
        value = float(json.loads(done.stdout)["gbs"])
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return {**run, "reasons": [f"{tool}: {error}"]}
    after = counters_after(server, before)
    # The tool is a child of this program: what it took is not others' load.
    return {**run, "value": value, "reasons": host.disturbances(before, after, len(server.cpus), request["other_load"])}


def begin(name: str, plan: Plan, server: Server, variant: Mapping[str, Any], binary: str) -> dict[str, Any]:
    """Return a measurement without runs."""
    path = Path(binary).resolve()
    return {
        "name": name,
        "instance": plan.number,
        "mode": plan.mode,
        "build": path.parent.parent.name,
        # Whether it is the program that the instance's unit runs, and not another one.
        "as_unit": str(path) == str(Path(plan.unit.binary).resolve()),
        "binary": str(path),
        "arguments": list(variant.get("arguments") or []),
        "environment": dict(variant.get("environment") or {}),
        "command": [host.plain_word(word) for word in plan.unit.words[1:]],
        "cpus": list(server.cpus),
        "nodes": list(server.nodes),
        "context": server.context,
        "slots": server.slots,
        "model_bytes": server.model_bytes,
        "memory_before": host.memory(server.pid),
        "memory_after": None,
        "runs": [],
        "omitted": list(plan.omitted),
    }


def finish(measurement: dict[str, Any], server: Server, expected_kib: int | None) -> None:
    """Close a measurement: where its memory lies now, and whether that is what was to be measured."""
    measurement["memory_after"] = host.memory(server.pid)
    wrong = host.misplaced(measurement["memory_after"]["pages"], server.nodes, expected_kib)
    for run in measurement["runs"] if wrong else ():
        if run["figure"].startswith(bench.SPEEDS):
            run["reasons"] += wrong


def warm(server: Server, request: Mapping[str, Any]) -> None:
    """Have a server compute once before anything counts."""
    step = bench.Step("warm", bench.SHORT_PROMPT, 8)
    server.ask(
        "/completion", payload(step, bench.prompts(step, 0, 0, server.vocabulary)[0], 0), request["request_timeout_s"]
    )


def measure_live(plan: Plan, request: Mapping[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Measure the running instance."""
    server = plan.server
    load = {"figure": "load", "round": 0, "value": server.load_s, "reasons": []}
    restarted = []
    if request["downtime_allowed"]:
        progress.tell(f"{server.unit}: restart", "restart")
        systemctl("restart", server.unit)
        server, _text, _unit = instance(plan.number)
        restarted = [{"figure": "restart", "round": 0, "value": server.load_s, "reasons": []}]
    measurement = begin("running", plan, server, {}, plan.unit.binary)
    measurement["runs"] += [load, *restarted]
    warm(server, request)
    measurement["runs"].append(bandwidth(server, measurement["binary"], request, 0))
    for step in plan.steps:
        rounds([(server, measurement)], step, range(request["repeats"]), request, progress)
    measurement["runs"].append(bandwidth(server, measurement["binary"], request, 1))
    finish(measurement, server, expected(plan.number, request))
    return [measurement]


def expected(number: int, request: Mapping[str, Any]) -> int | None:
    """Return the KiB that an instance holds in huge pages by its plan, or None where nobody planned."""
    known = {int(row["instance"]): row for row in request["planned"]}
    return int(known[number]["pages"]) << 20 if number in known else None


@contextlib.contextmanager
def second(plan: Plan, variant: Mapping[str, Any], letter: str, request: Mapping[str, Any]) -> Iterator[Server]:
    """Run a variant of an instance on another port of loopback, and end it."""
    name = f"{PREFIX}{letter}"
    unit = f"{name}.service"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = host.second_unit(
        plan.text,
        plan.number,
        name,
        port,
        binary=variant.get("binary"),
        arguments=variant.get("arguments") or [],
        environment=variant.get("environment") or {},
        most_seconds=int(request["timeout_s"]),
        returns_to=plan.server.unit if plan.mode == "turns" else None,
    )
    (UNITS / unit).write_text(text, encoding="utf-8")
    try:
        systemctl("daemon-reload")
        start = time.monotonic()
        systemctl("start", "--no-block", unit)
        server = Server(
            str(variant["name"]),
            unit,
            0,
            f"{'https' if plan.unit.certificate else 'http'}://127.0.0.1:{port}",
            plan.server.key,
            plan.server.certificate,
            (),
            plan.server.nodes,
        )
        wait_loaded(server, start, float(request["start_timeout_s"]))
        server.load_s = time.monotonic() - start
        server.cpus = allowed_cpus(server.pid)
        server.introduce()
        yield server
    finally:
        end_unit(unit)


def wait_loaded(server: Server, start: float, timeout_s: float) -> None:
    """Wait until a second server has loaded its model; raises Refused with its last lines where it ends instead."""
    while time.monotonic() - start < timeout_s:
        shown = show(server.unit)
        server.pid = int(shown.get("MainPID", "0"))
        if shown.get("ActiveState") in ("failed", "inactive") and time.monotonic() - start > 1:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.pid and server.ask("/health", timeout_s=5)[0] == 200:
                return
        time.sleep(0.05)
    said = subprocess.run(
        ["journalctl", "--no-pager", "--output=cat", "--lines=15", f"--unit={server.unit}"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    raise Refused(
        f"benchmark_variants: {server.name}: found its server not loaded after {time.monotonic() - start:.0f} s, "
        f"expected it to serve. Its last lines:\n{said}"
    )


def end_unit(unit: str) -> None:
    """End a second server and forget it."""
    systemctl("stop", unit, check=False)
    systemctl("reset-failed", unit, check=False)
    (UNITS / unit).unlink(missing_ok=True)
    systemctl("daemon-reload", check=False)


def measure_beside(plan: Plan, request: Mapping[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Measure two variants, both loaded, run by run in turns."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for letter, variant in zip("ab", request["variants"]):
            progress.tell(f"{variant['name']}: load", "load")
            binary = variant.get("binary") or plan.unit.binary
            if is_running(variant):
                server = plan.server
            elif runs_as(variant):
                server, _text, unit = instance(runs_as(variant))
                binary = unit.binary
            else:
                server = stack.enter_context(second(plan, variant, letter, request))
            server.name = str(variant["name"])
            measurement = begin(server.name, plan, server, variant, binary)
            measurement["runs"].append({"figure": "load", "round": 0, "value": server.load_s, "reasons": []})
            warm(server, request)
            pairs.append((server, measurement))
        # Both run on the same CPUs and memory, so one rate is for both.
        read = bandwidth(pairs[0][0], plan.unit.binary, request, 0)
        for _server, measurement in pairs:
            measurement["runs"].append({**read, "reasons": list(read["reasons"])})
        for step in plan.steps:
            rounds(pairs, step, range(request["repeats"]), request, progress)
        for (server, measurement), variant in zip(pairs, request["variants"]):
            finish(measurement, server, expected(plan.number, request) if is_running(variant) else None)
    return [measurement for _server, measurement in pairs]


def measure_turns(plan: Plan, request: Mapping[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Measure two variants whose servers take turns in the instance's place; each turn is a round."""
    found: dict[str, dict[str, Any]] = {}
    try:
        systemctl("stop", plan.server.unit)
        for turn in range(request["turns"]):
            # The first one changes, so that what drifts hits both.
            order = list(zip("ab", request["variants"]))
            for letter, variant in order if turn % 2 == 0 else reversed(order):
                progress.tell(f"{variant['name']}: load, turn {turn + 1}", "load")
                with second(plan, variant, letter, request) as server:
                    name, binary = str(variant["name"]), variant.get("binary") or plan.unit.binary
                    measurement = found.setdefault(name, begin(name, plan, server, variant, binary))
                    measurement["runs"].append({"figure": "load", "round": turn, "value": server.load_s, "reasons": []})
                    warm(server, request)
                    for step in plan.steps:
                        rounds([(server, measurement)], step, [turn] * request["repeats"], request, progress)
                    finish(measurement, server, None)
    finally:
        progress.tell(f"{plan.server.unit}: start again", "restore")
        systemctl("start", plan.server.unit, check=False)
    return [found[str(variant["name"])] for variant in request["variants"]]


MEASURES = {"live": measure_live, "beside": measure_beside, "turns": measure_turns}


def measure(request: dict[str, Any], status: Path | None) -> dict[str, Any]:
    """Measure every instance of a request; raises Refused."""
    deadline = math.inf
    with contextlib.ExitStack() as stack:
        if request.get("hold_s") is not None:
            deadline = time.monotonic() + float(request["hold_s"])
            numbers = [int(number) for number in request["instances"]]
            keep_state([], numbers)
            for number in numbers:
                stack.enter_context(held(number, deadline))
        return measure_until(deadline, request, status)


def measure_until(deadline: float, request: dict[str, Any], status: Path | None) -> dict[str, Any]:
    """Measure every instance of a request, with no run that begins after the deadline; raises Refused."""
    plans = [look_at(int(number), request) for number in request["instances"]]
    sides = max(1, len(request["variants"]))
    times = {"live": 1, "beside": 1, "turns": request["turns"]}
    total = sum(step.cost * request["repeats"] * sides * times[plan.mode] for plan in plans for step in plan.steps)
    progress = Progress(status, total, deadline=deadline)
    measurements: list[dict[str, Any]] = []
    keep_state(plans, request["instances"] if request.get("hold_s") is not None else [])
    progress.tell("warming up", "begin")
    for plan in plans:
        measurements += MEASURES[plan.mode](plan, request, progress)
    progress.done = total
    progress.tell("done")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": host.machine(),
        "interleaved": bool(request["variants"]),
        "measurements": measurements,
    }


def keep_state(plans: Sequence[Plan], numbers: Sequence[int]) -> None:
    """Write what `restore` has to undo."""
    state = {
        "units": [f"{PREFIX}{letter}.service" for letter in "ab"],
        "stopped": [plan.server.unit for plan in plans if plan.mode == "turns"],
        "held": [int(number) for number in numbers],
    }
    HOME.mkdir(mode=0o700, parents=True, exist_ok=True)
    STATE.write_text(json.dumps(state), encoding="ascii")


def restore() -> list[str]:
    """End second servers, start instances that were stopped, send held requests on; return what was done."""
    done = []
    try:
        state = json.loads(STATE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        state = {"units": [], "stopped": [], "held": []}
    for unit in state["units"]:
        if (UNITS / unit).exists():
            end_unit(unit)
            done.append(f"ended {unit}")
    for unit in state["stopped"]:
        if show(unit).get("ActiveState") in ("inactive", "failed"):
            systemctl("start", "--no-block", unit)
            done.append(f"started {unit}")
    for number in state.get("held", []):
        lead(number, "ready")
        done.append(f"sent requests to instance {number} again")
    STATE.unlink(missing_ok=True)
    return done


def _ended(*_arguments: object) -> None:
    """End as a signal does, through every clean-up on the way."""
    raise SystemExit(143)


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "restore"))
    parser.add_argument("--request", type=Path, help="JSON file")
    parser.add_argument("--result", type=Path, help="where the result goes")
    parser.add_argument("--status", type=Path, help="JSON file that shows how far the work is")
    options = parser.parse_args()
    # A job that is ended still stops what it started.
    signal.signal(signal.SIGTERM, _ended)
    try:
        if options.command == "restore":
            sys.stdout.write(json.dumps({"done": restore()}) + "\n")
            return 0
        raw = options.request.read_bytes()
        request = json.loads(raw)
        digest = hashlib.sha256(raw).hexdigest()
        if options.result.exists() and json.loads(options.result.read_bytes()).get("request") == digest:
            sys.stdout.write("a result of this request was there already\n")
            return 0
        restore()
        result = {"request": digest, **measure(request, options.status)}
        fresh = options.result.with_suffix(".new")
        fresh.write_text(json.dumps(result), encoding="utf-8")
        fresh.replace(options.result)
        STATE.unlink(missing_ok=True)
    except (Refused, OSError, ValueError, http.client.HTTPException) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
