# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How an action plugin, in its worker process, tells people how far its long work is."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

from ansible.utils.display import Display
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import (
    Record,
    Status,
    Window,
    clock_record,
    render_line,
)

# Set by the callback plugin in the main process where it draws a live block; workers inherit it.
SPOOL_VARIABLE = "CPULLM_EPYC_PROGRESS_SPOOL"
# Progress is promised at least every 10 s; the rest is the queue's.
LINE_INTERVAL_S = 9.0
RECORD_INTERVAL_S = 1.0


class Reporter:
    """Shows the last status told to it, from a thread: also while the connection blocks the plugin."""

    def __init__(self, host: str, title: str, line_interval_s: float = LINE_INTERVAL_S) -> None:
        self._host = host
        self._title = title
        self._line_interval_s = line_interval_s
        self._display = Display()
        self._window = Window()
        self._status: Status | None = None
        self._note = ""
        self._clock = False
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        spool = os.environ.get(SPOOL_VARIABLE)
        self._path = Path(spool) / f"{os.getpid()}-{id(self):x}.json" if spool and Path(spool).is_dir() else None
        self._thread = threading.Thread(target=self._run, name="cpullm-progress", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since this reporter was made."""
        return time.monotonic() - self._started

    def tell(self, status: Status | None, note: str = "") -> None:
        """Take a new reading; None keeps the last one and changes the note alone."""
        with self._lock:
            self._note = note
            if status is not None:
                self._clock = False
                self._status = status
                # The worker's own clock, where it gives one: a slow poll must not look like a slow rate.
                self._window.add(time.monotonic() if status.updated is None else status.updated, status)

    def tell_clock(self, phase: str, expected_s: float, note: str = "") -> None:
        """Show a wait that is measured by the clock alone, beside the seconds that it is expected to take."""
        with self._lock:
            self._note = note
            self._clock = True
            self._status = Status(phase, 0.0, expected_s, "s")

    def record(self) -> Record:
        """Return what is known now."""
        with self._lock:
            if self._clock and self._status is not None:
                return clock_record(self._host, self._title, self._status, self.elapsed_s, self._note)
            return Record(
                host=self._host,
                title=self._title,
                status=self._status,
                rate=self._window.rate(),
                elapsed_s=self.elapsed_s,
                note=self._note,
            )

    def _write(self, record: Record) -> None:
        """Replace this worker's record in the spool; a spool that is gone means that nobody draws any more."""
        if self._path is None:
            return
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(record.to_json(), encoding="utf-8")
            fresh.replace(self._path)
        except OSError:
            self._path = None

    def _run(self) -> None:
        next_line = time.monotonic() + self._line_interval_s
        while not self._stop.wait(RECORD_INTERVAL_S):
            record = self.record()
            self._write(record)
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + self._line_interval_s
                # With a live block on the terminal the line still belongs into the log file, if there is one.
                self._display.display(render_line(record), log_only=self._path is not None)
