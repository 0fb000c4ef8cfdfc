"""Lines of a process: one log line per event, as text or JSON, and the progress line of a long command.

A log line has version, partition and offset where they apply.
"""

from __future__ import annotations

import bisect
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from state.config.sections import LogSettings

FIELDS = ("version", "epoch", "partition", "offset")
NOISY = ("kafka", "apache_beam", "absl", "tensorflow")
"""Noisy libraries. Their callers log each failure once, so the libraries' own log lines are switched off."""
_PLACE = re.compile(rf"\b({'|'.join(FIELDS)}) (\d+)\b")
_CONVERSION = re.compile(r"%[-+ #0-9.]*[a-zA-Z]")
MINUTE_S = 60.0
SOUND_SHARE, SOUND_S = 0.02, 5.0
"""A rate is sound once this share of all is done, and the measured part of it took so many seconds."""
MOST_A_MINUTE = 20
"""Maximum number of lines of one event per minute; further lines are counted in one line."""
MOST_EVENTS = 1000


def event_of(record: logging.LogRecord) -> str:
    """The key that all lines of one event share: the format string, or for a bare "%s" the text with digits masked."""
    form = str(record.msg)
    return form if form != "%s" else re.sub(r"\d+", "#", record.getMessage())


def places(record: logging.LogRecord) -> dict[str, int]:
    """The first version, epoch, partition and offset that a line names, in its format string or in an error's text.

    >>> places(logging.LogRecord("", 20, "", 0, "epoch %d: at version %d, by %s", (2, 7, "ann, version 3"), None))
    {'epoch': 2, 'version': 7}
    >>> places(logging.LogRecord("", 40, "", 0, "%s", (ValueError("partition 1 offset 9 is damaged"),), None))
    {'partition': 1, 'offset': 9}
    """
    form, numbers = str(record.msg).replace("%%", ""), dict[str, int]()
    arguments = record.args if isinstance(record.args, tuple) else ()
    bare = form == "%s"
    texts = [form]
    for value in arguments:
        number = isinstance(value, int) and not isinstance(value, bool)
        text = str(value) if number or bare or isinstance(value, Exception) else ""
        texts = [*texts[:-1], *_filled(texts[-1], text)]
    for name, number_text in _PLACE.findall("".join(texts)):
        numbers.setdefault(name, int(number_text))
    return numbers


def _filled(form: str, value: str) -> tuple[str, str]:
    match = _CONVERSION.search(form)
    if match is None:
        return form, ""
    return form[: match.start()] + value, form[match.end() :]


