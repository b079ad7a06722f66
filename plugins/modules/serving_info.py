#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare running llama-server instances with what was planned for them."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: serving_info
short_description: Compare running llama-server instances with their plan
version_added: "1.0.0"
description:
  - Reads the state, the huge pages and the NUMA nodes of each C(llama-server@) instance of this host, asks it for its
    health and for one chat completion, and says where that differs from the plan.
  - It changes nothing. It needs root to read C(/proc/PID/numa_maps) of the service's user.
options:
  instances:
    description:
      - The instances to look at, as the plan lists them.
      - Of each, C(instance) (its number), C(port), C(pages) (what its weights must fill) and C(nodes) (where these
        may lie, empty for any) are read, and C(store), the number of the store that it maps where that is another
        instance's.
    type: list
    elements: dict
    required: true
  address:
    description: Scheme and host of the instances, such as C(http://127.0.0.1).
    type: str
    required: true
  size_kib:
    description: Size of a huge page in KiB.
    type: int
    default: 1048576
  hugepages:
    description: Whether the weights belong in huge pages at all.
    type: bool
    default: true
  store:
    description: Directory below which the stores of the instances are mounted, where weights belong in one.
    type: path
  loader:
    description: The script C(llama_weights.py) on the host. Needed with O(store).
    type: path
  private_bytes:
    description: Bytes of ordinary memory that an instance may take, for KV cache and buffers. More is a second copy.
    type: int
  prompt:
    description: The user's message of the completion. The request is greedy, so that its answer repeats.
    type: str
    default: Say hello.
  max_tokens:
    description: Most tokens that the completion may have.
    type: int
    default: 32
  expect:
    description: Text that the completion must contain. Without it any text will do.
    type: str
  api_key_file:
    description: File on the host whose first line that is no comment is the key. A request without it must then fail.
    type: path
  ca_file:
    description: Certificate authorities for an C(https) address. The system's own without it.
    type: path
  timeout_s:
    description: Seconds that one answer may take. A long completion on a large model takes minutes.
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
- name: Compare the server of socket 0 with its plan
  cpullm.epyc.serving_info:
    instances:
      - instance: 0
        port: 8008
        pages: 672
        nodes: [0]
    address: http://127.0.0.1
    prompt: "Name the capital of France."
    expect: Paris
  register: serving
  failed_when: not serving.as_planned
"""

RETURN = r"""
as_planned:
  description: Whether no instance differs from its plan.
  type: bool
  returned: always
instances:
  description: Each instance as found.
  type: list
  elements: dict
  returned: always
  contains:
    instance:
      description: Its number.
      type: int
    active_state:
      description: systemd's state of the unit.
      type: str
    pid:
      description: Main process, 0 without one.
      type: int
    hugetlb_kib:
      description: C(HugetlbPages) of the process in KiB. Null where it cannot be read.
      type: int
    rss_kib:
      description: C(VmRSS) of the process in KiB, which does not count huge pages.
      type: int
    nodes:
      description: Huge pages held on each NUMA node.
      type: list
      elements: dict
    private_kib:
      description: C(RssAnon) of the process in KiB.
      type: int
    no_repack:
      description: Whether C(--no-repack) is an argument of the process.
      type: bool
    store_pages:
      description: Huge pages held that belong to files of the instance's store.
      type: int
    store_problems:
      description: Why the store is not complete, shard by shard.
      type: list
      elements: str
    health:
      description: HTTP status of the health check, 0 where nothing answered.
      type: int
    text:
      description: The completion's text.
      type: str
    tokens_per_s:
      description: Decode rate that the server measured for that completion.
      type: float
    without_key:
      description: HTTP status of a request without a key, null where no key is set.
      type: int
    error:
      description: Why no answer came.
      type: str
    deviations:
      description: Each difference from the plan, in words.
      type: list
      elements: str
"""

import http.client
import json
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._serving import (
    chat_text,
    decode_rate,
    deviations,
    pages_by_node,
    request,
    status_kib,
    store_pages,
)


def read_key(path: str) -> str:
    """Return the first key of a file. Raises OSError, and ValueError where it holds none."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            return line.strip()
    raise ValueError(f"{path} holds no key")


def store_problems(module: AnsibleModule, number: int) -> list[str]:
    """Return why the store of an instance is not complete, as its loader says."""
    argv = ["python3", module.params["loader"], "check"]
    argv += [f"--plan=/etc/llama-weights/{number}.json", f"--run=/run/llama-weights/{number}"]
    _code, out, err = module.run_command(argv)
    try:
        return list(json.loads(out)["problems"])
    except (ValueError, KeyError, TypeError):
        return [err.strip() or out.strip() or "its loader says nothing"]


def observe(module: AnsibleModule, number: int, store: int, url: str, key: str | None) -> dict[str, Any]:
    """Return one instance as found: unit, process, pages, health, completion."""
    unit = f"llama-server@{number}.service"
    code, out, err = module.run_command(["systemctl", "show", "--property=ActiveState,MainPID", unit])
    if code != 0:
        module.fail_json(msg=f"systemctl show {unit} failed with {code}: {err.strip()}")
    shown = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    found: dict[str, Any] = {
        "instance": number,
        "active_state": shown.get("ActiveState", "unknown"),
        "pid": int(shown.get("MainPID", "0")),
        "hugetlb_kib": None,
        "rss_kib": None,
        "nodes": [],
        "private_kib": None,
        "no_repack": False,
        "store_pages": 0,
        "store_problems": store_problems(module, store) if module.params["store"] else [],
        "health": 0,
        "text": "",
        "tokens_per_s": None,
        "without_key": None,
        "error": None,
    }
    options = module.params
    try:
        status = Path(f"/proc/{found['pid']}/status").read_text(encoding="utf-8") if found["pid"] else ""
        maps = Path(f"/proc/{found['pid']}/numa_maps").read_text(encoding="utf-8") if found["pid"] else ""
        found["hugetlb_kib"] = status_kib(status, "HugetlbPages")
        found["rss_kib"] = status_kib(status, "VmRSS")
        found["private_kib"] = status_kib(status, "RssAnon")
        found["nodes"] = pages_by_node(maps, options["size_kib"])
        if options["store"]:
            found["store_pages"] = store_pages(maps, f"{options['store']}/{store}", options["size_kib"])
        if found["pid"]:
            words = Path(f"/proc/{found['pid']}/cmdline").read_bytes().split(b"\0")
            found["no_repack"] = b"--no-repack" in words
        found["health"] = request(f"{url}/health", timeout_s=30, ca_file=options["ca_file"]).status
        payload = {
            "messages": [{"role": "user", "content": options["prompt"]}],
            "max_tokens": options["max_tokens"],
            "temperature": 0,
        }
        address = f"{url}/v1/chat/completions"
        if key is not None:
            found["without_key"] = request(address, timeout_s=30, payload=payload, ca_file=options["ca_file"]).status
        answer = request(address, timeout_s=options["timeout_s"], payload=payload, key=key, ca_file=options["ca_file"])
        found["text"] = chat_text(answer.body)
        found["tokens_per_s"] = decode_rate(answer.body)
        if answer.status != 200:
            found["error"] = f"the completion answers {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        found["error"] = str(error)
    return found


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "required": True},
            "address": {"type": "str", "required": True},
            "size_kib": {"type": "int", "default": 1048576},
            "hugepages": {"type": "bool", "default": True},
            "store": {"type": "path"},
            "loader": {"type": "path"},
            "private_bytes": {"type": "int"},
            "prompt": {"type": "str", "default": "Say hello."},
            "max_tokens": {"type": "int", "default": 32, "no_log": False},
            "expect": {"type": "str"},
            "api_key_file": {"type": "path", "no_log": False},
            "ca_file": {"type": "path"},
            "timeout_s": {"type": "int", "default": 600},
        },
        required_by={"store": "loader"},
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    options = module.params
    try:
        key = read_key(options["api_key_file"]) if options["api_key_file"] else None
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"api_key_file: {error}; expected a readable file with one key a line")
    if key is not None:
        module.no_log_values.add(key)
    instances = []
    for number, entry in enumerate(options["instances"]):
        missing = [name for name in ("instance", "port", "pages", "nodes") if name not in entry]
        if missing:
            module.fail_json(msg=f"instances[{number}]: {', '.join(missing)} missing; found {sorted(entry)}")
        url = f"{options['address']}:{entry['port']}"
        store = int(entry.get("store", entry["instance"]))
        found = observe(module, int(entry["instance"]), store, url, key)
        expectation = {
            "pages": int(entry["pages"]),
            "nodes": [int(node) for node in entry["nodes"]],
            "size_kib": options["size_kib"],
            "hugepages": options["hugepages"],
            "stored": bool(options["store"]),
            "private_kib": None if options["private_bytes"] is None else options["private_bytes"] // 1024,
            "expect": options["expect"],
            "key_needed": key is not None,
        }
        instances.append({**found, "deviations": deviations(found, expectation)})
    module.exit_json(
        changed=False,
        as_planned=all(not entry["deviations"] for entry in instances),
        instances=instances,
    )


if __name__ == "__main__":
    main()
