# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small hub-compatible server of local directories, with faults on demand.

It speaks the part of the model hub's interface that the collection uses:

    GET  /api/models/{repo}/revision/{revision}          {"sha": commit, ...}
    GET  /api/models/{repo}/tree/{revision}[/{folder}]   files with size and lfs.oid, paged through Link
    GET  /{repo}/resolve/{revision}/{path}               LFS files: 302 to the CDN; others: the bytes
    GET  /cdn/{sha256}/{name}?Expires=..&Signature=..    the bytes, with Range, ETag and If-Range

The CDN listens on a port of its own, as the real one is another host: it answers 400 to a request that still
carries the hub's token, and 403 to one without a signature.  The redirect keeps the host name that the client used,
so that a guest behind user-mode NAT can follow it.

In a test:

    with Hub() as hub:
        hub.add("org/name", directory)
        hub.fault(Fault("drop", match="00002-of", after=1000))
        ... hub.url ...
        hub.requests            # what was asked, in order

As a process (the demo, molecule):

    python3 tests/support/hub.py --repo org/name=DIRECTORY --port 8765 [--token-file F] [--fault JSON] [--ready-file F]

A process takes faults at run time as well: POST /control/faults (one JSON object or a list), DELETE clears them,
GET /control/requests lists what was asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.server
import json
import re
import signal
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 18
SIGNATURE = "signed"


@dataclasses.dataclass
class Fault:
    """One misbehaviour, used up after ``times`` requests (None: never) whose path matches ``match``.

    kind       what happens
    ---------  --------------------------------------------------------------------------------
    drop       the connection ends after ``after`` bytes of the body
    stall      ``after`` bytes, then nothing for ``seconds``, then the connection ends
    slow       at most ``rate`` bytes a second
    corrupt    the byte at offset ``after`` of the file is inverted
    status     answer ``status``, with ``Retry-After: retry_after`` if that is not None
    no_range   a Range request is answered with 200 and the whole file
    other_range  a Range request is answered with 206 and a range that starts ``after`` bytes later
    shorter    the answer, and its Content-Length, end ``after`` bytes early
    loop       redirect to itself
    """

    kind: str
    match: str = ""
    times: int | None = 1
    after: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    status: int = 503
    retry_after: str | None = None

    KINDS = ("drop", "stall", "slow", "corrupt", "status", "no_range", "other_range", "shorter", "loop")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"unknown fault {self.kind!r}, expected one of {', '.join(self.KINDS)}")
        re.compile(self.match)


