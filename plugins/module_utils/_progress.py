# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Progress of long work: the status protocol, rate over a window, time left, and how both are drawn."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from typing import Any

# A rate over less than this says more about the poll than about the work.
_SHORTEST_SPAN_S = 0.5


@dataclasses.dataclass(frozen=True)
class Status:
    """One reading of a status file; total is None where the end is not known."""

    phase: str = ""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    message: str = ""
    updated: float | None = None

    @property
    def complete(self) -> bool:
        """True once everything that was announced is done."""
        return self.total is not None and self.done >= self.total

    @property
    def failed(self) -> bool:
        """True where the work itself says that it gave up."""
        return self.phase == "failed"

    @property
    def percent(self) -> float | None:
        """Share done, 0 to 100, or None where the total is unknown."""
        if self.total is None:
            return None
        if self.total <= 0:
            return 100.0
        return max(0.0, min(100.0, 100.0 * self.done / self.total))


def _number(value: object) -> float | None:
    """Return a finite number, or None; JSON's booleans are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def parse_status(text: str) -> Status:
    """Return the status that one JSON object states; raises ValueError on anything else.

    Fields that are missing or of another type count as not said: a status is a hint for people, and a worker that
    omits its unit is no reason to fail its work.
    """
    try:
        data: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("the status is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError(f"a status is one JSON object, found {type(data).__name__}")

    def word(name: str, limit: int = 200) -> str:
        value = data.get(name)
        # One line, no control characters: this text goes to a terminal.
        return "".join(c if c.isprintable() else " " for c in value)[:limit] if isinstance(value, str) else ""

    total = _number(data.get("total"))
    return Status(
        phase=word("phase"),
        done=max(0.0, _number(data.get("done")) or 0.0),
        total=total if total is not None and total >= 0 else None,
        unit=word("unit"),
        # Why something failed may take a few lines.
        message=word("message", 2000 if word("phase") == "failed" else 200),
        updated=_number(data.get("updated")),
    )


class Window:
    """Rate of the latest seconds: what happens now, not the mean since the start."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds = seconds
        self._samples: collections.deque[tuple[float, float]] = collections.deque()
        self._of: tuple[str, str] = ("", "")

    def add(self, now: float, status: Status) -> None:
        """Take one reading; another phase or unit, or a step back, starts anew."""
        of = (status.phase, status.unit)
        if of != self._of or (self._samples and (status.done < self._samples[-1][1] or now < self._samples[-1][0])):
            self._samples.clear()
            self._of = of
        self._samples.append((now, status.done))
        # The oldest sample kept may lie before the window, so that slow polls still have two.
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._seconds:
            self._samples.popleft()

    def rate(self) -> float | None:
        """Return units per second, or None before two readings."""
        if len(self._samples) < 2:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        if end - start < _SHORTEST_SPAN_S:
            return None
        return (last - first) / (end - start)


