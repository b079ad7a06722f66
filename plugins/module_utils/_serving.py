# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a running server holds and answers: its pages, their nodes, its health, one completion."""

from __future__ import annotations

import http.client
import json
import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_STATUS_KIB = re.compile(r"^(?P<name>\w+):\s+(?P<kib>[0-9]{1,15}) kB$", re.MULTILINE)
_PAGE_SIZE = re.compile(r"\bkernelpagesize_kB=([0-9]{1,15})\b")
_NODE_PAGES = re.compile(r"\bN([0-9]{1,6})=([0-9]{1,15})\b")


@dataclass(frozen=True)
class Answer:
    """One HTTP answer: its status, and its body as JSON where it is an object, else empty."""

    status: int
    body: dict[str, Any]


def status_kib(text: str, name: str) -> int | None:
    """Return a size of ``/proc/PID/status`` in KiB, or None where the kernel does not tell it.

    RSS does not count hugetlb pages; ``HugetlbPages`` does (proc_pid_status(5)).
    """
    for match in _STATUS_KIB.finditer(text):
        if match["name"] == name:
            return int(match["kib"])
    return None


def pages_by_node(numa_maps: str, size_kib: int) -> list[dict[str, int]]:
    """Return the pages of one size that a process holds, as ``[{"node", "pages"}]`` in node order.

    ``numa_maps`` is ``/proc/PID/numa_maps`` (numa(7)); its counts are in pages of the mapping's own size.
    """
    pages: dict[int, int] = {}
    for line in numa_maps.splitlines():
        size = _PAGE_SIZE.search(line)
        if size is None or int(size[1]) != size_kib:
            continue
        for node, count in _NODE_PAGES.findall(line):
            pages[int(node)] = pages.get(int(node), 0) + int(count)
    return [{"node": node, "pages": pages[node]} for node in sorted(pages)]


def store_pages(numa_maps: str, folder: str, size_kib: int) -> int:
    """Return how many of a process's huge pages of one size belong to files below a folder."""
    lines = []
    for line in numa_maps.splitlines():
        file = re.search(r" file=(\S+)", line)
        if file is not None:
            name = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), file[1])
            if name.startswith(folder.rstrip("/") + "/"):
                lines.append(line)
    return sum(entry["pages"] for entry in pages_by_node("\n".join(lines), size_kib))


def request(
    url: str,
    *,
    timeout_s: float,
    payload: dict[str, Any] | None = None,
    key: str | None = None,
    ca_file: str | None = None,
) -> Answer:
    """Return the answer to a GET, or to a POST where there is a payload.

    The certificate is checked against ``ca_file``, or the system's authorities without one.
    Raises OSError (also for TLS) and http.client.HTTPException where no answer comes.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca_file)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(
            "GET" if payload is None else "POST",
            parts.path or "/",
            body=None if payload is None else json.dumps(payload),
            headers=headers,
        )
        answer = connection.getresponse()
        raw = answer.read()
    finally:
        connection.close()
    return answer_of(answer.status, raw)


def answer_of(status: int, raw: bytes) -> Answer:
    """Return an answer of these bytes, whatever they are."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = {}
    return Answer(status, body if isinstance(body, dict) else {})


def chat_text(answer: dict[str, Any]) -> str:
    """Return the text of a chat completion, its reasoning included, or an empty string."""
    try:
        message = answer["choices"][0]["message"]
    except (KeyError, IndexError, TypeError):
        return ""
    if not isinstance(message, dict):
        return ""
    parts = (message.get("reasoning_content"), message.get("content"))
    return "".join(part for part in parts if isinstance(part, str))


def decode_rate(answer: dict[str, Any]) -> float | None:
    """Return the tokens per second of the decode that the server measured, or None."""
    timings = answer.get("timings")
    rate = timings.get("predicted_per_second") if isinstance(timings, dict) else None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        return None
    # JSON's numbers have no bounds, and Python reads NaN and Infinity too.
    return float(rate) if 0 <= rate < 1e9 else None


def deviations(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return each difference between an instance as found and as planned, in words with both values.

    ``found`` is one entry of :func:`observe`'s shape; ``wanted`` has ``pages``, ``size_kib``, ``nodes`` (allowed
    node numbers, empty for any), ``hugepages`` (whether weights belong in them), ``stored`` (whether in files of a
    store), ``private_kib`` (most ordinary memory of the process, None for any) and ``expect`` (text or None).
    """
    differences = []
    if found["active_state"] != "active":
        differences.append(f"the unit is {found['active_state']}, expected active")
    if found["health"] != 200:
        differences.append(f"GET /health answers {found['health'] or found['error']}, expected 200")
    if wanted["hugepages"]:
        planned = wanted["pages"] * wanted["size_kib"]
        if found["hugetlb_kib"] != planned:
            held = "not known" if found["hugetlb_kib"] is None else f"{found['hugetlb_kib']} kB"
            differences.append(f"HugetlbPages is {held}, expected {planned} kB ({wanted['pages']} pages)")
        stray = [entry for entry in found["nodes"] if wanted["nodes"] and entry["node"] not in wanted["nodes"]]
        differences.extend(
            f"{entry['pages']} pages lie on node {entry['node']}, expected only nodes {wanted['nodes']}"
            for entry in stray
        )
    if wanted["stored"]:
        if found["store_problems"]:
            differences.append(f"the store is not complete: {', '.join(found['store_problems'])}")
        if found["store_pages"] != wanted["pages"]:
            differences.append(f"{found['store_pages']} pages of the store are mapped, expected {wanted['pages']}")
    if found["pid"] and not found["no_repack"]:
        differences.append("--no-repack is no argument of the process: weights may be copied into a second buffer")
    if wanted["private_kib"] is not None and (found["private_kib"] or 0) > wanted["private_kib"]:
        differences.append(
            f"RssAnon is {found['private_kib']} kB, expected at most {wanted['private_kib']} kB for KV cache and "
            "buffers: more may be a second copy of weights"
        )
    if wanted["expect"] is not None and wanted["expect"] not in (found["text"] or ""):
        differences.append(f"the completion is {found['text']!r}, expected it to contain {wanted['expect']!r}")
    elif not found["text"]:
        differences.append("the completion is empty")
    if wanted["key_needed"] and found["without_key"] != 401:
        differences.append(f"a request without a key answers {found['without_key']}, expected 401")
    return differences