@dataclasses.dataclass
class Request:
    """One request as it was answered; ``sent`` counts bytes of the body."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    sent: int = 0
    fault: str | None = None


@dataclasses.dataclass
class _Repo:
    directory: Path
    commit: str
    revisions: dict[str, str]


class Hub:
    """The server; a context manager that listens while it is entered."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        cdn_port: int = 0,
        token: str | None = None,
        page_size: int = 1000,
        certificate: tuple[str, str] | None = None,
    ) -> None:
        self.token = token
        self.page_size = page_size
        self.requests: list[Request] = []
        self.scheme = "https" if certificate else "http"
        self._faults: list[Fault] = []
        self._repos: dict[str, _Repo] = {}
        self._digests: dict[tuple[str, int, int], str] = {}
        self._blobs: dict[str, Path] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._servers: list[_Server] = []
        self._threads: list[threading.Thread] = []
        for number, name in ((port, "api"), (cdn_port, "cdn")):
            server = _Server((host, number), _Handler)
            server.hub = self
            server.part = name
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*certificate)
                server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            self._servers.append(server)
        self.host = host
        self.port = int(self._servers[0].server_address[1])
        self.cdn_port = int(self._servers[1].server_address[1])
        self.url = f"{self.scheme}://{host}:{self.port}"

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self.stopping.set()
        for server in self._servers:
            if self._threads:
                server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def add(self, repo: str, directory: str | Path, *, commit: str | None = None, branch: str = "main") -> str:
        """Serve ``directory`` as ``repo``; returns the commit, which follows from the content if none is given."""
        root = Path(directory)
        if commit is None:
            summary = "".join(f"{path} {self.digest(file)}\n" for path, file in _walk(root))
            commit = hashlib.sha1(summary.encode(), usedforsecurity=False).hexdigest()
        with self._lock:
            self._repos[repo] = _Repo(root, commit, {branch: commit, commit: commit})
        return commit

    def fault(self, *faults: Fault) -> None:
        with self._lock:
            self._faults.extend(faults)

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def take_fault(self, path: str, kinds: tuple[str, ...]) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and re.search(fault.match, path):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            self._faults.remove(fault)
                    return fault
        return None

    def repo(self, name: str) -> _Repo | None:
        with self._lock:
            return self._repos.get(name)

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def digest(self, file: Path) -> str:
        """The file's sha256, computed once per content."""
        info = file.stat()
        key = (str(file), info.st_size, info.st_mtime_ns)
        with self._lock:
            known = self._digests.get(key)
        if known is None:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(CHUNK):
                    digest.update(block)
            known = digest.hexdigest()
        with self._lock:
            self._digests[key] = known
            self._blobs[known] = file
        return known

    def blob(self, digest: str) -> Path | None:
        with self._lock:
            return self._blobs.get(digest)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(root.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file.relative_to(root).as_posix(), file


def _is_lfs(path: str) -> bool:
    return path.endswith((".gguf", ".safetensors", ".bin"))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    hub: Hub
    part: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests, not news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "test-hub"
    timeout = 60
    server: _Server
    note: Request

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in Hub.requests; nothing is printed."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self._control()

    def do_DELETE(self) -> None:
        self._control()

    def _control(self) -> None:
        hub = self.server.hub
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/control/faults":
            self._text(404, "no such control")
            return
        try:
            if self.command == "DELETE":
                hub.clear_faults()
            else:
                given = json.loads(text)
                hub.fault(*[Fault(**item) for item in (given if isinstance(given, list) else [given])])
        except (ValueError, TypeError, re.error) as error:
            self._text(400, str(error))
            return
        self._json({"ok": True}, {})

    def _answer(self, *, body: bool) -> None:
        hub = self.server.hub
        self.with_body = body
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if path == "/control/requests":
            self._json([dataclasses.asdict(item) for item in hub.requests], {})
            return
        authorization = self.headers.get("Authorization")
        self.note = Request(self.command, self.path, self.headers.get("Range"), authorization is not None)
        hub.note(self.note)
        fault = hub.take_fault(path, ("status", "loop"))
        if fault is not None:
            self.note.fault = fault.kind
            if fault.kind == "loop":
                self._redirect(self.path, {})
            else:
                headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
                self._text(fault.status, "made to fail", headers)
            return
        if self.server.part == "cdn":
            self._cdn(path, query, authorization)
            return
        if hub.token is not None and authorization != f"Bearer {hub.token}":
            self._text(401, "Invalid credentials", {"X-Error-Code": "RepoNotFound"})
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            self._revision(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            self._tree(match[1], match[2], match[3] or "", query)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._text(404, "Not found")

    def _commit(self, name: str, revision: str) -> tuple[_Repo, str] | None:
        repo = self.server.hub.repo(name)
        if repo is None:
            self._text(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.revisions.get(revision)
        if commit is None:
            self._text(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    def _revision(self, name: str, revision: str) -> None:
        found = self._commit(name, revision)
        if found is not None:
            repo, commit = found
            siblings = [{"rfilename": path} for path, _ in _walk(repo.directory)]
            self._json({"id": name, "sha": commit, "private": False, "siblings": siblings}, {})

    def _tree(self, name: str, revision: str, folder: str, query: dict[str, str]) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        repo, _commit = found
        prefix = f"{folder}/" if folder else ""
        recursive = query.get("recursive", "").lower() in ("true", "1")
        rows: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, file in _walk(repo.directory):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                folders.add(prefix + "/".join(inner[:depth]))
            if not recursive and len(inner) > 1:
                continue
            size = file.stat().st_size
            digest = self.server.hub.digest(file)
            row: dict[str, Any] = {"type": "file", "oid": digest[:40], "size": size, "path": path}
            if _is_lfs(path):
                row["lfs"] = {"oid": digest, "size": size, "pointerSize": 135}
            rows.append(row)
        shown = [path for path in folders if recursive or "/" not in path[len(prefix) :]]
        rows.extend({"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in shown)
        rows.sort(key=lambda row: str(row["path"]))
        start = int(query.get("cursor") or 0)
        end = start + min(int(query.get("limit") or self.server.hub.page_size), self.server.hub.page_size)
        headers = {}
        if end < len(rows):
            following = urllib.parse.urlencode({**query, "cursor": str(end)})
            base = f"{self.server.hub.scheme}://{self.headers.get('Host')}{urllib.parse.urlsplit(self.path).path}"
            headers["Link"] = f'<{base}?{following}>; rel="next"'
        self._json(rows[start:end], headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        repo, commit = found
        file = (repo.directory / path).resolve()
        if not file.is_file() or repo.directory.resolve() not in file.parents:
            self._text(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        hub = self.server.hub
        digest = hub.digest(file)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if not _is_lfs(path):
            self._file(file, digest, headers)
            return
        headers["X-Linked-Size"] = str(file.stat().st_size)
        headers["X-Linked-ETag"] = f'"{digest}"'
        host = (self.headers.get("Host") or hub.host).rsplit(":", 1)[0]
        address = f"{hub.scheme}://{host}:{hub.cdn_port}/cdn/{digest}/{urllib.parse.quote(file.name)}"
        self._redirect(f"{address}?Expires=4102444800&Signature={SIGNATURE}", headers)

    def _cdn(self, path: str, query: dict[str, str], authorization: str | None) -> None:
        match = re.fullmatch(r"/cdn/([0-9a-f]{64})/([^/]+)", path)
        file = self.server.hub.blob(match[1]) if match else None
        if authorization is not None:
            self._text(400, "Only one auth mechanism allowed")
        elif query.get("Signature") != SIGNATURE:
            self._text(403, "Missing signature")
        elif match is None or file is None or not file.is_file():
            self._text(404, "No such object")
        else:
            self._file(file, match[1], {"ETag": f'"{match[1]}"'})

    def _file(self, file: Path, digest: str, headers: dict[str, str]) -> None:
        hub = self.server.hub
        size = file.stat().st_size
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        start, end = 0, size
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        fault = None
        if self.with_body:
            fault = hub.take_fault(path, ("drop", "stall", "slow", "corrupt", "no_range", "other_range", "shorter"))
        kind = fault.kind if fault else None
        self.note.fault = kind
        partial = wanted is not None and kind != "no_range" and condition in (None, f'"{digest}"')
        if partial:
            bounds = _bounds(wanted or "", size)
            if bounds is None:
                self._text(416, "Range not satisfiable", {**headers, "Content-Range": f"bytes */{size}"})
                return
            start, end = bounds
            if fault and kind == "other_range":
                start = min(size, start + fault.after)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if fault and kind == "shorter":
            end = max(start, end - fault.after)
        self.note.status = 206 if partial else 200
        self.send_response(self.note.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.with_body:
            self._send(file, start, end, fault)

    def _send(self, file: Path, start: int, end: int, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        limit = fault.after if fault and kind in ("drop", "stall") else None
        chunk = CHUNK
        if fault and kind == "slow":
            chunk = max(1, min(CHUNK, int(fault.rate / 10)))
        with file.open("rb") as stream:
            stream.seek(start)
            at = start
            while at < end:
                want = min(chunk, end - at)
                if limit is not None:
                    want = min(want, limit - self.note.sent)
                    if want <= 0:
                        if fault and kind == "stall":
                            self.server.hub.stopping.wait(fault.seconds)
                        self.close_connection = True
                        self.wfile.flush()
                        return
                block = stream.read(want)
                if not block:
                    self.close_connection = True
                    return
                if fault and kind == "corrupt" and at <= fault.after < at + len(block):
                    spoiled = bytearray(block)
                    spoiled[fault.after - at] ^= 0xFF
                    block = bytes(spoiled)
                self.wfile.write(block)
                self.note.sent += len(block)
                at += len(block)
                if fault and kind == "slow":
                    time.sleep(len(block) / fault.rate)
                if self.server.hub.stopping.is_set():
                    self.close_connection = True
                    return

    def _redirect(self, location: str, headers: dict[str, str]) -> None:
        self._text(302, "Found", {**headers, "Location": location})

    def _json(self, data: Any, headers: dict[str, str]) -> None:
        self._bytes(200, json.dumps(data).encode(), {**headers, "Content-Type": "application/json"})

    def _text(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, text.encode(), {"Content-Type": "text/plain", **(headers or {})})

    def _bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if hasattr(self, "note"):
            self.note.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _bounds(header: str, size: int) -> tuple[int, int] | None:
    """Return (start, end exclusive) of a single byte range, or None if it cannot be satisfied."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or (not match[1] and not match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start = int(match[1])
    end = min(size, int(match[2]) + 1) if match[2] else size
    return (start, end) if start < end else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve directories as a model hub, for tests and demos.")
    parser.add_argument("--repo", action="append", required=True, metavar="ORG/NAME=DIRECTORY")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cdn-port", type=int, default=0)
    parser.add_argument("--page-size", type=int, default=1000)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--certificate", nargs=2, metavar=("CERT", "KEY"))
    parser.add_argument("--fault", action="append", default=[], metavar="JSON")
    parser.add_argument("--ready-file", type=Path, help="receives the address once the server listens")
    options = parser.parse_args(arguments)
    token = options.token_file.read_text().strip() if options.token_file else None
    hub = Hub(
        host=options.host,
        port=options.port,
        cdn_port=options.cdn_port,
        token=token,
        page_size=options.page_size,
        certificate=tuple(options.certificate) if options.certificate else None,
    )
    for item in options.repo:
        name, _, directory = item.partition("=")
        if not directory or not Path(directory).is_dir():
            parser.error(f"--repo {item}: expected ORG/NAME=DIRECTORY of an existing directory")
        hub.add(name, directory)
    hub.fault(*[Fault(**json.loads(item)) for item in options.fault])
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with hub:
        print(hub.url, flush=True)
        if options.ready_file:
            partial = options.ready_file.with_suffix(".tmp")
            partial.write_text(hub.url + "\n")
            partial.replace(options.ready_file)
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
