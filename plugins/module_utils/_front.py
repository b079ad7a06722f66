# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""HAProxy before the servers of a host: its keys as digests, its runtime socket, and what its statistics say."""

from __future__ import annotations

import csv
import hashlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What a client can send in a header, and what HAProxy then compares (RFC 6750, b64token, is narrower).
_KEY = re.compile(r"[!-~]+")
_NUMBER = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True)
class Server:
    """One server behind the front: its state in HAProxy's words, requests that it works on, and that wait for it."""

    name: str
    status: str
    current: int
    queued: int


def parse_keys(text: str) -> list[str]:
    """Return the keys of a file with one a line, as llama-server reads it; ``#`` begins a comment line.

    Raises ValueError that names the line, never the key.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise ValueError(f"line {number} has a space or a character beyond ASCII; expected one key without either")
        keys.append(key)
    if not keys:
        raise ValueError("it holds no key; expected one a line")
    return keys


def key_digests(keys: list[str]) -> str:
    """Return the lines that HAProxy compares ``sha2(256),hex`` of a key with: sorted, each once."""
    return "".join(f"{line}\n" for line in sorted({hashlib.sha256(key.encode()).hexdigest().upper() for key in keys}))


def digest(parts: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of named contents."""
    sha = hashlib.sha256()
    for name in sorted(parts):
        sha.update(f"{name}\0{len(parts[name])}\0".encode() + parts[name])
    return sha.hexdigest()


def parse_servers(text: str, backend: str) -> list[Server]:
    """Return the servers of a backend from the CSV that ``show stat`` prints (HAProxy's management guide, 9.1).

    Raises ValueError where the text is none of that.
    """
    lines = text.lstrip().removeprefix("# ").splitlines()
    rows = list(csv.DictReader(lines))
    wanted = ("pxname", "svname", "qcur", "scur", "status")
    if not rows or any(name not in rows[0] for name in wanted):
        raise ValueError(f"found {text[:80]!r}, expected the CSV of 'show stat' with {', '.join(wanted)}")
    servers = []
    for row in rows:
        name = row["svname"] or ""
        if row["pxname"] != backend or name in ("FRONTEND", "BACKEND"):
            continue
        servers.append(Server(name, row["status"] or "", _count(row["scur"]), _count(row["qcur"])))
    return servers


def _count(text: str | None) -> int:
    """Return a count of the CSV, whose fields are empty where they mean nothing."""
    return int(text) if text and _NUMBER.fullmatch(text) else 0


def description(info: str) -> str | None:
    """Return the description of ``show info``, where the configuration's digest stands, or None."""
    for line in info.splitlines():
        name, _colon, value = line.partition(": ")
        if name == "description":
            return value.strip()
    return None


def ask(path: str, command: str, timeout_s: float = 10) -> str:
    """Return what HAProxy's runtime socket answers to one command. Raises OSError where nothing listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(path)
        connection.sendall(f"{command}\n".encode())
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


def deviations(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return each difference between the front as found and as wanted, in words with both values.

    ``found`` has ``active_state``, ``servers`` (list of :class:`Server`), ``health``, ``without_key``, ``answer`` (HTTP
    statuses, 0 where none came), ``certificate`` (whether it is the given one, None without TLS) and ``error``;
    ``wanted`` has ``instances`` and ``key_needed``.
    """
    differences = []
    if found["active_state"] != "active":
        differences.append(f"haproxy.service is {found['active_state']}, expected active")
    states = {server.name: server.status for server in found["servers"]}
    for number in wanted["instances"]:
        status = states.get(f"i{number}", "absent")
        if not status.startswith("UP"):
            differences.append(f"the front has instance {number} as {status}, expected UP")
    if found["health"] != 200:
        differences.append(f"GET /health of the front answers {found['health'] or found['error']}, expected 200")
    if wanted["key_needed"] and found["without_key"] != 401:
        differences.append(f"a request without a key answers {found['without_key'] or found['error']}, expected 401")
    if found["answer"] != 200:
        differences.append(f"a completion through the front answers {found['answer'] or found['error']}, expected 200")
    if found["certificate"] is False:
        differences.append("the front presents another certificate than the file has, expected that one")
    return differences
