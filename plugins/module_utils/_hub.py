# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of a model hub's interface: revision, tree, and ranges of files; TLS verified, token kept to the hub.

The interface as huggingface_hub uses it: GET /api/models/{repo}/revision/{revision} gives the commit,
GET /api/models/{repo}/tree/{commit}?recursive=true gives pages of files chained by Link headers, and
GET /{repo}/resolve/{commit}/{path} redirects to where the bytes are.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import IO, Any

from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import Header, read_header
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import (
    Candidate,
    HubSource,
    Manifest,
    Shard,
    build_manifest,
    check_prefix,
    choose_shards,
)
from ansible_collections.cpullm.epyc.plugins.module_utils._text import printable

MAX_ANSWER_BYTES = 64 << 20
MAX_PAGES = 1000
# Of a repository; each is kept until the last page came.
MAX_FILES = 100_000
MAX_WAIT_S = 120.0
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")


class HubError(Exception):
    """The hub could not be asked, or did not answer as a hub does; shown without control characters."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 2000))


def _origin(address: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.netloc


def _plain(address: str) -> str:
    """Return the address without its query, which may hold a signature."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token goes along only within the hub, and TLS is never left."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is None:
            return None
        if req.type == "https" and following.type != "https":
            raise urllib.error.HTTPError(_plain(newurl), code, "refused a redirect away from TLS", headers, fp)
        token = req.unredirected_hdrs.get("Authorization")
        if token is not None and _origin(req.full_url) == _origin(following.full_url):
            following.add_unredirected_header("Authorization", token)
        # urllib reads what a redirect says beside to its end, in one piece, however long it is said to be.
        fp.close()
        return following


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, or None; its date form is rare and treated as absent."""
    match = re.fullmatch(r"[ \t]*([0-9]{1,6})[ \t]*", value or "")
    return float(match[1]) if match else None


class Hub:
    """One hub; each request is tried again after a passing fault, with growing pauses."""

    def __init__(
        self,
        endpoint: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        attempts: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        scheme, place = _origin(self.endpoint)
        if scheme not in ("http", "https") or not place:
            raise HubError(f"endpoint: found {endpoint!r}, expected an http or https address")
        if token is not None and scheme == "http" and not _LOOPBACK.fullmatch(place):
            raise HubError(f"endpoint: found {endpoint!r}, expected https: a token is not sent in clear text")
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise HubError("token: expected one line of printable characters")
        self._token = token
        self._timeout_s = timeout_s
        self._attempts = max(1, attempts)
        self._sleep = sleep
        self._opener = urllib.request.build_opener(_Redirects())

    def _once(
        self, address: str, headers: dict[str, str], read: Callable[[http.client.HTTPResponse], bytes]
    ) -> tuple[bytes, http.client.HTTPMessage]:
        request = urllib.request.Request(address, headers={"User-Agent": "cpullm.epyc", **headers})  # noqa: S310 - scheme checked
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        with self._opener.open(request, timeout=self._timeout_s) as response:
            return read(response), response.headers

    def get(
        self, address: str, headers: dict[str, str], read: Callable[[http.client.HTTPResponse], bytes]
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """Return what ``read`` makes of the answer, and the answer's headers; raises HubError when all tries failed."""
        shown = _plain(address)
        problem = ""
        for attempt in range(1, self._attempts + 1):
            pause: float | None = None
            try:
                return self._once(address, headers, read)
            except urllib.error.HTTPError as error:
                # Its answer may be closed already.
                with contextlib.closing(error):
                    problem = f"HTTP {error.code} {error.reason}"
                    pause = _retry_after(error.headers.get("Retry-After"))
                    if error.code in (401, 403):
                        way = "check the token's access" if self._token else "give a token, or accept the model's terms"
                        raise HubError(f"{shown}: {problem}: {way}") from None
                    if error.code not in _BUSY:
                        raise HubError(f"{shown}: {problem}") from None
            except urllib.error.URLError as error:
                problem = str(error.reason)
                if "CERTIFICATE_VERIFY_FAILED" in problem:
                    raise HubError(f"{shown}: the certificate could not be verified: {problem}") from None
            # A redirect to what is no address ends in a ValueError of urllib's.
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = str(error) or type(error).__name__
            if attempt < self._attempts:
                self._sleep(min(MAX_WAIT_S, pause if pause is not None else 0.5 * 2 ** (attempt - 1)))
        raise HubError(f"{shown}: {problem}, after {self._attempts} attempts")

    def _json(self, address: str) -> tuple[Any, http.client.HTTPMessage]:
        def read(response: http.client.HTTPResponse) -> bytes:
            data = response.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                raise HubError(f"{_plain(address)}: the answer has more than {MAX_ANSWER_BYTES} bytes")
            return data

        data, headers = self.get(address, {"Accept": "application/json"}, read)
        try:
            return json.loads(data), headers
        except (ValueError, RecursionError):
            raise HubError(f"{_plain(address)}: the answer is no JSON: {data[:60]!r}") from None

    def commit(self, repo: str, revision: str) -> str:
        """Return the commit that a branch, tag or commit names."""
        name = urllib.parse.quote(revision, safe="")
        address = f"{self.endpoint}/api/models/{urllib.parse.quote(repo)}/revision/{name}"
        data, _dummy = self._json(address)
        sha = data.get("sha") if isinstance(data, dict) else None
        if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{40}", sha):
            raise HubError(f"{_plain(address)}: found {sha!r:.80} as the commit, expected 40 hexadecimal digits")
        return sha

    def files(self, repo: str, commit: str) -> list[Candidate]:
        """Return all files at a commit, with the sha256 of those that the hub keeps as large files."""
        base = f"{self.endpoint}/api/models/{urllib.parse.quote(repo)}/tree/{commit}"
        address = f"{base}?recursive=true"
        seen: set[str] = set()
        found: list[Candidate] = []
        for _dummy in range(MAX_PAGES):
            if address in seen:
                raise HubError(f"{_plain(address)}: the pages of the tree form a loop")
            seen.add(address)
            rows, headers = self._json(address)
            if not isinstance(rows, list):
                raise HubError(f"{_plain(address)}: found {type(rows).__name__}, expected a list of files")
            entries = [row for row in rows if isinstance(row, dict) and row.get("type") == "file"]
            found.extend(_candidate(row, _plain(address)) for row in entries)
            if len(found) > MAX_FILES:
                raise HubError(f"{base}: the tree has more than {MAX_FILES} files")
            following = next_page(headers.get("Link"))
            if following is None:
                return found
            try:
                following = urllib.parse.urljoin(address, following)
                elsewhere = _origin(following) != _origin(self.endpoint)
            except ValueError:
                raise HubError(f"{_plain(address)}: the next page has no address: {following!r:.80}") from None
            if elsewhere:
                raise HubError(f"{_plain(address)}: the next page is on another host, {_plain(following)}")
            address = following
        raise HubError(f"{base}: the tree has more than {MAX_PAGES} pages")

    def source(self, repo: str, commit: str, file: Candidate) -> RangeSource:
        """Return a source of ranges of one file."""
        path = urllib.parse.quote(file.path)
        return RangeSource(self, f"{self.endpoint}/{urllib.parse.quote(repo)}/resolve/{commit}/{path}", file.bytes)


