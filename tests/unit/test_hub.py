# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _hub, _manifest
from ansible_collections.cpullm.epyc.plugins.module_utils._hub import HubError
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import HubSource, Manifest

from tests.support import gguf_file, hub
from tests.support.hub import Fault
from tests.unit.test_gguf import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "repo"
    (directory / "Q8_0").mkdir(parents=True)
    gguf_file.write_model(directory / "Q8_0", "tiny", TINY.pairs(), TINY.tensors(), 3)
    gguf_file.write_model(directory, "other", TINY.pairs(), TINY.tensors(), 1)
    (directory / "README.md").write_text("a model\n")
    return directory


@pytest.fixture
def server(folder: Path) -> Iterator[hub.Hub]:
    with hub.Hub(page_size=2) as running:
        running.add("org/name", folder)
        yield running


def quiet(file: str, done: int, total: int) -> None:
    """Nobody looks."""


def client(server: hub.Hub, pauses: list[float] | None = None, **options: Any) -> _hub.Hub:
    sleep = (lambda seconds: None) if pauses is None else pauses.append
    return _hub.Hub(server.url, sleep=sleep, **{"timeout_s": 5.0, **options})


def resolve(server: hub.Hub, asked: _hub.Hub | None = None, pattern: str | None = "Q8_0/*") -> Manifest:
    return _hub.manifest_of_repo(asked or client(server), "org/name", "main", name=None, pattern=pattern, told=quiet)


def test_a_repository_gives_the_manifest_that_its_files_give(server: hub.Hub, folder: Path) -> None:
    manifest = resolve(server)
    local = _manifest.manifest_of_directory(str(folder / "Q8_0"), None, None, quiet)
    commit = server.repo("org/name").commit  # type: ignore[union-attr]
    assert manifest.source == HubSource(server.url, "org/name", commit, "Q8_0/")
    assert (manifest.name, manifest.shards, manifest.model) == (local.name, local.shards, local.model)


def test_only_headers_are_read(tmp_path: Path) -> None:
    big = dataclasses.replace(TINY, vocabulary=400_000)
    gguf_file.write_model(tmp_path, "big", big.pairs(), big.tensors(), 2)
    with hub.Hub() as server:
        server.add("org/name", tmp_path)
        manifest = resolve(server, pattern=None)
        sent = sum(request.sent for request in server.requests)
    assert manifest.bytes > 100 << 20
    assert sent <= 2 * (256 << 10)


def test_a_header_larger_than_the_first_range(tmp_path: Path) -> None:
    pairs = [*TINY.pairs(), ("tokenizer.ggml.tokens", "[STRING]", [f"{number:060d}" for number in range(30000)])]
    gguf_file.write_model(tmp_path, "wide", pairs, TINY.tensors(), 1)
    with hub.Hub() as server:
        server.add("org/name", tmp_path)
        resolve(server, pattern=None)
        ranges = [request.range for request in server.requests if request.path.startswith("/cdn/")]
    assert 3 <= len(ranges) <= 6


