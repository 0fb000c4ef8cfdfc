"""Replays a recording: rows in order, each at its time, into the topic; goes on where it stopped.

    read -> encode -> order -> stamp -> (wait) -> judge -> journal -> send -> acknowledged

Every row of the files ends up in the topic, where the stream makes a click or
a dead letter of it, or is counted and named here because no record can hold
it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from deploy.replaying.clock import Clock, Hand, Stamped, stamp
from deploy.replaying.journal import Position, ReplayJournal
from deploy.replaying.judging import Judge, refuse_all_dead
from deploy.replaying.options import Options
from deploy.replaying.progress import Progress
from deploy.replaying.reading import open_recording
from deploy.replaying.sender import LARGEST_VALUE, Piece, Record, missing, rows_within
from state.config.sections import Events
from state.process import killpoints
from state.recordings.crowd import told_apart
from state.recordings.files import Recording
from state.recordings.rows import I64, NO_TIME, EncodedRows

SLICE_S = 0.1
LOOK_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        sent: Rows of this run.
        late: Of these, those after a row of a later time.
        total: Rows of the recording, where they are known.
        position: Where the replay stands.
    """

    sent: int
    late: int
    total: int | None
    position: Position

    @property
    def clicks(self) -> int:
        """Rows so far of which the stream makes clicks."""
        position = self.position
        return position.acknowledged - sum(position.refused.values()) - position.unsendable


class Destination(Protocol):
    """Where pieces go; see `deploy.replaying.sender.Outbox`."""

    def send(self, piece: Piece) -> Mapping[int, int]:
        """Returns when the piece is acknowledged."""

    def arrived_since(self, ends: Mapping[int, int]) -> list[Record]:
        """What arrived after positions."""

    def ends(self) -> Mapping[int, int]:
        """The end of each partition."""


def replay(
    recording: Recording,
    events: Events,
    options: Options,
    destination: Destination,
    journal: ReplayJournal,
    progress: Progress,
    stopped: threading.Event,
    wall_ms: Callable[[], int],
) -> Outcome:
    """Sends the recording from where the journal says to its end, `options.limit` or `stopped`.

    1. A piece that was in flight when the last run ended is looked up in the
       topic, and what did not arrive is sent.
    2. For each piece: the journal says what is about to be sent; it is sent;
       all of it is acknowledged.

    Raises:
        SettingsError: The columns do not fit, or no row is a click.
        UnreadableRecording: A file is cut or damaged.
        LogError: Kafka refused, or did not answer: run it again.
        CorruptStore: The journal is unreadable.
    """
    now_ms = wall_ms()
    position = journal.read()
    if position is None:
        position = Position(now_ms, NO_TIME, 0, 0, Hand(NO_TIME, float(now_ms)), destination.ends(), {})
    if position.complete:
        return Outcome(0, 0, position.acknowledged, position)
    run = _Run(recording, events, options, destination, journal, progress, stopped, wall_ms, position)
    return run.outcome()


