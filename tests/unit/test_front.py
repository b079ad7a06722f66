"""The front: keys as digests, HAProxy's statistics, what differs, and the configuration as it is rendered."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import socket
import threading
from pathlib import Path

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.cpullm.epyc.plugins.module_utils import _front as front
from ansible_collections.cpullm.epyc.plugins.modules import front as front_module
from ansible_collections.cpullm.epyc.plugins.modules import front_traffic
from hypothesis import given
from hypothesis import strategies as st

ROLE = Path(__file__).resolve().parents[2] / "roles" / "systemd_service"
STAT = (
    "# pxname,svname,qcur,qmax,scur,smax,status,\n"
    "llama-front,FRONTEND,,,4,9,OPEN,\n"
    "llama,i0,2,3,1,1,UP,\n"
    "llama,i100,0,0,0,0,MAINT,\n"
    "llama,none,0,0,3,9,no check,\n"
    "llama,BACKEND,1,3,4,9,UP,\n"
    "llama-look,i0,0,0,1,1,UP,\n"
)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        pytest.param("a\n", ["a"], id="one"),
        pytest.param("# note\n\n  a  \r\nb", ["a", "b"], id="comments-blanks-spaces"),
        pytest.param("sk-x#y\n", ["sk-x#y"], id="a-hash-within"),
    ],
)
def test_keys(text, keys):
    assert front.parse_keys(text) == keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "no key", id="empty"),
        pytest.param("# a\n", "no key", id="comment-only"),
        pytest.param("good\nsecret word\n", "line 2 ", id="space"),
        pytest.param("schlüssel\n", "line 1 ", id="not-ascii"),
    ],
)
def test_a_wrong_key_file_is_named_by_line_and_never_quoted(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        front.parse_keys(text)
    assert "secret" not in str(caught.value)
    assert "schl" not in str(caught.value)


@given(st.lists(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1))
def test_digests_are_all_that_is_left_of_keys(keys):
    lines = front.key_digests(keys).splitlines()
    assert lines == sorted({hashlib.sha256(key.encode()).hexdigest().upper() for key in keys})


def test_the_digest_tells_contents_apart():
    same = front.digest({"a": b"1", "b": b"2"})
    assert same == front.digest({"b": b"2", "a": b"1"})
    assert (
        len(
            {
                same,
                front.digest({"a": b"12", "b": b""}),
                front.digest({"a": b"1"}),
                front.digest({"a": b"1", "c": b"2"}),
            }
        )
        == 4
    )


def test_servers_of_a_backend():
    assert front.parse_servers(STAT, "llama") == [
        front.Server("i0", "UP", 1, 2),
        front.Server("i100", "MAINT", 0, 0),
        front.Server("none", "no check", 3, 0),
    ]


@pytest.mark.parametrize("text", ["", "Unknown command\n", "# pxname,svname\nllama,i0\n", "\0"])
def test_what_is_no_statistics(text):
    with pytest.raises(ValueError, match="expected the CSV of 'show stat'"):
        front.parse_servers(text, "llama")


@given(st.text())
def test_no_text_breaks_the_parser(text):
    try:
        front.parse_servers(text, "llama")
    except ValueError as error:
        assert "expected the CSV" in str(error)


def test_in_flight_counts_both_backends():
    assert front_traffic.in_flight(STAT, [0]) == 2
    assert front_traffic.in_flight(STAT, [100]) == 0
    with pytest.raises(ValueError, match="no server for instance 7; found i0, i100, none"):
        front_traffic.find(STAT, [0, 7])


GOOD = {
    "active_state": "active",
    "servers": [front.Server("i0", "UP", 0, 0), front.Server("i100", "MAINT", 0, 0)],
    "health": 200,
    "without_key": 401,
    "answer": 200,
    "certificate": True,
    "error": None,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({}, [], id="as-wanted"),
        pytest.param({"certificate": None}, [], id="no-tls"),
        pytest.param({"active_state": "failed"}, ["haproxy.service is failed, expected active"], id="stopped"),
        pytest.param({"servers": []}, ["the front has instance 0 as absent, expected UP"], id="no-server"),
        pytest.param(
            {"servers": [front.Server("i0", "DRAIN", 0, 0)]},
            ["the front has instance 0 as DRAIN, expected UP"],
            id="drained",
        ),
        pytest.param({"without_key": 200}, ["a request without a key answers 200, expected 401"], id="open"),
        pytest.param(
            {"health": 0, "answer": 0, "error": "refused"},
            [
                "GET /health of the front answers refused, expected 200",
                "a completion through the front answers refused, expected 200",
            ],
            id="silent",
        ),
        pytest.param(
            {"certificate": False},
            ["the front presents another certificate than the file has, expected that one"],
            id="other-certificate",
        ),
    ],
)
def test_deviations(change, said):
    assert front.deviations({**GOOD, **change}, {"instances": [0], "key_needed": True}) == said


@pytest.mark.parametrize(
    ("on_disk", "found", "action"),
    [
        pytest.param(("c", "u"), ("c", "u"), "nothing", id="right"),
        pytest.param((None, ""), (None, None), "restart", id="first-time"),
        pytest.param(("b", "u"), ("b", "u"), "reload", id="other-configuration"),
        pytest.param(("c", "u"), ("b", "u"), "reload", id="died-before-the-reload"),
        pytest.param(("c", "t"), ("c", "t"), "restart", id="other-drop-in"),
        pytest.param(("c", "u"), (None, None), "restart", id="not-running"),
        pytest.param((None, "u"), ("c", "u"), "write", id="removed-by-hand"),
    ],
)
def test_what_haproxy_needs(on_disk, found, action):
    assert front_module.plan(("c", "u"), on_disk, found) == action


def test_the_unit_tells_the_front_that_an_instance_is_down(tmp_path):
    spec = importlib.util.spec_from_file_location("llama_front", ROLE / "files" / "llama_front.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.SOCKET = str(tmp_path / "admin.sock")
    script.down(3)  # nobody listens: nothing to tell, and no error
    heard = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(script.SOCKET)
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(100))
                connection.sendall(b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        script.down(3)
        thread.join(10)
    assert heard == [b"set server llama/i3 health down\n"]


def render(**variables) -> str:
    """Return haproxy.cfg of two instances, with the role's own variables as far as the template needs them."""
    entries = [{"instance": n, "port": 18008 + n} for n in (0, 1)]
    beside = [{"instance": n + 100, "port": 18108 + n} for n in (0, 1)]
    values = {
        "ansible_managed": "managed",
        "__systemd_service_front_entries": entries,
        "__systemd_service_front_beside": json.dumps(beside),
        "__systemd_service_front_socket": "/run/haproxy/admin.sock",
        "__systemd_service_front_address": "127.0.0.1",
        "__systemd_service_slots": 2,
        "__systemd_service_key": False,
        "__systemd_service_tls": False,
        "systemd_service_port": 8008,
        "systemd_service_connections": 512,
        "systemd_service_client_timeout_s": 7200,
        **variables,
    }
    from ansible.template import trust_as_template

    text = (ROLE / "templates/etc/haproxy/llama/haproxy.cfg.j2").read_text(encoding="utf-8")
    return Templar(DataLoader(), values).template(trust_as_template(text))


