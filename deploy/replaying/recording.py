"""Sends the rows of a recording to the clicks topic, in order and each at its time.

    read -> encode -> order -> stamp -> (wait) -> judge -> journal -> send -> acknowledged

Every row of the files ends up in the topic, where the stream makes it a click or a dead letter. A row that no record can
hold is counted and named here instead. A dry run takes the same steps up to the judgement of each row.

When each recorded click is sent, and with which time:

    times     speed   event time                        Kafka timestamp   sent
    rebased   max     recorded + (now - newest)         now, if possible  at once
    rebased   60x     when it is sent, if not late      when it is sent   paced
    kept      max     recorded                          none              at once
    kept      60x     recorded                          none              paced

- Rebased at full speed, the newest click gets the wall clock's time at the start, and gaps stay as recorded.
- Rebased at 60x, an hour passes in a minute. The click being sent gets the current time, and gaps are a sixtieth. A
  click that follows a later one is late by as much as in the recording, divided by the speed.
- A kept time is never compared with today. Those records carry no Kafka timestamp, so that neither the parser's bounds
  nor the topic's retention apply to them. The same holds for a rebased time more than `events.max_age_s` before now.
- A stray (see `state/recordings/rows.py`) moves no clock, and keeps its distance to the newest of the other rows. The
  parser refuses it.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import psutil

from deploy.replaying.sender import LARGEST_VALUE, Outbox, Piece, Progress, missing, rows_within
from state import layout
from state.config.sections import Events
from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptStore, DecodeError, SettingsError
from state.events.decoding import DeadLetter, Reason, load_decoder, parse_time
from state.events.identity import Salt
from state.events.parser import Parser
from state.log import PartitionBatch
from state.process import killpoints
from state.recordings.files import Recording, refuse_beyond_memory
from state.recordings.rows import (
    I64,
    NO_TIME,
    NO_TIMESTAMP,
    EncodedRows,
    Encoder,
    RecordedTimes,
    Span,
    far_ms,
    joined,
    mapped_fields,
    order,
    shown_reasons,
)

MAX = math.inf

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clock:
    """How event times, timestamps and send times are computed.

    Attributes:
        speed: Seconds of the recording per second of wall clock; MAX: no pacing.
        keep: Keep event times as recorded.
        now_ms: Wall clock at the start of the replay; unchanged by a restart.
        span: The recorded times without strays.
        max_age_ms: The parser refuses a row that is older than this at its Kafka timestamp.
        longest_wait_ms: Upper bound of the pause for one gap, however long the gap is in the recording.
    """

    speed: float
    keep: bool
    now_ms: int
    span: Span
    max_age_ms: int
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

    >>> clock = Clock(60.0, False, 0, Span(0, 60_000), 3_600_000)
    >>> stamped = stamp(np.array([0, 60_000, NO_TIME]), clock, Hand(NO_TIME, 1e6))
    >>> stamped.at_ms.tolist() == [1_000_000, 1_001_000, NO_TIME], stamped.due_ms.tolist()
    (True, [1000000.0, 1001000.0, 1001000.0])
    """
    timed = at_ms != NO_TIME
    stray, newest_ms = clock.span.is_stray(at_ms), clock.span.newest_ms
    high = np.maximum.accumulate(np.concatenate([[np.int64(hand.high_ms)], np.where(stray, NO_TIME, at_ms)]))
    steps = np.zeros(len(at_ms))
    if not math.isinf(clock.speed):
        has_gap = high[:-1] != NO_TIME  # the first click has no gap before it
        steps[has_gap] = np.minimum((high[1:][has_gap] - high[:-1][has_gap]) / clock.speed, clock.longest_wait_ms)
    due = hand.due_ms + np.cumsum(steps)
    if clock.keep:
        return Stamped(at_ms, clock.span.kept_stamps(at_ms, clock.now_ms), due, high[1:])
    if math.isinf(clock.speed):
        kafka_ms, high_ms, speed = np.full(len(at_ms), clock.now_ms, np.int64), np.full_like(at_ms, newest_ms), 1.0
    else:
        kafka_ms, high_ms, speed = due.astype(np.int64), high[1:], clock.speed
    at = at_ms.copy()
    moved = timed & ~stray
    at[moved] = (kafka_ms[moved] - (high_ms[moved] - at_ms[moved]) / speed).astype(np.int64)
    at[stray] = kafka_ms[stray] + (at_ms[stray] - newest_ms)
    kafka_ms[moved & (at < kafka_ms - clock.max_age_ms)] = NO_TIMESTAMP
    return Stamped(at, kafka_ms, due, high[1:])