def _candidate(row: dict[str, Any], shown: str) -> Candidate:
    path, size, large = row.get("path"), row.get("size"), row.get("lfs")
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise HubError(f"{shown}: found {row!r:.120}, expected a file with path and size")
    digest = large.get("oid") if isinstance(large, dict) else None
    if isinstance(large, dict) and large.get("size", size) != size:
        raise HubError(f"{shown}: {path!r} has two sizes, {size} and {large.get('size')!r}")
    if isinstance(digest, str):
        digest = digest.rpartition(":")[2]
    return Candidate(path, size, digest if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else None)


def next_page(link: str | None) -> str | None:
    """Return the address that a Link header calls the next one, or None."""
    for part in re.split(r",\s*(?=<)", link or ""):
        match = re.match(r"\s*<([^>]*)>(.*)", part)
        if match and re.search(r";\s*rel\s*=\s*\"?next\"?", match[2]):
            return match[1]
    return None


class RangeSource:
    """A remote file that is read by Range requests."""

    def __init__(self, hub: Hub, address: str, size: int) -> None:
        self._hub = hub
        self._address = address
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly these bytes; a short answer is asked for again, a wrong one is an error."""

        def body(response: http.client.HTTPResponse) -> bytes:
            if response.status == 206:
                self._check_range(response.headers.get("Content-Range"), offset)
            elif response.status != 200 or offset:
                raise HubError(f"{_plain(self._address)}: the server does not answer Range requests")
            data = response.read(length)
            if len(data) < length:
                raise http.client.IncompleteRead(data, length - len(data))
            return data

        data, _dummy = self._hub.get(self._address, {"Range": f"bytes={offset}-{offset + length - 1}"}, body)
        return data

    def _check_range(self, header: str | None, offset: int) -> None:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header or "")
        if match is None or int(match[1]) != offset:
            raise HubError(f"{_plain(self._address)}: asked for bytes from {offset}, found the range {header!r}")
        if match[3] != "*" and int(match[3]) != self.size:
            raise HubError(f"{_plain(self._address)}: the file has {match[3]} bytes, the tree says {self.size}")


def manifest_of_repo(
    hub: Hub,
    repo: str,
    revision: str,
    *,
    name: str | None,
    pattern: str | None,
    told: Callable[[str, int, int], None],
) -> Manifest:
    """Return the manifest of the model in a repository; reads headers only.

    ``told`` receives the file whose header is read, the number of headers read and their number in all.
    """
    commit = hub.commit(repo, revision)
    stem, prefix, files = choose_shards(hub.files(repo, commit), pattern)
    shards: list[tuple[Shard, Header]] = []
    for index, file in enumerate(files):
        told(file.path, index, len(files))
        if file.sha256 is None:
            raise ValueError(f"{printable(file.path)}: the hub states no sha256 for it")
        try:
            header = read_header(hub.source(repo, commit, file))
        except ValueError as error:
            raise ValueError(f"{printable(file.path)}: {error}") from None
        shards.append((Shard(file.path[len(prefix) :], file.bytes, file.sha256), header))
    told(files[-1].path, len(files), len(files))
    return build_manifest(name or stem, HubSource(hub.endpoint, repo, commit, check_prefix(prefix)), shards)