class LineFormatter(logging.Formatter):
    """Formats the log lines of the process `part` as text or as JSON objects."""

    def __init__(self, part: str, json_lines: bool = False) -> None:
        super().__init__()
        self._part, self._json_lines = part, json_lines

    def format(self, record: logging.LogRecord) -> str:
        """Formats the record as one line."""
        if not self._json_lines:
            parts = [record.getMessage(), *([self.formatException(record.exc_info)] if record.exc_info else ())]
            where = "".join(f" {name}={value}" for name, value in places(record).items())
            text = " | ".join(line.rstrip() for part in parts for line in part.splitlines() if line.strip())
            return f"{self.formatTime(record)} {self._part} {record.levelname} {text}{where}"
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "part": self._part,
            "level": record.levelname,
            "logger": record.name,
            "event": event_of(record),
            "message": record.getMessage(),
            **places(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


@dataclass
class _Counted:
    since_s: float
    times: int = 1
    suppressed: int = 0


class Repeats:
    """Rate limit: admits `most` lines of each event within a minute and counts the others.

    >>> repeats = Repeats(most=2)
    >>> [repeats.admits("the broker is away", now_s) for now_s in (0.0, 1.0, 2.0, 3.0)]
    [True, True, False, False]
    >>> list(repeats.over(59.0)), list(repeats.over(60.0)), repeats.admits("the broker is away", 60.0)
    ([], [('the broker is away', 2)], True)
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counted: dict[Any, _Counted] = {}

    def admits(self, event: Any, now_s: float) -> bool:
        """Counts a line of this event; returns whether it is written."""
        counted = self._counted.get(event)
        if counted is None or now_s - counted.since_s >= MINUTE_S:
            if len(self._counted) >= MOST_EVENTS:
                # Drops the event that has been known for the longest time.
                del self._counted[next(iter(self._counted))]
            self._counted[event] = _Counted(now_s)
            return True
        counted.times += 1
        if counted.times <= self._most:
            return True
        counted.suppressed += 1
        return False

    def over(self, now_s: float) -> Iterator[tuple[Any, int]]:
        """Yields the events whose minute is over and how many of their lines were suppressed, and forgets them."""
        over = [
            event
            for event, counted in self._counted.items()
            if counted.suppressed and now_s - counted.since_s >= MINUTE_S
        ]
        for event in over:
            yield event, self._counted.pop(event).suppressed


class Lines(logging.StreamHandler[TextIO]):
    """The log handler of a process; thread-safe."""

    def __init__(
        self, part: str, stream: TextIO, clock_s: Callable[[], float] = time.monotonic, most: int = MOST_A_MINUTE
    ) -> None:
        super().__init__(stream)
        self._part, self._clock_s = part, clock_s
        self._repeats = Repeats(most)
        self.setFormatter(LineFormatter(part))

    def use(self, logs: LogSettings) -> None:
        """Applies the log settings."""
        self.setFormatter(LineFormatter(self._part, logs.format == "json"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line unless its event exceeds the rate limit; counts of suppressed lines that are due come first."""
        now_s = self._clock_s()
        self._report_suppressed(now_s)
        if self._repeats.admits((record.name, record.levelno, event_of(record)), now_s):
            super().emit(record)

    def close(self) -> None:
        """Writes the remaining counts of suppressed lines, and closes the handler."""
        self._report_suppressed(float("inf"))
        super().close()

    def _report_suppressed(self, now_s: float) -> None:
        for (name, level, event), count in self._repeats.over(now_s):
            form = "repeated %d more times within a minute: %s"
            super().emit(logging.LogRecord(name, level, "", 0, form, (count, event), None))


class SaidOnce:
    """Logs lines, but skips one that equals the previous line, so that a waiting loop does not fill the log.

    `log` takes a format string and its argument.

    >>> say = SaidOnce(lambda form, line: print(form % line))
    >>> for line in ("waiting", "waiting", "there"):
    ...     say(line)
    waiting
    there
    """

    def __init__(self, log: Callable[[str, str], object]) -> None:
        self._log = log
        self._last = ""

    def __call__(self, line: str) -> None:
        """Logs the line if it differs from the last one."""
        if line != self._last:
            self._last = line
            self._log("%s", line)

    def clear(self) -> None:
        """Allows the same line to be logged again."""
        self._last = ""


def begin(part: str, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Starts logging to standard error, or `stream`, as text until `follow` is called. Keeps existing handlers."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(Lines(part, stream or sys.stderr))
        root.setLevel(level)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def follow(logs: LogSettings) -> None:
    """Applies the log settings to the handlers of this process."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Lines):
            handler.use(logs)


TERMINAL_EVERY_S = 0.2
CLEAR = "\r\x1b[K"


def bar(done: int, total: int, width: int) -> str:
    """A progress bar with the share in percent.

    >>> bar(500, 1000, 10)
    '[#####-----]  50 %'
    """
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'-' * (width - filled)}] {100 * done // max(total, 1):3d} %"


class Pace:
    """The rate of a long work, measured over the later half of what is done, so that its slow start does not count.

    >>> pace = Pace(1000)
    >>> for done, at_s in ((0, 0.0), (10, 90.0), (20, 91.0), (120, 101.0)):
    ...     pace.add(done, at_s)
    ...     print(pace.rate())
    None
    None
    None
    10.0
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done, self._at_s = list[int](), list[float]()

    def add(self, done: int, at_s: float) -> None:
        """Adds how much is done at a time; neither ever falls."""
        self._done.append(done)
        self._at_s.append(at_s)

    def rate(self) -> float | None:
        """How much is done per second; None until `SOUND_SHARE` of all is done, and the later half took `SOUND_S`."""
        if not self._done or (self._total is not None and self._done[-1] < SOUND_SHARE * self._total):
            return None
        middle = bisect.bisect_right(self._done, self._done[-1] / 2) - 1
        done, took_s = self._done[-1] - self._done[middle], self._at_s[-1] - self._at_s[middle]
        return done / took_s if middle >= 0 and done and took_s >= SOUND_S else None


class ProgressLine:
    """Writes progress lines: on a terminal each replaces the previous one, otherwise one every `line_every_s`."""

    def __init__(
        self, out: TextIO, line_every_s: float, monotonic_s: Callable[[], float] = time.monotonic, at_once: bool = False
    ) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._every_s = TERMINAL_EVERY_S if self._terminal else line_every_s
        self._monotonic_s = monotonic_s
        self._begun_s = monotonic_s()
        self._shown_s = float("-inf") if at_once and self._terminal else self._begun_s
        self._open = False

    @property
    def took_s(self) -> float:
        """Seconds since the start, never 0."""
        return max(self._monotonic_s() - self._begun_s, 1e-9)

    def show(self, line: Callable[[], str], last: bool = False) -> None:
        """Shows a line if one is due. With `last` it is always shown, and is not replaced."""
        now_s = self._monotonic_s()
        if not last and now_s - self._shown_s < self._every_s:
            return
        self._shown_s = now_s
        self._open = self._terminal and not last
        self._write(f"{CLEAR}{line()}{chr(10) * last}" if self._terminal else f"{line()}\n")

    def say(self, line: str) -> None:
        """Writes a line that is not replaced."""
        self._write(f"{CLEAR * self._open}{line}\n")
        self._open = False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