ENOUGH_ROWS = 10  # if so many rows are refused and none is a click, all of them have an error
TOO_OLD, TOO_NEW = "events.max_age_s", "events.max_future_s"
SLICE_ROWS = 4096
SLICE_S = 0.1
POLL_S = 0.5
NAMED_LINES = 5
SHOWN_EVENTS = 3
COLUMNS_ROWS = 1
CHUNK_ROWS = 1000
MOST_ROWS = 100_000


@dataclass(frozen=True)
class Options:
    """Options of a replay.

    Attributes:
        sort: memory (read everything, then order by time) or assume (the files are in order).
        speed: Seconds of the recording per second, or MAX.
        limit: How many rows to send in this run; None: all.
    """

    sort: str = "memory"
    speed: float = MAX
    keep: bool = False
    limit: int | None = None
    longest_wait_s: float = 10.0


FILE = "journal.json"


@dataclass(frozen=True)
class Position:
    """The position of a replay.

    Attributes:
        now_ms: Wall clock at the start of its first run.
        newest_ms: Latest time of the recording without strays; NO_TIME if no row has a time.
        acknowledged: Rows of the recording that are done.
        sending: Rows that are done when the piece in flight has arrived; equal to `acknowledged` if there is none.
        hand: The clock's state before the piece in flight.
        ends: By partition, a position before which nothing of the piece in flight can be.
        refused: By reason, the rows so far that become dead letters in the stream.
        unsendable: Rows so far that are too large for a record.
        complete: Whether the recording has ended.
        oldest_ms: Earliest time of the recording without strays; NO_TIME if no row is a stray for being early.
    """

    now_ms: int
    newest_ms: int
    acknowledged: int
    sending: int
    hand: Hand
    ends: Mapping[int, int]
    refused: Mapping[str, int]
    unsendable: int = 0
    complete: bool = False
    format: Literal[1] = 1
    oldest_ms: int = NO_TIME

    def after(self, hand: Hand, ends: Mapping[int, int]) -> Position:
        """The position once the piece in flight has arrived."""
        return replace(self, acknowledged=self.sending, hand=hand, ends=dict(ends))


