"""How a process says what happens: one line an event, as text or JSON, with version, partition and offset where they apply.

`begin` is called before a process knows its settings, `follow` once it does.
What is said again and again is said so many times a minute; what was left out
is counted, and the count is a line of its own when the minute is over. No line
holds the id of a user as it was sent.
"""

from __future__ import annotations

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
"""What goes wrong there is said once by those who call them, and not each time by the library."""
_PLACE = re.compile(rf"\b({'|'.join(FIELDS)}) (\d+)\b")
_CONVERSION = re.compile(r"%[-+ #0-9.]*[a-zA-Z]")
MINUTE_S = 60.0
MOST_EVENTS = 1000


def event_of(record: logging.LogRecord) -> str:
    """What all lines of one event have in common: its form, or, where that is a bare text, the text without numbers."""
    form = str(record.msg)
    return form if form != "%s" else re.sub(r"\d+", "#", record.getMessage())


def places(record: logging.LogRecord) -> dict[str, int]:
    """The version, epoch, partition and offset that a line names: the first of each.

    Looked at is what stands before a number in the form of the line, and the
    texts of errors; what an operator gave as a reason is not.

    >>> places(logging.LogRecord("", 20, "", 0, "epoch %d: at version %d, by %s", (2, 7, "ann, version 3"), None))
    {'epoch': 2, 'version': 7}
    >>> places(logging.LogRecord("", 40, "", 0, "%s", (ValueError("partition 1 offset 9 is damaged"),), None))
    {'partition': 1, 'offset': 9}
    """
    form, found = str(record.msg).replace("%%", ""), dict[str, int]()
    given = record.args if isinstance(record.args, tuple) else ()
    bare = form == "%s"
    texts = [form]
    for value in given:
        number = isinstance(value, int) and not isinstance(value, bool)
        told = str(value) if number or bare or isinstance(value, Exception) else ""
        texts = [*texts[:-1], *_filled(texts[-1], told)]
    for name, number_text in _PLACE.findall("".join(texts)):
        found.setdefault(name, int(number_text))
    return found


def _filled(form: str, value: str) -> tuple[str, str]:
    """A form up to its first place for a value, with the value there, and the rest."""
    match = _CONVERSION.search(form)
    if match is None:
        return form, ""
    return form[: match.start()] + value, form[match.end() :]


class OwnLine(logging.Formatter):
    """A line of one process.

    Args:
        part: The process.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part


class TextLine(OwnLine):
    """A line for people: when, who, how bad, what happened, and where."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is in it, its lines apart by bars."""
        told = [record.getMessage(), *([self.formatException(record.exc_info)] if record.exc_info else ())]
        where = "".join(f" {name}={value}" for name, value in places(record).items())
        text = " | ".join(line.rstrip() for one in told for line in one.splitlines() if line.strip())
        return f"{self.formatTime(record)} {self._part} {record.levelname} {text}{where}"


class JsonLine(OwnLine):
    """A line for machines: an object with time, part, level, logger, event, message, and the place."""

    def format(self, record: logging.LogRecord) -> str:
        """The object; `event` is the same for all lines of one kind, and times are UTC."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "part": self._part,
            "level": record.levelname,
            "logger": record.name,
            "event": event_of(record),
            "message": record.getMessage(),
            **places(record),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


@dataclass
class _Said:
    since_s: float
    times: int = 1
    left_out: int = 0


class Repeats:
    """Counts how often each event was said within a minute.

    Args:
        most: Of one event a minute.

    >>> repeats = Repeats(most=2)
    >>> [repeats.admits("the broker is away", now_s) for now_s in (0.0, 1.0, 2.0, 3.0)]
    [True, True, False, False]
    >>> list(repeats.over(59.0)), list(repeats.over(60.0)), repeats.admits("the broker is away", 60.0)
    ([], [('the broker is away', 2)], True)
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._said: dict[Any, _Said] = {}

    def admits(self, event: Any, now_s: float) -> bool:
        """Whether one more line of this event is written."""
        said = self._said.get(event)
        if said is None or now_s - said.since_s >= MINUTE_S:
            if len(self._said) >= MOST_EVENTS:
                # The one that is known for longest.
                del self._said[next(iter(self._said))]
            self._said[event] = _Said(now_s)
            return True
        said.times += 1
        if said.times <= self.most:
            return True
        said.left_out += 1
        return False

    def over(self, now_s: float) -> Iterator[tuple[Any, int]]:
        """The events whose minute is over and of which lines were left out, and how many; those are forgotten."""
        done = [event for event, said in self._said.items() if said.left_out and now_s - said.since_s >= MINUTE_S]
        for event in done:
            yield event, self._said.pop(event).left_out


class Lines(logging.StreamHandler[TextIO]):
    """Writes a process's lines; any thread may say something.

    Args:
        part: The process.
        stream: Where to.
        clock_s: A monotonic clock.
    """

    def __init__(self, part: str, stream: TextIO, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._part, self._clock_s = part, clock_s
        self._repeats = Repeats(LogSettings().repeats)
        self.setFormatter(TextLine(part))

    def use(self, logs: LogSettings) -> None:
        """Writes on as the settings have it."""
        self._repeats.most = logs.repeats
        self.setFormatter(JsonLine(self._part) if logs.format == "json" else TextLine(self._part))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, where its event is not said too often; before it what is to be said of those left out."""
        now_s = self._clock_s()
        self._say_left_out(now_s)
        if self._repeats.admits((record.name, record.levelno, event_of(record)), now_s):
            super().emit(record)

    def close(self) -> None:
        """Says what was left out lately, and ends."""
        self._say_left_out(float("inf"))
        super().close()

    def _say_left_out(self, now_s: float) -> None:
        for (name, level, event), count in self._repeats.over(now_s):
            form = "said %d times more within a minute: %s"
            super().emit(logging.LogRecord(name, level, "", 0, form, (count, event), None))


def begin(part: str, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Lets this process say what happens on its standard error, as text until `follow`; where nobody listens yet.

    Args:
        part: The process, as each line names it.
        stream: Where to instead.
        level: The least that is said.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(Lines(part, stream or sys.stderr))
        root.setLevel(level)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def follow(logs: LogSettings) -> None:
    """Says it from now on as the settings have it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Lines):
            handler.use(logs)