@pytest.mark.parametrize(
    ("fault", "pauses"),
    [
        pytest.param(Fault("status", match="tree", status=503), [0.5], id="503"),
        pytest.param(Fault("status", match="revision", status=429, retry_after="7"), [7.0], id="429-retry-after"),
        pytest.param(
            Fault("status", match="tree", status=429, retry_after="999999"), [120.0], id="long-wait-is-bounded"
        ),
        pytest.param(Fault("status", match="cdn", status=502, times=3), [0.5, 1.0, 2.0], id="three-times"),
        pytest.param(Fault("drop", match="00002-of", after=100), [0.5], id="dropped"),
        pytest.param(Fault("shorter", match="00002-of", after=100), [0.5], id="short-answer"),
        pytest.param(Fault("stall", match="00003-of", after=10, seconds=3), [0.5], id="stalled"),
    ],
)
def test_passing_faults_are_ridden_out(fault: Fault, pauses: list[float], server: hub.Hub) -> None:
    server.fault(fault)
    waited: list[float] = []
    resolve(server, client(server, waited, timeout_s=1.0))
    assert waited == pauses


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(Fault("status", match="tree", times=None), "HTTP 503 .*, after 5 attempts", id="always-busy"),
        pytest.param(Fault("status", match="tree", status=403), "HTTP 403 .* give a token", id="gated"),
        pytest.param(Fault("status", match="tree", status=404), "HTTP 404", id="gone"),
        pytest.param(Fault("loop", match="resolve", times=None), "infinite loop", id="redirect-loop"),
        pytest.param(
            Fault("other_range", match="00002-of", after=1), "asked for bytes from 0, found", id="other-range"
        ),
        pytest.param(Fault("drop", match="00001-of", after=1, times=None), "after 5 attempts", id="always-dropped"),
    ],
)
def test_lasting_faults_end_with_the_address(fault: Fault, message: str, server: hub.Hub) -> None:
    server.fault(fault)
    with pytest.raises(HubError, match=message) as caught:
        resolve(server)
    assert "127.0.0.1" in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_what_a_hub_says_comes_without_control_characters(folder: Path) -> None:
    (folder / "Q8_0" / "x\x1b[2J.gguf").write_bytes(b"GGUF")
    with hub.Hub() as server:
        server.add("org/name", folder)
        with pytest.raises(ValueError, match="narrow the pattern: Q8_0/tiny, Q8_0/x") as caught:
            resolve(server)
        assert r"x?[2J" in str(caught.value)
    assert str(HubError("HTTP 503 \x1b[2J\nbusy")) == "HTTP 503 ?[2J?busy"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param('200 OK\r\nLink: <http://[>; rel="next"', "the next page has no address: 'http://\\['", id="page"),
        pytest.param("302 Found\r\nLocation: http://[/", "Invalid IPv6 URL, after 1 attempts", id="redirect"),
    ],
)
def test_what_is_no_address(answer: str, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _peer = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 2\r\n\r\n[]".encode())

        server = threading.Thread(target=serve)
        server.start()
        asked = _hub.Hub(f"http://127.0.0.1:{listener.getsockname()[1]}", attempts=1)
        with pytest.raises(HubError, match=message):
            asked.files("org/name", "ab" * 20)
        server.join()


def test_wrong_bytes_in_the_header_are_named(server: hub.Hub) -> None:
    server.fault(Fault("corrupt", match="00002-of", after=2, times=None))
    with pytest.raises(ValueError, match=r"Q8_0/tiny-00002-of-00003.gguf: offset 0: this is no GGUF file"):
        resolve(server)


def test_a_server_without_ranges_serves_small_headers_only(server: hub.Hub) -> None:
    server.fault(Fault("no_range", times=None))
    assert resolve(server).name == "tiny"


def test_a_tree_without_end_is_left(server: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub, "MAX_FILES", 3)
    with pytest.raises(HubError, match="the tree has more than 3 files"):
        resolve(server)


def test_unknown_repository_and_revision(server: hub.Hub) -> None:
    with pytest.raises(HubError, match="HTTP 404"):
        client(server).commit("org/none", "main")
    with pytest.raises(HubError, match="HTTP 404"):
        client(server).commit("org/name", "refs/pr/1")


def test_more_than_one_model_is_no_choice(server: hub.Hub) -> None:
    with pytest.raises(ValueError, match="found 2 models, expected one; narrow the pattern: Q8_0/tiny, other"):
        resolve(server, pattern=None)


def test_the_token_reaches_the_hub_and_nobody_else(folder: Path) -> None:
    with hub.Hub(token="hf_secret") as server:
        server.add("org/name", folder)
        with pytest.raises(HubError, match="give a token"):
            resolve(server)
        with pytest.raises(HubError, match="check the token's access") as caught:
            resolve(server, client(server, token="hf_wrong"))
        assert "hf_wrong" not in str(caught.value)
        resolve(server, client(server, token="hf_secret"))
        seen = {(request.path.startswith("/cdn/"), request.authorized) for request in server.requests[2:]}
    assert seen == {(False, True), (True, False)}


def test_a_token_is_not_sent_in_clear_text() -> None:
    with pytest.raises(HubError, match="expected https: a token is not sent in clear text"):
        _hub.Hub("http://hub.example", token="hf_secret")


@pytest.mark.parametrize("token", ["a b", "a\nX-Injected: 1", ""])
def test_a_token_of_several_lines_is_refused(token: str) -> None:
    with pytest.raises(HubError, match="one line of printable characters"):
        _hub.Hub("https://hub.example", token=token)


@pytest.mark.parametrize("endpoint", ["ftp://hub.example", "hub.example", "file:///etc", "https://"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(HubError, match="expected an http or https address"):
        _hub.Hub(endpoint)


def test_an_unknown_certificate_is_refused(tmp_path: Path, folder: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
        ).split(),
        check=True,
        capture_output=True,
    )
    with hub.Hub(certificate=(str(certificate), str(key))) as server:
        server.add("org/name", folder)
        with pytest.raises(HubError, match="the certificate could not be verified"):
            resolve(server)


def test_nobody_listens() -> None:
    with pytest.raises(HubError, match=r"refused.*after 2 attempts"):
        _hub.Hub("http://127.0.0.1:9", attempts=2, sleep=lambda seconds: None).commit("org/name", "main")


@pytest.mark.parametrize(
    ("link", "following"),
    [
        (None, None),
        ("", None),
        ('<https://x/a?cursor=1>; rel="next"', "https://x/a?cursor=1"),
        ("</b?c=2>; rel=next", "/b?c=2"),
        ('<https://x/0>; rel="first", <https://x/2>; rel="next"', "https://x/2"),
        ('<https://x/0>; rel="prev"', None),
        ("<<<;rel=next", None),
    ],
)
def test_next_page(link: str | None, following: str | None) -> None:
    assert _hub.next_page(link) == following