def key_of(identity: Mapping[str, Any]) -> str:
    """The key of a recording with its options: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ReplayJournal:
    """The position of one replay, on disk. For one process at a time: hold a lock on `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> Position | None:
        """The stored position; None if there is none.

        Raises:
            CorruptStore: The file cannot be read, or another release wrote it.
        """
        try:
            return documents.decode(self._path.read_bytes(), Position)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CorruptStore(
                f"{self._path}: not readable ({error})", "--restart sends the recording again from its beginning"
            ) from None

    def write(self, position: Position) -> None:
        """Stores a position durably."""
        durable.replace(self._path, msgspec.json.encode(position))

    def forget(self) -> None:
        """Removes the stored position, so that the replay starts again from the beginning."""
        self._path.unlink(missing_ok=True)
        durable.sync_directory(self._path.parent)


def folder_of(state_dir: Path, key: str) -> Path:
    """The journal's directory; creates it if it is missing."""
    folder = state_dir / layout.REPLAY / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class RecordingSource:
    """A recording, and how it is replayed."""

    recording: Recording
    events: Events
    options: Options

    def where(self, file: int, line: int) -> str:
        """Names a row by its file and line."""
        return f"{self.recording.files[file].path}:{line}"


def _slices(encoded: EncodedRows, rows: I64, skipped: int) -> Iterator[EncodedRows]:
    for first in range(skipped, len(encoded), SLICE_ROWS):
        yield encoded.take(rows[first : first + SLICE_ROWS])


def _behind(chunks: Iterator[EncodedRows], skipped: int) -> Iterator[EncodedRows]:
    for encoded in chunks:
        if skipped < len(encoded):
            yield encoded.cut(skipped, len(encoded))
        skipped = max(0, skipped - len(encoded))


class Judge:
    """Determines which records will be dead letters, with the parser that the stream runs."""

    def __init__(self, events: Events) -> None:
        # Whether a record is refused does not depend on the salt, and no parsed data is kept.
        self._parser = Parser(events, Salt(b"only judges"))
        self._decode = load_decoder(events)
        self._events = events

    def judge(self, piece: Piece) -> dict[int, str]:
        """Row -> reason, with the setting that decides where one does."""
        count = len(piece)
        offsets = np.arange(count, dtype=np.int64)
        batch = PartitionBatch("0" * 32, 0, 0, count, offsets, piece.kafka_ms, list(piece.keys), list(piece.values))
        dead: tuple[DeadLetter, ...] = self._parser.parse([batch]).dead
        return {
            letter.offset: self._reason(letter.reason, piece.values[letter.offset], int(piece.kafka_ms[letter.offset]))
            for letter in dead
        }

    def _reason(self, reason: Reason, value: bytes, kafka_ms: int) -> str:
        if reason is not Reason.IMPLAUSIBLE_TIME or kafka_ms < 0:
            return str(reason)
        try:
            after_ms = parse_time(self._decode(value).time, self._events.time_unit) - kafka_ms
        # No setting would accept this time.
        except DecodeError:
            return str(reason)
        if after_ms > self._events.max_future_s * 1000:
            return f"{reason} by {TOO_NEW}"
        return f"{reason} by {TOO_OLD}" if after_ms < -self._events.max_age_s * 1000 else str(reason)


def _refuse_all_dead(refused: Mapping[int, str], count: int) -> None:
    """Stops if none of the first `count` rows is a click."""
    if count < ENOUGH_ROWS or len(refused) < count:
        return
    reasons = Counter(refused.values())
    ((most, _),) = reasons.most_common(1)
    if most.endswith(TOO_NEW):
        do = "their times are later than this machine's clock: check both, and events.time_unit"
    else:
        do = "correct [events] (fields, actions, time_unit, decoder), --columns or --constant"
    raise SettingsError(
        f"none of the first {count:,} rows is a click: {shown_reasons(reasons)}", f"{do}; nothing was sent"
    )


class _JudgedPiece(NamedTuple):
    """Consecutive rows, and the records that they are sent as.

    Attributes:
        at_ms: `[n]` int64, their event times as sent.
        piece: The records, one for each row that a record can hold.
        numbers: The row of each record.
        refused: Row -> why the stream will refuse it.
        too_large: Rows that no record can hold.
    """

    rows: EncodedRows
    at_ms: I64
    piece: Piece
    numbers: list[int]
    refused: dict[int, str]
    too_large: list[int]


class _Walk:
    """Reads a recording from a position on, and turns its rows into judged pieces.

    Attributes:
        total: Rows of the recording; None if they are not counted yet.
        clock: Computes the times.
        stray: Describes the strays; empty without any.
    """

    def __init__(self, source: RecordingSource, position: Position) -> None:
        recording, events, options = source.recording, source.events, source.options
        span, times = Span(position.oldest_ms, position.newest_ms), RecordedTimes()
        find_span = position.newest_ms == NO_TIME
        # Times of a recording are in the past.
        latest_ms = position.now_ms + round(events.max_future_s * 1000)
        self._judge, self._encoder = Judge(events), Encoder(events, recording.constants or {}, latest_ms)
        self.total: int | None = None
        self.stray = ""
        if options.sort == "memory":
            refuse_beyond_memory(recording, psutil.virtual_memory().available)
            encoded = joined(list(recording.encoded(self._encoder, events)))
            self.total, self.chunks = len(encoded), _slices(encoded, order(encoded.at_ms), position.acknowledged)
            if find_span:
                times.add(encoded.at_ms, encoded.file, encoded.line)
        else:
            self.chunks = _behind(recording.encoded(self._encoder, events), position.acknowledged)
            if find_span:
                times = recording.times(events, latest_ms)
        if find_span:
            span = times.span(far_ms(events))
            self.stray = recording.described(span, far_ms(events))
        max_age_ms, longest_wait_ms = round(events.max_age_s * 1000), options.longest_wait_s * 1000
        self.clock = Clock(options.speed, options.keep, position.now_ms, span, max_age_ms, longest_wait_ms)

    def records(self, rows: EncodedRows, stamped: Stamped) -> tuple[Piece, list[int]]:
        """The records of rows and, of these, the rows that are records; others are too large."""
        values = self._encoder.values(rows, stamped.at_ms)
        piece = Piece(rows.keys, values, stamped.kafka_ms)
        numbers = [row for row, value in enumerate(values) if len(value) <= LARGEST_VALUE]
        return (piece, numbers) if len(numbers) == len(values) else (piece.take(numbers), numbers)

    def judged(self, encoded: EncodedRows, stamped: Stamped, first: int, after: int) -> _JudgedPiece:
        """The rows from `first` on and before `after`, as many as fit into a piece; at least one."""
        rows = encoded.cut(first, after)
        count = rows_within([len(key) + len(body) for key, body in zip(rows.keys, rows.bodies, strict=True)])
        rows, stamped = rows.cut(0, count), stamped.cut(first, first + count)
        piece, numbers = self.records(rows, stamped)
        refused = {numbers[record]: reason for record, reason in self._judge.judge(piece).items()}
        too_large = sorted({*range(count)} - {*numbers}) if len(numbers) < count else []
        return _JudgedPiece(rows, stamped.at_ms, piece, numbers, refused, too_large)

    def require_click(self, encoded: EncodedRows, stamped: Stamped) -> None:
        """Stops where none of the first rows is a click, however few of them are due."""
        if len(encoded):
            judged = self.judged(encoded, stamped, 0, len(encoded))
            strays = {*np.flatnonzero(self.clock.span.is_stray(judged.rows.at_ms)).tolist()}
            refused = {row: reason for row, reason in judged.refused.items() if row not in strays}
            _refuse_all_dead(refused, len({*judged.numbers} - strays))


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        sent: Rows of this run.
        late: Of these, those after a row of a later time.
        total: Rows of the recording; None if they are not counted.
        position: Progress of the replay.
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


class Replay:
    """Sends a recording from the journal's position to its end, `options.limit` or `stopped`.

    1. Look up in the topic the piece that was in flight when the last run ended, and send the part that did not arrive.
    2. For each piece: record it in the journal, send it, and wait until all of it is acknowledged.
    """

    def __init__(
        self,
        source: RecordingSource,
        destination: Outbox,
        journal: ReplayJournal,
        progress: Progress,
        stopped: threading.Event,
        wall_ms: Callable[[], int],
    ) -> None:
        self._source, self._destination, self._journal = source, destination, journal
        self._progress, self._stopped, self._wall_ms = progress, stopped, wall_ms
        self._sent = self._late = 0

    def run(self) -> Outcome:
        """Sends the rest.

        Raises:
            SettingsError: The columns do not fit, or no row is a click.
            SpringtideError: A file is cut or damaged.
            LogError: Kafka refused a record, or did not answer. Run the replay again.
            CorruptStore: The journal is unreadable.
        """
        now_ms, stored = self._wall_ms(), self._journal.read()
        if stored is not None and stored.complete:
            return Outcome(0, 0, stored.acknowledged, stored)
        begin = Position(now_ms, NO_TIME, 0, 0, Hand(NO_TIME, float(now_ms)), {}, {})
        self._position = replace(begin, ends=self._destination.ends()) if stored is None else stored
        walk = _Walk(self._source, self._position)
        if walk.stray:
            self._progress.say(walk.stray)
        span = walk.clock.span
        self._position = replace(self._position, oldest_ms=span.oldest_ms, newest_ms=span.newest_ms)
        complete = self._send_all(walk)
        self._position = replace(self._position, complete=complete)
        self._journal.write(self._position)
        return Outcome(self._sent, self._late, walk.total, self._position)

    def _send_all(self, walk: _Walk) -> bool:
        """Sends until the end (True) or until limit or stop."""
        hand: Hand | None = None
        limit, total = self._source.options.limit, walk.total
        for chunk in walk.chunks:
            encoded = chunk
            if hand is None:
                # 1. The piece that was in flight.
                encoded = self._recovered(chunk, walk)
                # A pause between two runs is not a gap: the clock continues from now.
                hand = Hand(self._position.hand.high_ms, float(self._wall_ms()))
                self._position = replace(self._position, hand=hand, ends=self._destination.ends())
            # 2. Piece by piece.
            stamped = stamp(encoded.at_ms, walk.clock, hand)
            if not self._position.acknowledged:
                walk.require_click(encoded, stamped)
            first = 0
            while first < len(encoded):
                remaining = len(encoded) if limit is None else limit - self._sent
                if self._stopped.is_set() or remaining <= 0:
                    return False
                now_ms, due = self._wall_ms(), len(encoded)
                if not math.isinf(walk.clock.speed):
                    due = int(np.searchsorted(stamped.due_ms, now_ms, side="right"))
                if due > first:
                    judged = walk.judged(encoded, stamped, first, min(due, first + remaining))
                    first += len(judged.rows)
                    self._deliver(judged, stamped, first)
                else:
                    self._stopped.wait(float(np.clip((stamped.due_ms[first] - now_ms) / 1000, SLICE_S, POLL_S)))
                position = self._position
                self._progress.show(self._sent, position.acknowledged, total, sum(position.refused.values()))
            if len(encoded):
                hand = stamped.hand(len(encoded) - 1)
        return True

    def _recovered(self, chunk: EncodedRows, walk: _Walk) -> EncodedRows:
        """Completes the piece that was in flight; returns the rows behind it."""
        position = self._position
        count = position.sending - position.acknowledged
        if not count:
            return chunk
        stamped = stamp(chunk.at_ms[:count], walk.clock, position.hand)
        piece, _ = walk.records(chunk.cut(0, count), stamped)
        lost = missing(piece, self._destination.arrived_since(position.ends))
        if len(lost):
            self._destination.send(lost)
        self._progress.say(f"the last run ended in the middle of {count:,} rows: {len(lost):,} had not arrived")
        self._position = position.after(stamped.hand(count - 1), position.ends)
        return chunk.cut(count, len(chunk))

    def _deliver(self, judged: _JudgedPiece, stamped: Stamped, after: int) -> None:
        rows, count, position = judged.rows, len(judged.rows), self._position
        for row, reason in judged.refused.items():
            self._progress.name(self._where(rows, row), reason)
        for row in judged.too_large:
            self._progress.say(
                f"{self._where(rows, row)}: not sent: more than {LARGEST_VALUE:,} bytes, no record holds it"
            )
        self._position = replace(
            position,
            sending=position.acknowledged + count,
            refused=dict(Counter(position.refused) + Counter(judged.refused.values())),
            unsendable=position.unsendable + len(judged.too_large),
        )
        self._journal.write(self._position)
        killpoints.reach("replay.promised")
        ends = self._destination.send(judged.piece) if len(judged.piece) else {}
        killpoints.reach("replay.acknowledged")
        self._position = self._position.after(stamped.hand(after - 1), {**position.ends, **ends})
        self._sent += count
        high_ms = stamped.high_ms[after - count : after]
        self._late += int(np.count_nonzero((rows.at_ms != NO_TIME) & (rows.at_ms < high_ms)))

    def _where(self, rows: EncodedRows, row: int) -> str:
        return self._source.where(int(rows.file[row]), int(rows.line[row]))


@dataclass
class Findings:
    """The result of a dry run.

    Attributes:
        rows: Rows read.
        refused: Reason -> number of rows that the stream would refuse, and the lines of the first of them.
        unsendable: Lines of the rows that no record can hold.
        first: The first events as they would be sent.
        recorded: Earliest and latest recorded time of the clicks; NO_TIME where none has one.
        sent: The same as they would be sent.
        stray: Describes the strays; empty without any.
    """

    rows: int = 0
    refused: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    unsendable: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    recorded: tuple[int, int] = (NO_TIME, NO_TIME)
    sent: tuple[int, int] = (NO_TIME, NO_TIME)
    stray: str = ""

    def add(self, judged: _JudgedPiece, source: RecordingSource) -> None:
        """Adds a piece."""
        rows = judged.rows
        self.rows += len(rows)
        for row in (*judged.too_large, *judged.refused):
            where, reason = source.where(int(rows.file[row]), int(rows.line[row])), judged.refused.get(row)
            if reason is None:
                self.unsendable.append(where)
            else:
                count, locations = self.refused.get(reason, (0, []))
                self.refused[reason] = count + 1, [*locations, where][:NAMED_LINES]
        for row, value in zip(judged.numbers, judged.piece.values, strict=True):
            if row in judged.refused:
                continue
            if len(self.first) < SHOWN_EVENTS:
                self.first.append(value.decode())
            if rows.at_ms[row] != NO_TIME:
                self.recorded = _wider(self.recorded, int(rows.at_ms[row]))
                self.sent = _wider(self.sent, int(judged.at_ms[row]))

    @property
    def clicks(self) -> int:
        """Rows of which the stream would make clicks."""
        return self.rows - len(self.unsendable) - sum(count for count, _ in self.refused.values())


def try_out(source: RecordingSource, now_ms: int) -> Findings:
    """Takes all steps of a replay that began at `now_ms`, but sends nothing.

    Raises:
        SettingsError: None of the first rows is a click, or they do not fit into memory.
        SpringtideError: A file is truncated or damaged.
    """
    hand = Hand(NO_TIME, float(now_ms))
    walk = _Walk(source, Position(now_ms, NO_TIME, 0, 0, hand, {}, {}))
    findings = Findings(stray=walk.stray)
    remaining = math.inf if source.options.limit is None else source.options.limit
    for chunk in walk.chunks:
        encoded = chunk if len(chunk) <= remaining else chunk.cut(0, int(remaining))
        if not len(encoded):
            break
        stamped = stamp(encoded.at_ms, walk.clock, hand)
        hand = stamped.hand(len(encoded) - 1)
        if not findings.rows:
            walk.require_click(encoded, stamped)
        first = 0
        while first < len(encoded):
            judged = walk.judged(encoded, stamped, first, len(encoded))
            findings.add(judged, source)
            first += len(judged.rows)
        remaining -= len(encoded)
    return findings


def _wider(span: tuple[int, int], at_ms: int) -> tuple[int, int]:
    return (at_ms, at_ms) if span[0] == NO_TIME else (min(span[0], at_ms), max(span[1], at_ms))


def check(recording: Recording, events: Events, latest_ms: int) -> None:
    """Opens each file, and reads on in them until a row is a click. Times are not compared with today here.

    A time after `latest_ms` counts as none.

    Raises:
        SettingsError: A field is no column of a file, or none of the first rows is a click.
        SpringtideError: A file is truncated or damaged.
    """
    fields = mapped_fields(events)
    for number in range(len(recording.files)):
        with closing(recording.rows(number, fields, COLUMNS_ROWS)) as rows:
            next(rows, None)
    judge, encoder = Judge(events), Encoder(events, recording.constants or {}, latest_ms)
    refused: dict[int, str] = {}
    read_rows = 0
    with closing(recording.encoded(encoder, events, CHUNK_ROWS)) as chunks:
        for encoded in chunks:
            stamps = np.full(len(encoded), NO_TIMESTAMP, np.int64)
            refusals = judge.judge(Piece(encoded.keys, encoder.values(encoded, encoded.at_ms), stamps))
            refused |= {read_rows + row: reason for row, reason in refusals.items()}
            read_rows += len(encoded)
            if len(refused) < read_rows or read_rows >= MOST_ROWS:
                break
    _refuse_all_dead(refused, read_rows)
