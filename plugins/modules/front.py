#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run HAProxy as the front of a host's servers, with one configuration that is validated before it counts."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: front
short_description: Run HAProxy before the servers of a host
version_added: "1.0.0"
description:
  - Puts configuration, key digests and links to the certificate into a directory of their own, has HAProxy validate
    them there, and only then lets the link C(/etc/haproxy/llama) name that directory, in one step. HAProxy is reloaded,
    which interrupts no request.
  - What the running HAProxy has loaded is asked of itself. So a play that died between a file and its reload is healed
    by the next one, and a renewed certificate is noticed.
  - A drop-in tells the unit of Debian where the configuration lies; the files of the package stay as they are. Where
    the drop-in changes HAProxy is restarted, because nothing else applies it.
  - Of the keys only their SHA-256 digests are written.
options:
  state:
    description: C(absent) gives HAProxy back to the package's own configuration.
    type: str
    choices: [present, absent]
    default: present
  config:
    description: The configuration. It names C(keys) and C(tls.pem) without a directory.
    type: str
  unit:
    description: The drop-in of C(haproxy.service).
    type: str
  keys_file:
    description: File on the host with one key a line.
    type: path
  certificate_file:
    description: Certificate chain on the host, in PEM.
    type: path
  private_key_file:
    description: The certificate's private key on the host, in PEM.
    type: path
attributes:
  check_mode:
    description: Can run in check mode and say what it would do; there HAProxy need not be installed.
    support: full
  diff_mode:
    description: Returns configuration and drop-in before and after, without keys.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Run the front
  cpullm.epyc.front:
    config: "{{ lookup('ansible.builtin.template', 'haproxy.cfg.j2') }}"
    unit: "{{ lookup('ansible.builtin.template', '60-llama.conf.j2') }}"
    keys_file: /etc/llama-server/keys
"""

RETURN = r"""
action:
  description: What was done to HAProxy, or in check mode would be done.
  type: str
  returned: always
  sample: reload
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._front import (
    ask,
    description,
    digest,
    key_digests,
    parse_keys,
)

LINK = Path("/etc/haproxy/llama")
DROP_IN = Path("/etc/systemd/system/haproxy.service.d/60-llama.conf")
SOCKET = "/run/haproxy/admin.sock"
# In the environment of a running HAProxy, which a reload keeps: the drop-in that it was started with.
MARKER = "LLAMA_FRONT_UNIT"


def read(path: Path) -> str:
    """Return the text of a file, or an empty text where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def wanted_files(options: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return the digest of everything that the front loads, and the files of its directory.

    Raises OSError and ValueError where keys or certificate cannot be read.
    """
    files = {"haproxy.cfg": options["config"].rstrip("\n").encode() + b"\n"}
    if options["keys_file"]:
        try:
            keys = parse_keys(Path(options["keys_file"]).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"keys_file {options['keys_file']}: {error}") from error
        files["keys"] = key_digests(keys).encode()
    loaded = dict(files)
    for name in ("certificate_file", "private_key_file"):
        if options[name]:
            loaded[f"{name} {options[name]}"] = Path(options[name]).read_bytes()
    found = digest(loaded)
    files["haproxy.cfg"] = f"global\n  description {found}\n\n".encode() + files["haproxy.cfg"]
    return found, files


def running() -> tuple[str | None, str | None]:
    """Return the digests of configuration and drop-in that the running HAProxy has, None where there is none."""
    try:
        environment = ask(SOCKET, f"show env {MARKER}").strip()
        return description(ask(SOCKET, "show info")), environment.partition("=")[2] or None
    except OSError:
        return None, None


def plan(wanted: tuple[str, str], on_disk: tuple[str | None, str], found: tuple[str | None, str | None]) -> str:
    """Return what HAProxy needs: ``nothing``, ``reload``, ``restart`` or, where only a boot would need it, ``write``.

    Each pair is the digest of the configuration and that of the drop-in: as wanted, as on the disk, as running.
    """
    if found[1] != wanted[1]:
        return "restart"
    if found[0] != wanted[0]:
        return "reload"
    return "nothing" if on_disk == wanted else "write"