def seconds_left(status: Status, rate: float | None) -> float | None:
    """Return the seconds that the rest takes at this rate, or None where that cannot be told."""
    if status.total is None or not rate or rate <= 0:
        return None
    return max(0.0, status.total - status.done) / rate


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: `8 s`, `2 min 05 s`, `1 h 04 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _scaled_bytes(amount: float) -> tuple[float, str]:
    """Return an amount of bytes in the largest binary unit that keeps it at one or above."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return amount, unit
        amount /= 1024
    return amount, "TiB"


def _plain(amount: float) -> str:
    """Return a count without needless decimals."""
    return str(round(amount)) if abs(amount - round(amount)) < 0.05 or abs(amount) >= 100 else f"{amount:.1f}"


def format_amount(status: Status) -> str:
    """Return how much is done of how much, in the unit of the status."""
    unit = status.unit
    if unit == "bytes":
        done, done_unit = _scaled_bytes(status.done)
        if status.total is None:
            return f"{done:.1f} {done_unit}"
        total, total_unit = _scaled_bytes(status.total)
        return f"{done:.1f} {done_unit} of {total:.1f} {total_unit}"
    if unit == "s":
        if status.total is None:
            return format_duration(status.done)
        return f"{format_duration(status.done)} of {format_duration(status.total)}"
    tail = f" {unit}" if unit else ""
    if status.total is None:
        return f"{_plain(status.done)}{tail}"
    return f"{_plain(status.done)} of {_plain(status.total)}{tail}"


def format_rate(rate: float, unit: str) -> str:
    """Return a rate in the unit of the status."""
    if unit == "bytes":
        amount, scaled = _scaled_bytes(rate)
        return f"{amount:.1f} {scaled}/s"
    amount_text = f"{rate:.2f}" if rate < 10 else f"{rate:.0f}"
    return f"{amount_text} {unit}/s" if unit else f"{amount_text}/s"


@dataclasses.dataclass(frozen=True)
class Record:
    """What one host's long task shows at this moment."""

    host: str
    title: str
    status: Status | None = None
    rate: float | None = None
    elapsed_s: float = 0.0
    note: str = ""

    def to_json(self) -> str:
        """Return the record as one JSON object, for the spool."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return the record that to_json wrote; raises ValueError on anything else."""
        try:
            data: Any = json.loads(text)
            status = data.pop("status")
            return cls(status=None if status is None else Status(**status), **data)
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"not a progress record: {error}") from error


def clock_record(host: str, title: str, status: Status, elapsed_s: float, note: str) -> Record:
    """Return the record of a wait that only the clock measures; past the expected end there is no percentage."""
    total = status.total if status.total is not None and elapsed_s < status.total else None
    now = dataclasses.replace(status, done=elapsed_s, total=total)
    return Record(host, title, now, 1.0, elapsed_s, note)


def describe(record: Record) -> str:
    """Return percent, amount, rate, time left and time spent of a record, as far as they are known."""
    parts = []
    status = record.status
    if status is not None:
        if status.phase:
            parts.append(status.phase)
        percent = status.percent
        if percent is not None:
            parts.append(f"{percent:.0f} %")
        # A clock runs at one second per second, so its rate says nothing; what it has done is the time spent.
        clock = status.unit == "s"
        if (status.total is not None or status.done) and not (clock and status.done == record.elapsed_s):
            parts.append(format_amount(status))
        if record.rate is not None and not clock:
            parts.append(format_rate(record.rate, status.unit))
        left = seconds_left(status, record.rate)
        if left is not None and not status.complete:
            parts.append(f"{format_duration(left)} left")
        if status.message:
            parts.append(status.message)
    if record.note:
        parts.append(record.note)
    parts.append(f"{format_duration(record.elapsed_s)} elapsed")
    return ", ".join(parts)


def render_line(record: Record) -> str:
    """Return one line for a log."""
    return f"{record.host} | {record.title}: {describe(record)}"


def gauge(percent: float, width: int) -> str:
    """Return a bar of ASCII characters: every terminal and every copy into a ticket shows it."""
    filled = min(width, int(width * percent / 100))
    return "[" + "#" * filled + "." * (width - filled) + "]"


def render_block(records: list[Record], columns: int, rows: int) -> list[str]:
    """Return the lines of the live block, none longer than the terminal is wide.

    A block taller than the terminal could not be erased again, so what does not fit is counted in a last line.
    """
    room = max(1, rows - 2)
    shown = records if len(records) <= room else records[: room - 1]
    host_width = max((len(r.host) for r in shown), default=0)
    title_width = max((len(r.title) for r in shown), default=0)
    lines = []
    for record in shown:
        percent = record.status.percent if record.status is not None else None
        meter = gauge(percent, 20) if percent is not None else " " * 22
        line = f"{record.host:<{host_width}}  {record.title:<{title_width}}  {meter}  {describe(record)}"
        lines.append(line[: max(1, columns - 1)])
    if len(shown) < len(records):
        lines.append(f"... and {len(records) - len(shown)} more"[: max(1, columns - 1)])
    return lines