@pytest.mark.parametrize(
    ("variables", "present", "absent"),
    [
        pytest.param({}, ["bind 127.0.0.1:8008\n"], ["known", " ssl "], id="loopback"),
        pytest.param(
            {"__systemd_service_key": True, "__systemd_service_tls": True, "__systemd_service_front_address": "[::]"},
            ["bind [::]:8008 ssl crt tls.pem alpn http/1.1\n", "-m str -f keys", "return status 401"],
            [],
            id="key-and-tls",
        ),
        pytest.param({"__systemd_service_slots": 4}, ["i0 127.0.0.1:18008 maxconn 4\n"], [], id="slots"),
    ],
)
def test_the_configuration(variables, present, absent):
    text = render(**variables)
    assert [part for part in present if part not in text] == []
    assert [part for part in absent if part in text] == []
    assert "server i1 127.0.0.1:18009 maxconn" in text
    # Nothing goes to a build beside before its answer was right.
    assert [line.split()[1] for line in text.splitlines() if line.endswith(" disabled")] == ["i100", "i101"]
    # An answer at the first rule that fits: health before keys, keys before everything else.
    rules = [
        line.strip() for line in text.splitlines() if line.strip().startswith(("http-request return", "use_backend"))
    ]
    assert [rule for rule in rules if "if health" in rule] == rules[:2]


@pytest.mark.parametrize("part", ["%r ", "%HU", "%HQ", "%hr", "%hs", "capture", "option httplog"])
def test_no_log_holds_queries_headers_or_bodies(part):
    assert part not in render(__systemd_service_key=True)
