#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the front of a host with what is wanted of it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: front_info
short_description: Compare the front of a host with what is wanted of it
version_added: "1.0.0"
description:
  - Asks HAProxy's runtime socket for the state of each instance, and the front itself for its health, for a completion
    of one token, and for a refusal without a key.
  - It changes nothing.
options:
  instances:
    description: Numbers of the instances that must be ready behind it.
    type: list
    elements: int
    required: true
  address:
    description: Where the front listens, as seen on the host, such as C(http://127.0.0.1:8008).
    type: str
    required: true
  keys_file:
    description: File on the host with one key a line. A request without one must then be refused.
    type: path
  certificate_file:
    description: Certificate on the host that the front must present.
    type: path
  timeout_s:
    description: Seconds that the completion may take. It may wait for others.
    type: int
    default: 600
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Returns details on what has changed.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Compare the front
  cpullm.epyc.front_info:
    instances: [0]
    address: http://127.0.0.1:8008
  register: front
  failed_when: front.deviations | length > 0
"""

RETURN = r"""
deviations:
  description: Each difference, in words.
  type: list
  elements: str
  returned: always
servers:
  description: The servers behind it.
  type: list
  elements: dict
  returned: always
  contains:
    name:
      description: Name in the configuration, C(i) and the instance's number.
      type: str
    status:
      description: State in HAProxy's words.
      type: str
    current:
      description: Requests that it works on.
      type: int
    queued:
      description: Requests that wait for it.
      type: int
"""

import http.client
import json
import ssl
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._front import ask, deviations, parse_keys, parse_servers

SOCKET = "/run/haproxy/admin.sock"
ONE_TOKEN = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1, "temperature": 0}


class Client:
    """Asks the front. Its certificate is compared with the file's, not with a name: the address is the host's own."""

    def __init__(self, address: str, certificate_file: str | None, timeout_s: float) -> None:
        """Keep where to ask."""
        self.parts = urlsplit(address)
        self.timeout_s = timeout_s
        self.certificate: bool | None = None
        self.wanted = None
        if certificate_file:
            text = Path(certificate_file).read_text(encoding="ascii")
            end = text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
            self.wanted = ssl.PEM_cert_to_DER_cert(text[text.index(ssl.PEM_HEADER) : end])

    def status(self, path: str, payload: dict[str, Any] | None = None, key: str | None = None) -> int:
        """Return the HTTP status of one request."""
        host, port = self.parts.hostname or "", self.parts.port
        connection: http.client.HTTPConnection
        if self.wanted is not None:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            secure = http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=context)
            secure.connect()
            self.certificate = secure.sock.getpeercert(binary_form=True) == self.wanted
            connection = secure
            if not self.certificate:
                secure.close()
                return 0  # no key for whoever that is
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            body = json.dumps(payload) if payload else None
            connection.request("POST" if payload else "GET", path, body=body, headers=headers)
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        return answer.status


def observe(module: AnsibleModule, key: str | None) -> dict[str, Any]:
    """Return the front as found."""
    options = module.params
    found: dict[str, Any] = {
        "active_state": "unknown",
        "servers": [],
        "health": 0,
        "without_key": 0,
        "answer": 0,
        "certificate": None,
        "error": None,
    }
    code, out, err = module.run_command(["systemctl", "show", "--property=ActiveState", "--value", "haproxy.service"])
    if code != 0:
        module.fail_json(msg=f"systemctl show haproxy.service failed with {code}: {err.strip()}")
    found["active_state"] = out.strip()
    try:
        found["servers"] = parse_servers(ask(SOCKET, "show stat"), "llama")
        client = Client(options["address"], options["certificate_file"], options["timeout_s"])
        found["health"] = client.status("/health")
        found["certificate"] = client.certificate
        if key is not None:
            found["without_key"] = client.status("/v1/chat/completions", ONE_TOKEN)
        found["answer"] = client.status("/v1/chat/completions", ONE_TOKEN, key)
    except (OSError, ValueError, http.client.HTTPException) as error:
        found["error"] = str(error)
    return found


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "int", "required": True},
            "address": {"type": "str", "required": True},
            "keys_file": {"type": "path", "no_log": False},
            "certificate_file": {"type": "path"},
            "timeout_s": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    options = module.params
    key = None
    if options["keys_file"]:
        try:
            key = parse_keys(Path(options["keys_file"]).read_text(encoding="utf-8"))[0]
        except (OSError, ValueError) as error:
            module.fail_json(msg=f"keys_file {options['keys_file']}: {error}")
        module.no_log_values.add(key)
    found = observe(module, key)
    differences = deviations(found, {"instances": options["instances"], "key_needed": key is not None})
    module.exit_json(changed=False, deviations=differences, servers=[asdict(server) for server in found["servers"]])


if __name__ == "__main__":
    main()
