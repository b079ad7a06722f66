# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small questions to a target over the ordinary connection, cheaper than a module each."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils import _job_agent

_AGENT = Path(_job_agent.__file__).read_text(encoding="utf-8")


def interpreter(action: ActionBase, task_vars: dict[str, Any]) -> str:
    """Return a shell word for the target's Python: what the inventory says, what was discovered, or python3."""
    host = action._task.delegate_to
    host_vars = ((task_vars.get("ansible_delegated_vars") or {}).get(host) or {}) if host else task_vars
    # An inventory's value may be a template, as the implicit localhost's is.
    named = action._templar.template(host_vars.get("ansible_python_interpreter"))
    if not named or str(named).startswith("auto"):
        named = (host_vars.get("ansible_facts") or {}).get("discovered_interpreter_python")
    return shlex.quote(str(named)) if named else "$(command -v python3 || echo /usr/libexec/platform-python)"


def ask_agent(action: ActionBase, task_vars: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Return the agent's answer to one request; raises AnsibleActionFail where there is none.

    The program goes through standard input: a command line would show the job's environment to every user.
    """
    program = f"{_AGENT}\nmain(__import__('json').loads({json.dumps(request)!r}))\n"
    result = action._low_level_execute_command(
        f"{interpreter(action, task_vars)} -I -S -", in_data=program.encode("utf-8"), sudoable=True
    )
    for line in reversed(result["stdout_lines"]):
        if line.startswith(_job_agent.MARKER):
            answer: dict[str, Any] = json.loads(line[len(_job_agent.MARKER) :])
            return answer
    raise AnsibleActionFail(
        f"the target's Python gave no answer (rc {result['rc']}): "
        f"{(result['stderr'] or result['stdout']).strip()[-1000:]}"
    )


def reset_connection(action: ActionBase) -> None:
    """Drop a persistent connection, so that the next question opens a new one."""
    # A connection that is gone already cannot be asked to go; any of its errors means the same here.
    with contextlib.suppress(Exception):
        action._connection.reset()
