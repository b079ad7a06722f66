# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The check of a served recitation, against a server on loopback that answers as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools.model.recitation import Server, ServerError, chat, check_case, compare, main

CASE = {"name": "short", "prompt": "a", "tokens": [5, 6, 1], "logprobs": [-0.1, -0.2, -0.3], "text": " b c"}


@pytest.mark.parametrize(
    ("tokens", "logprobs", "text", "reason"),
    [
        pytest.param([5, 6, 1], [-0.1, -0.2, -0.3], " b c", None, id="equal"),
        pytest.param([5, 6, 1], [-0.1, -0.25, -0.35], " b c", None, id="within"),
        pytest.param([5, 6, 1], [-0.1, -0.2, -0.41], " b c", "token 2 is -0.4100, expected -0.3000", id="beyond"),
        pytest.param([5, 6, 1], [-0.1, float("nan"), -0.3], " b c", "token 1 is nan", id="nan"),
        pytest.param([5, 7, 1], [-0.1, -0.2, -0.3], " b c", "token 1 differs", id="another-token"),
        pytest.param(
            [5, 6], [-0.1, -0.2], " b c", "token 2 differs from the reference of 3 tokens, 2 came", id="short"
        ),
        pytest.param([5, 6, 1, 1], [0.0] * 4, " b c", "token 3 differs", id="long"),
        pytest.param([], [], "", "token 0 differs", id="nothing"),
        pytest.param([5, 6, 1], [-0.1], " b c", "1 log-probabilities came, expected 3", id="too-few-values"),
        pytest.param([5, 6, 1], [-0.1, -0.2, -0.3], " b d", "the text differs", id="another-text"),
    ],
)
def test_compare(tokens: list[int], logprobs: list[float], text: str, reason: str | None) -> None:
    result = compare(CASE, tokens, logprobs, text, tolerance=0.1)
    assert result.ok == (reason is None)
    assert (reason or "") in (result.reason or "")


def test_compare_stops_at_the_first_wrong_token() -> None:
    result = compare(CASE, [5, 7, 1], [-0.1, -9.0, -9.0], " b c", tolerance=0.1)
    assert (result.wrong_at, result.max_difference) == (1, 0.0)


class Stub(ThreadingHTTPServer):
    """Answers every path with what is planned for it and keeps what was asked."""

    answers: dict[str, tuple[int, bytes]]
    asked: list[tuple[str, str | None, dict[str, Any]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        status, answer = self.server.answers[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub(("127.0.0.1", 0), Handler)
    server.answers, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def completion(**changes: Any) -> tuple[int, bytes]:
    """Return the answer of a right server, changed as told."""
    answer = {
        "content": CASE["text"],
        "tokens": CASE["tokens"],
        "completion_probabilities": [{"logprob": value} for value in CASE["logprobs"]],
        "timings": {"predicted_per_second": 7.17},
    }
    return 200, json.dumps(answer | changes).encode()


def chat_answer(content: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def test_the_question_is_greedy_and_asks_for_probabilities(stub: Stub) -> None:
    stub.answers["/completion"] = completion()
    result = check_case(Server(stub.url, api_key="secret"), CASE, 0.1)
    assert (result.ok, result.tokens_per_second) == (True, 7.17)
    path, key, body = stub.asked[0]
    assert (path, key, body["prompt"]) == ("/completion", "Bearer secret", "a")
    assert (body["temperature"], body["n_predict"], body["n_probs"]) == (0, 3, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param((401, b'{"error": "Invalid API Key"}'), "HTTP status 401: .*Invalid API Key", id="key"),
        pytest.param((200, b"<html>"), "/completion: ", id="no-json"),
        pytest.param((200, b"[]"), "expected a JSON object, found list", id="list"),
        pytest.param((200, b"{}"), "lacks or garbles 'tokens'", id="empty"),
        pytest.param(completion(completion_probabilities=[{}]), "lacks or garbles 'logprob'", id="no-logprob"),
        pytest.param(completion(completion_probabilities=None), "lacks or garbles", id="null"),
        pytest.param(completion(tokens=["x"]), "lacks or garbles", id="no-number"),
    ],
)
def test_an_unreadable_answer_is_told(stub: Stub, answer: tuple[int, bytes], message: str) -> None:
    stub.answers["/completion"] = answer
    with pytest.raises(ServerError, match=message):
        check_case(Server(stub.url), CASE, 0.1)


@pytest.mark.parametrize("content", [None, 3])
def test_a_chat_answer_without_text_is_told(stub: Stub, content: Any) -> None:
    stub.answers["/v1/chat/completions"] = chat_answer(content)
    with pytest.raises(ServerError, match=r"choices\[0\]\.message\.content is no string"):
        chat(Server(stub.url), {"messages": []})


@pytest.fixture
def reference_file(tmp_path: Path) -> Path:
    path = tmp_path / "reference.json"
    expected = {"request": {"messages": [], "max_tokens": 3}, "content": " b c"}
    path.write_text(json.dumps({"tolerance": 0.1, "cases": [CASE, {**CASE, "name": "other"}], "chat": expected}))
    return path


@pytest.mark.parametrize(
    ("content", "arguments", "code", "cases"),
    [
        pytest.param(" b c", [], 0, ["short", "other"], id="right"),
        pytest.param(" b d", [], 1, ["short", "other"], id="wrong-chat"),
        pytest.param(" b d", ["--no-chat"], 0, ["short", "other"], id="chat-left-out"),
        pytest.param(" b c", ["--case", "other"], 0, ["other"], id="one-case"),
    ],
)
def test_the_program_reports_one_line(
    stub: Stub,
    reference_file: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    arguments: list[str],
    code: int,
    cases: list[str],
) -> None:
    stub.answers = {"/completion": completion(), "/v1/chat/completions": chat_answer(content)}
    assert main([stub.url, "--reference", str(reference_file), *arguments]) == code
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    report = json.loads(output)
    assert report["ok"] == (code == 0)
    assert bool(report["reasons"]) == (code == 1)
    assert [case["case"] for case in report["cases"]] == cases
    assert report["max_difference"] == 0


def test_the_key_comes_from_its_file(stub: Stub, reference_file: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    stub.answers = {"/completion": completion(), "/v1/chat/completions": chat_answer(" b c")}
    assert main([stub.url, "--reference", str(reference_file), "--api-key-file", str(key)]) == 0
    assert {asked[1] for asked in stub.asked} == {"Bearer secret"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "file:///etc/hostname"])
def test_no_server_is_code_2(reference_file: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert main([url, "--reference", str(reference_file)]) == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert url in report["reasons"][0]


def test_an_unknown_case_names_those_there_are(reference_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["http://127.0.0.1:9", "--reference", str(reference_file), "--case", "shrot"])
    assert "'shrot' is not in the reference; its cases are short, other" in capsys.readouterr().err
