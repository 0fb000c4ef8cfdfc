"""When each recorded click is sent, and with which time. Pure.

    times     speed   event time                        Kafka timestamp   sent
    rebased   max     recorded + (now - newest)         now               at once
    rebased   60x     when it is sent, if not late      when it is sent   paced
    kept      max     recorded                          none              at once
    kept      60x     recorded                          none              paced

- Rebased at full speed, the newest click gets the wall clock's time at the start, and gaps stay as recorded.
- Rebased at 60x, an hour passes in a minute. The click being sent gets the current time, and gaps are a sixtieth. A
  click that follows a later one is late by as much as in the recording, divided by the speed.
- A kept time is never compared with today. Those records carry no Kafka timestamp, so that neither the parser's bounds
  nor the topic's retention apply to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from state.errors import SettingsError
from state.recordings.rows import I64, NO_TIME

NO_TIMESTAMP = -1
MAX = math.inf

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clock:
    """How event times, timestamps and send times are computed.

    Attributes:
        speed: Seconds of the recording per second of wall clock; MAX: no pacing.
        keep: Keep event times as recorded.
        now_ms: Wall clock at the start of the replay; unchanged by a restart.
        newest_ms: Latest recorded time apart from strays; NO_TIME if times are kept, and then no row is a stray.
        longest_wait_ms: Upper bound of the pause for one gap, however long the gap is in the recording.
    """

    speed: float
    keep: bool
    now_ms: int
    newest_ms: int
    longest_wait_ms: float = MAX


@dataclass(frozen=True)
class Hand:
    """The clock's state: the latest recorded time so far (NO_TIME: none), and when it was due, wall clock ms."""

    high_ms: int
    due_ms: float


@dataclass(frozen=True)
class Stamped:
    """n records with their times.

    Attributes:
        at_ms: `[n]` int64, event times; NO_TIME where the row has none.
        kafka_ms: `[n]` int64, Kafka timestamps; NO_TIMESTAMP for none.
        due_ms: `[n]` float64, wall clock from which each record may be sent.
        high_ms: `[n]` int64, the latest recorded time so far.
    """

    at_ms: I64
    kafka_ms: I64
    due_ms: F64
    high_ms: I64

    def cut(self, first: int, after: int) -> Stamped:
        """The records [first, after)."""
        part = slice(first, after)
        return Stamped(self.at_ms[part], self.kafka_ms[part], self.due_ms[part], self.high_ms[part])

    def oldest_s(self, rows: int) -> float:
        """How far the oldest of the first `rows` records is before its Kafka timestamp, seconds."""
        timed = (self.at_ms[:rows] != NO_TIME) & (self.kafka_ms[:rows] != NO_TIMESTAMP)
        return int((self.kafka_ms[:rows] - self.at_ms[:rows])[timed].max(initial=0)) / 1000

    def hand(self, row: int) -> Hand:
        """The clock's state after record `row`."""
        return Hand(int(self.high_ms[row]), float(self.due_ms[row]))


def parse_speed(text: str) -> float:
    """Parses a speed: seconds of the recording per second.

    >>> parse_speed("60x"), parse_speed("0.5"), parse_speed("max")
    (60.0, 0.5, inf)

    Raises:
        SettingsError: The text is not a speed.
    """
    try:
        speed = MAX if text == "max" else float(text.removesuffix("x"))
    except ValueError:
        speed = 0.0
    if not speed > 0 or (math.isinf(speed) and text != "max"):
        raise SettingsError(f"--speed {text}: write a number above 0 such as 60x, or max")
    return speed


def stamp(at_ms: I64, clock: Clock, hand: Hand) -> Stamped:
    """Computes the times of consecutive records.

    Args:
        at_ms: `[n]` int64, recorded times, or NO_TIME: such a record is sent together with the one before it.
        clock: How times are computed.
        hand: The clock's state before the first record.

    >>> stamped = stamp(np.array([0, 60_000, NO_TIME]), Clock(60.0, False, 0, 60_000), Hand(NO_TIME, 1e6))
    >>> stamped.at_ms.tolist() == [1_000_000, 1_001_000, NO_TIME], stamped.due_ms.tolist()
    (True, [1000000.0, 1001000.0, 1001000.0])
    """
    timed = at_ms != NO_TIME
    stray = (at_ms > clock.newest_ms) & (clock.newest_ms != NO_TIME)
    high = np.maximum.accumulate(np.concatenate([[np.int64(hand.high_ms)], np.where(stray, NO_TIME, at_ms)]))
    steps = np.zeros(len(at_ms))
    if not math.isinf(clock.speed):
        has_gap = high[:-1] != NO_TIME  # the first click has no gap before it
        steps[has_gap] = np.minimum((high[1:][has_gap] - high[:-1][has_gap]) / clock.speed, clock.longest_wait_ms)
    due = hand.due_ms + np.cumsum(steps)
    at = at_ms.copy()
    if clock.keep:
        # A row without a time gets a Kafka timestamp of today, because it has no recorded time.
        return Stamped(at, np.where(timed, NO_TIMESTAMP, clock.now_ms), due, high[1:])
    if math.isinf(clock.speed):
        if timed.any():
            at[timed] += clock.now_ms - clock.newest_ms
        return Stamped(at, np.full(len(at), clock.now_ms, np.int64), due, high[1:])
    late_ms = np.where(stray, clock.newest_ms, high[1:])[timed] - at_ms[timed]
    at[timed] = (due[timed] - late_ms / clock.speed).astype(np.int64)
    return Stamped(at, due.astype(np.int64), due, high[1:])
