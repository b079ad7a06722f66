# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Draws one live block for all hosts that do long work."""

from __future__ import annotations

DOCUMENTATION = r"""
name: progress
type: notification
short_description: Live block of the long tasks of cpullm.epyc
version_added: "1.0.0"
author:
  - The cpullm.epyc authors (@cpullm)
description:
  - Draws, below Ansible's own output, one block with a line for each host whose M(cpullm.epyc.job) or
    M(cpullm.epyc.reboot) runs, with percent, rate and time left. It works with forks, since workers leave their
    records in a folder that this plugin reads.
  - Without a terminal nothing is drawn. The tasks then write a plain line at least every 10 seconds, and this plugin
    makes Ansible's output line buffered, so that the lines reach a log while the work runs.
requirements:
  - C(callbacks_enabled = cpullm.epyc.progress) in C(ansible.cfg)
options: {}
"""

import atexit
import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import Record, render_block
from ansible_collections.cpullm.epyc.plugins.plugin_utils._reporter import SPOOL_VARIABLE

_REDRAW_S = 0.5


class _Block:
    """The lines at the end of the terminal, erased before anything else is written and drawn again after it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._drawn: list[str] = []
        self._at_line_start = True
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\r\x1b[{len(self._drawn)}A\x1b[J")
            self._drawn = []

    def write(self, stream: Any, text: str) -> int:
        """Write another's text in front of the block."""
        # A forked worker inherits this object, and may inherit its lock as held.
        if os.getpid() != self._pid:
            return int(stream.write(text))
        with self._lock:
            self._erase()
            if stream is not self._stream:
                self._stream.flush()
            written = int(stream.write(text))
            if text:
                self._at_line_start = text.endswith("\n")
            return written

    def draw(self, lines: list[str]) -> None:
        """Replace the block, unless somebody is in the middle of a line."""
        with self._lock:
            if not self._at_line_start or lines == self._drawn:
                return
            self._erase()
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
            self._drawn = lines


class _Stream:
    """Stands in for a standard stream, and lets the block step aside first."""

    def __init__(self, stream: Any, block: _Block) -> None:
        self._stream = stream
        self._block = block

    def write(self, text: str) -> int:
        """Write through the block."""
        return self._block.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _read_record(path: Path) -> Record | None:
    """Return the record that a living worker keeps, or None."""
    try:
        os.kill(int(path.name.partition("-")[0]), 0)
        return Record.from_json(path.read_text(encoding="utf-8"))
    except ProcessLookupError:
        path.unlink(missing_ok=True)
    except (OSError, ValueError):
        pass
    return None


def read_spool(spool: Path) -> list[Record]:
    """Return the records of the workers that live, in the order of their hosts; what a killed one left is removed."""
    records = []
    for path in spool.glob("*.json"):
        record = _read_record(path)
        if record is not None:
            records.append(record)
    return sorted(records, key=lambda record: (record.host, record.title))


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Starts to look for records with the first of our tasks, and leaves the terminal as it was."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "cpullm.epyc.progress"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._spool: Path | None = None
        self._block: _Block | None = None
        self._streams: tuple[Any, Any] | None = None
        if not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:  # noqa: ARG002 - the interface's
        """Make the block ready before the first worker of ours is forked."""
        if str(task.action).startswith("cpullm.epyc."):
            self._start()

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Do the same for a handler: a reboot often is one."""
        self.v2_playbook_on_task_start(task, False)

    def v2_playbook_on_stats(self, stats: Any) -> None:  # noqa: ARG002 - the interface's
        """End with the play."""
        self._end()

    def _start(self) -> None:
        if self._thread is not None or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            return
        self._spool = Path(tempfile.mkdtemp(prefix="cpullm-progress-"))
        os.environ[SPOOL_VARIABLE] = str(self._spool)
        self._block = _Block(sys.stdout)
        self._streams = (sys.stdout, sys.stderr)
        sys.stdout = _Stream(sys.stdout, self._block)
        if sys.stderr.isatty():
            sys.stderr = _Stream(sys.stderr, self._block)
        self._thread = threading.Thread(target=self._run, name="cpullm-progress", daemon=True)
        self._thread.start()
        atexit.register(self._end, os.getpid())

    def _run(self) -> None:
        if self._spool is None or self._block is None:  # both are set before the thread starts
            return
        while not self._stop.wait(_REDRAW_S):
            size = shutil.get_terminal_size()
            # A terminal that went away must not end the play.
            with contextlib.suppress(OSError, ValueError):
                self._block.draw(render_block(read_spool(self._spool), size.columns, size.lines))

    def _end(self, pid: int | None = None) -> None:
        # Workers inherit the registration at exit; the terminal is the main process's.
        if self._thread is None or (pid is not None and pid != os.getpid()):
            return
        self._stop.set()
        self._thread.join(timeout=5)
        self._thread = None
        if self._block is not None:
            with contextlib.suppress(OSError, ValueError):
                self._block.draw([])
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams
        os.environ.pop(SPOOL_VARIABLE, None)
        if self._spool is not None:
            shutil.rmtree(self._spool, ignore_errors=True)
