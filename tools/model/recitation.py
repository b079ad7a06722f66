# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask a running llama-server to recite, and compare its answer and log-probabilities with the reference.

Needs nothing but Python. Prints one JSON object; the exit code is 0 when everything agrees, 1 when an answer
differs, 2 when the server could not be asked.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "models" / "recite" / "reference.json"


class ServerError(Exception):
    """The server could not be asked, or its answer cannot be read."""


@dataclass(frozen=True)
class Server:
    """Where a llama-server answers; `url` without a path."""

    url: str
    api_key: str | None = None
    ca_file: str | None = None
    timeout_s: float = 600.0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object that the server answers with; ServerError says what came instead."""
        url = self.url.rstrip("/") + path
        if not url.startswith(("http://", "https://")):
            raise ServerError(f"{url}: expected an address that begins with http:// or https://")
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 (checked above)
        context = ssl.create_default_context(cafile=self.ca_file) if url.startswith("https:") else None
        # A proxy from the environment must not come between a check and the address it was given.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=self.timeout_s) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace").strip()
            raise ServerError(f"{url}: HTTP status {error.code}: {text}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{url}: {error}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{url}: expected a JSON object, found {type(found).__name__}")
        return found


@dataclass(frozen=True)
class Result:
    """How one case of the reference went; `wrong_at` is the first token that differs, None when none does."""

    case: str
    ok: bool
    tokens: int
    expected_tokens: int
    wrong_at: int | None
    max_difference: float | None
    mean_difference: float | None
    max_difference_at: int | None
    tolerance: float
    tokens_per_second: float | None
    reason: str | None


def compare(
    case: dict[str, Any],
    tokens: list[int],
    logprobs: list[float],
    text: str,
    tolerance: float,
    rate: float | None = None,
) -> Result:
    """Return how an answer compares with a case of the reference.

    Log-probabilities are compared up to and with the last token that agrees, since what follows a wrong token
    answers another question. A value that is no number counts as a difference of infinity.
    """
    wanted, wanted_logprobs = case["tokens"], case["logprobs"]
    same = 0
    while same < min(len(tokens), len(wanted)) and tokens[same] == wanted[same]:
        same += 1
    differences = [abs(a - b) for a, b in zip(logprobs[:same], wanted_logprobs)]
    differences = [float("inf") if math.isnan(d) else d for d in differences]
    worst = max(differences, default=None)
    wrong_at = None if same == len(wanted) == len(tokens) else same
    reason = None
    if wrong_at is not None:
        reason = f"{case['name']}: token {same} differs from the reference of {len(wanted)} tokens, {len(tokens)} came"
    elif text != case["text"]:
        reason = f"{case['name']}: the tokens agree but the text differs"
    elif len(logprobs) < len(wanted) or worst is None:
        reason = f"{case['name']}: {len(logprobs)} log-probabilities came, expected {len(wanted)}"
    elif worst > tolerance:
        at = differences.index(worst)
        reason = (
            f"{case['name']}: the log-probability of token {at} is {logprobs[at]:.4f}, expected"
            f" {wanted_logprobs[at]:.4f} within {tolerance}"
        )
    return Result(
        case=case["name"],
        ok=reason is None,
        tokens=len(tokens),
        expected_tokens=len(wanted),
        wrong_at=wrong_at,
        max_difference=worst,
        mean_difference=sum(differences) / len(differences) if differences else None,
        max_difference_at=None if worst is None else differences.index(worst),
        tolerance=tolerance,
        tokens_per_second=rate,
        reason=reason,
    )


def check_case(server: Server, case: dict[str, Any], tolerance: float) -> Result:
    """Ask for a greedy completion of a case's prompt and compare it with the reference."""
    answer = server.post(
        "/completion",
        {
            "prompt": case["prompt"],
            "n_predict": len(case["tokens"]),
            "temperature": 0,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": False,
        },
    )
    try:
        tokens = [int(token) for token in answer["tokens"]]
        logprobs = [float("nan" if p["logprob"] is None else p["logprob"]) for p in answer["completion_probabilities"]]
        text = str(answer["content"])
        rate = answer.get("timings", {}).get("predicted_per_second")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{server.url}/completion: the answer lacks or garbles {error}") from error
    return compare(case, tokens, logprobs, text, tolerance, rate)


def chat(server: Server, request: dict[str, Any]) -> tuple[str, float | None]:
    """Return the content of one chat completion and its tokens per second."""
    answer = server.post("/v1/chat/completions", request)
    try:
        content = answer["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("choices[0].message.content is no string")
        return content, answer.get("timings", {}).get("predicted_per_second")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(f"{server.url}/v1/chat/completions: the answer lacks or garbles {error}") from error


def check(
    server: Server, reference: dict[str, Any], cases: list[str], with_chat: bool, tolerance: float
) -> dict[str, Any]:
    """Return the report of the named cases, and of the chat request when asked for."""
    started = time.monotonic()
    results = [check_case(server, case, tolerance) for case in reference["cases"] if case["name"] in cases]
    report: dict[str, Any] = {"url": server.url, "cases": [asdict(result) for result in results]}
    reasons = [result.reason for result in results if result.reason]
    if with_chat:
        content, rate = chat(server, reference["chat"]["request"])
        agrees = content == reference["chat"]["content"]
        report["chat"] = {"ok": agrees, "content": content, "tokens_per_second": rate}
        if not agrees:
            reasons.append(f"chat: the answer is {content!r}, expected {reference['chat']['content']!r}")
    worst = [result.max_difference for result in results if result.max_difference is not None]
    report["max_difference"] = max(worst, default=None)
    report["seconds"] = round(time.monotonic() - started, 3)
    report["ok"] = not reasons
    report["reasons"] = reasons
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="where the server answers, http://127.0.0.1:8008 for one")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--case", action="append", help="a case of the reference; may be repeated; default: all")
    parser.add_argument("--no-chat", action="store_true", help="leave the chat completion out")
    parser.add_argument("--tolerance", type=float, help="of a log-probability; default: the reference's")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--ca-file", help="certificate to trust, for https")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait for one answer")
    chosen = parser.parse_args(arguments)
    try:
        reference = json.loads(chosen.reference.read_text(encoding="utf-8"))
        key = chosen.api_key_file.read_text(encoding="utf-8").split()[0] if chosen.api_key_file else None
    except (OSError, ValueError, IndexError) as error:
        parser.error(f"{chosen.reference}, {chosen.api_key_file}: {error}")
    names = [case["name"] for case in reference["cases"]]
    unknown = [name for name in chosen.case or [] if name not in names]
    if unknown:
        parser.error(f"--case: {unknown[0]!r} is not in the reference; its cases are {', '.join(names)}")
    tolerance = reference["tolerance"] if chosen.tolerance is None else chosen.tolerance
    server = Server(chosen.url, key, chosen.ca_file, chosen.timeout_s)
    try:
        report = check(server, reference, chosen.case or names, not chosen.no_chat, tolerance)
    except ServerError as error:
        print(json.dumps({"ok": False, "url": chosen.url, "reasons": [str(error)]}))
        return 2
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