def stage(module: AnsibleModule, name: str, files: dict[str, bytes]) -> Path:
    """Return a directory with the files that HAProxy has validated; the module fails where it refuses them."""
    options = module.params
    folder = Path(tempfile.mkdtemp(dir=LINK.parent, prefix=".llama-"))
    try:
        for file, content in files.items():
            (folder / file).write_bytes(content)
            (folder / file).chmod(0o600)
        if options["certificate_file"]:
            # HAProxy looks for the key beside the certificate. Links, so that a renewed one needs a reload and no copy.
            (folder / "tls.pem").symlink_to(options["certificate_file"])
            (folder / "tls.pem.key").symlink_to(options["private_key_file"])
        code, out, err = module.run_command(["haproxy", "-c", "-f", str(folder / "haproxy.cfg")])
        if code != 0:
            said = (err.strip() or out.strip()).replace(str(folder), str(LINK))
            module.fail_json(msg=f"HAProxy refuses the configuration, and the old one stays: {said}")
        target = LINK.parent / f"llama-{name[:12]}"
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        os.sync()
        return target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def switch(target: str) -> None:
    """Let the link name a directory beside it, in one step."""
    fresh = LINK.with_name(f".llama-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(LINK)


def write(path: Path, text: str) -> None:
    """Write a file in one step."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=".ansible-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
        os.fchmod(handle.fileno(), 0o644)
        os.fsync(handle.fileno())
    os.replace(fresh, path)


def systemctl(module: AnsibleModule, *words: str) -> None:
    """Run systemctl; the module fails where it does."""
    code, out, err = module.run_command(["systemctl", *words])
    if code != 0:
        _code, journal, _err = module.run_command(["journalctl", "--no-pager", "--output=cat", "-n20", "-uhaproxy"])
        module.fail_json(msg=f"systemctl {' '.join(words)}: {err.strip() or out.strip()}\n{journal.strip()}")


def apply(module: AnsibleModule, action: str, files: dict[str, bytes], wanted: tuple[str, str], unit: str) -> None:
    """Write, switch, and let HAProxy load it; the old configuration comes back where HAProxy does not."""
    previous = os.readlink(LINK) if LINK.is_symlink() else None
    target = stage(module, wanted[0], files)
    write(DROP_IN, unit)
    switch(target.name)
    systemctl(module, "daemon-reload")
    systemctl(module, "enable", "haproxy.service")
    if action in ("reload", "restart"):
        systemctl(module, action, "haproxy.service")
        deadline = time.monotonic() + 20
        while running() != wanted:
            if time.monotonic() > deadline:
                if previous is not None:
                    switch(previous)
                _code, journal, _err = module.run_command(["journalctl", "--no-pager", "-ocat", "-n20", "-uhaproxy"])
                module.fail_json(
                    msg=f"HAProxy does not take its configuration; on the disk is again {previous or 'the new one'}. "
                    f"Mend the cause and run the playbook again. Its last lines:\n{journal.strip()}"
                )
            time.sleep(0.1)
    for old in LINK.parent.glob("llama-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def remove(module: AnsibleModule) -> None:
    """Give HAProxy back to the package's configuration."""
    DROP_IN.unlink(missing_ok=True)
    if DROP_IN.parent.is_dir() and not any(DROP_IN.parent.iterdir()):
        DROP_IN.parent.rmdir()
    LINK.unlink(missing_ok=True)
    for old in [*LINK.parent.glob("llama-*"), *LINK.parent.glob(".llama-*")]:
        shutil.rmtree(old, ignore_errors=True)
    systemctl(module, "daemon-reload")
    systemctl(module, "try-restart", "haproxy.service")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "config": {"type": "str"},
            "unit": {"type": "str"},
            "keys_file": {"type": "path", "no_log": False},
            "certificate_file": {"type": "path"},
            "private_key_file": {"type": "path", "no_log": False},
        },
        required_if=[("state", "present", ["config", "unit"])],
        required_together=[("certificate_file", "private_key_file")],
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    options = module.params
    before = {LINK / "haproxy.cfg": read(LINK / "haproxy.cfg"), DROP_IN: read(DROP_IN)}
    try:
        if options["state"] == "absent":
            action = "remove" if LINK.is_symlink() or DROP_IN.exists() else "nothing"
            if action == "remove" and not module.check_mode:
                remove(module)
            after = dict.fromkeys(before, "")
        else:
            name, files = wanted_files(options)
            body = options["unit"].rstrip("\n") + "\n"
            mark = digest({"unit": body.encode()})
            unit = f"{body}Environment={MARKER}={mark}\n"
            lines = before[LINK / "haproxy.cfg"].splitlines()
            on_disk = (
                description("\n".join(line.strip().replace(" ", ": ", 1) for line in lines[:3])),
                before[DROP_IN],
            )
            action = plan((name, mark), (on_disk[0], mark if on_disk[1] == unit else ""), running())
            if action != "nothing" and not module.check_mode:
                apply(module, action, files, (name, mark), unit)
            after = {LINK / "haproxy.cfg": files["haproxy.cfg"].decode(), DROP_IN: unit}
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=action != "nothing",
        action=action,
        diff=[
            {"before_header": str(path), "after_header": str(path), "before": before[path], "after": after[path]}
            for path in before
            if before[path] != after[path]
        ],
    )


if __name__ == "__main__":
    main()