class _Run:
    """One run of a replay; see `replay`."""

    def __init__(
        self,
        recording: Recording,
        events: Events,
        options: Options,
        destination: Destination,
        journal: ReplayJournal,
        progress: Progress,
        stopped: threading.Event,
        wall_ms: Callable[[], int],
        position: Position,
    ) -> None:
        self._recording = recording
        self._events = events
        self._options = options
        self._destination = destination
        self._journal = journal
        self._progress = progress
        self._stopped = stopped
        self._wall_ms = wall_ms
        self._position = position
        self._opened = open_recording(recording, events, options, position)
        self._judge = Judge(events)
        self._sent = self._late = 0

    def outcome(self) -> Outcome:
        """Sends what is left; returns what the run did."""
        opened = self._opened
        if opened.crowd is not None and opened.crowd.first is not None:
            file, line = opened.crowd.first
            first = f"{self._recording.files[file].path}:{line}"
            self._progress.say(told_apart(opened.crowd, first, self._events.max_age_s))
        self._position = replace(self._position, newest_ms=opened.newest_ms)
        clock = self._options.clock(self._position.now_ms, opened.newest_ms)
        complete = self._send_all(clock)
        self._position = replace(self._position, complete=complete)
        self._journal.write(self._position)
        return Outcome(self._sent, self._late, opened.total, self._position)

    def _send_all(self, clock: Clock) -> bool:
        """Sends until the end (True) or until limit or stop."""
        hand: Hand | None = None
        for chunk in self._opened.chunks:
            encoded = chunk
            if hand is None:
                # 1. What was in flight.
                encoded = self._recovered(chunk, clock)
                # A pause between two runs is no gap: the clock goes on from now.
                hand = Hand(self._position.hand.high_ms, float(self._wall_ms()))
                self._position = replace(self._position, hand=hand, ends=self._destination.ends())
            # 2. Piece by piece.
            stamped = stamp(encoded.at_ms, clock, hand)
            if not self._position.acknowledged:
                self._look_first(encoded, stamped)
            first = 0
            while first < len(encoded):
                left = len(encoded) if self._options.limit is None else self._options.limit - self._sent
                if self._stopped.is_set() or left <= 0:
                    return False
                now_ms = self._wall_ms()
                due = int(np.searchsorted(stamped.due_ms, now_ms, side="right"))
                if math.isinf(clock.speed):
                    due = len(encoded)
                if due > first:
                    first += self._deliver(encoded, stamped, first, min(due, first + left))
                else:
                    self._stopped.wait(float(np.clip((stamped.due_ms[first] - now_ms) / 1000, SLICE_S, LOOK_S)))
                position = self._position
                self._progress.show(
                    self._sent, position.acknowledged, self._opened.total, sum(position.refused.values())
                )
            if len(encoded):
                hand = stamped.hand(len(encoded) - 1)
        return True

    def _look_first(self, encoded: EncodedRows, stamped: Stamped) -> None:
        """Stops where none of the first rows is a click, however few of them are due.

        Raises:
            SettingsError: None is.
        """
        first = rows_within([len(key) + len(body) for key, body in zip(encoded.keys, encoded.bodies, strict=True)])
        piece, rows = self._piece(encoded.cut(0, first), stamped.at_ms[:first], stamped.kafka_ms[:first])
        refuse_all_dead(self._judge.judge(piece), len(rows), stamped.oldest_s(first))

    def _recovered(self, chunk: EncodedRows, clock: Clock) -> EncodedRows:
        """Completes the piece that was in flight; returns the rows behind it."""
        position = self._position
        count = position.sending - position.acknowledged
        if not count:
            return chunk
        stamped = stamp(chunk.at_ms[:count], clock, position.hand)
        piece, _ = self._piece(chunk.cut(0, count), stamped.at_ms, stamped.kafka_ms)
        left = missing(piece, self._destination.arrived_since(position.ends))
        if len(left):
            self._destination.send(left)
        self._progress.say(f"the last run ended in the middle of {count:,} rows: {len(left):,} of them had not arrived")
        self._position = position.after(stamped.hand(count - 1), position.ends)
        return chunk.cut(count, len(chunk))

    def _piece(self, encoded: EncodedRows, at_ms: I64, kafka_ms: I64) -> tuple[Piece, list[int]]:
        """The records of rows and, of these, the rows that are records; others are too large."""
        values = self._opened.encoder.values(encoded, at_ms)
        piece = Piece(encoded.keys, values, kafka_ms)
        rows = [row for row, value in enumerate(values) if len(value) <= LARGEST_VALUE]
        return (piece, rows) if len(rows) == len(values) else (piece.take(rows), rows)

    def _deliver(self, encoded: EncodedRows, stamped: Stamped, first: int, after: int) -> int:
        """Sends the next rows, as many as fit into a piece; returns how many."""
        part = encoded.cut(first, after)
        count = rows_within([len(key) + len(body) for key, body in zip(part.keys, part.bodies, strict=True)])
        part = part.cut(0, count)
        after = first + count
        piece, rows = self._piece(part, stamped.at_ms[first:after], stamped.kafka_ms[first:after])
        refused = self._judge.judge(piece)
        for row, reason in refused.items():
            self._progress.name(self._where(part, rows[row]), reason)
        for row in sorted({*range(count)} - {*rows}) if len(rows) < count else ():
            self._progress.say(
                f"{self._where(part, row)}: not sent: more than {LARGEST_VALUE:,} bytes, no record holds it"
            )
        position = self._position
        self._position = replace(
            position,
            sending=position.acknowledged + count,
            refused=dict(Counter(position.refused) + Counter(refused.values())),
            unsendable=position.unsendable + count - len(rows),
        )
        self._journal.write(self._position)
        killpoints.reach("replay.promised")
        ends = self._destination.send(piece) if len(piece) else {}
        killpoints.reach("replay.acknowledged")
        self._position = self._position.after(stamped.hand(after - 1), {**position.ends, **ends})
        self._sent += count
        high_ms = stamped.high_ms[first:after]
        self._late += int(np.count_nonzero((part.at_ms != NO_TIME) & (part.at_ms < high_ms)))
        return count

    def _where(self, encoded: EncodedRows, row: int) -> str:
        return f"{self._recording.files[int(encoded.file[row])].path}:{int(encoded.line[row])}"
