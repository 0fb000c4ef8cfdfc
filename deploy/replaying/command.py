"""`springtide replay FILE...`: sends the rows of a recording to the clicks topic, in order and each at its time.

    read -> encode -> order -> stamp -> (wait) -> judge -> journal -> send -> acknowledged

A journal records the progress, so that a replay that was interrupted continues where it stopped.

Every row of the files ends up in the topic, where the stream makes it a click or a dead letter. A
row that no record can hold is counted and named here instead.

Before Kafka is contacted, the files and the mapping are checked. The command reports which rows the
stream will refuse, why, and by which setting. It stops if no row is a click.

`replay --dry-run` sends nothing and needs no Kafka. It reports counts, the refused rows by reason
and line, and the first events.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TextIO

import numpy as np

from deploy.replaying.clock import MAX, NO_TIMESTAMP, Clock, Hand, Stamped, parse_speed, stamp
from deploy.replaying.journal import Position, ReplayJournal, folder_of, key_of
from deploy.replaying.options import Options
from deploy.replaying.progress import Progress
from deploy.replaying.reading import open_recording
from deploy.replaying.sender import LARGEST_VALUE, Outbox, Piece, Record, missing, rows_within
from state.config.sections import Events
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import DecodeError, LogError, SettingsError
from state.events.dead_letters import DeadLetter, Reason
from state.events.decoding import load_decoder, parse_time
from state.events.identity import Salt
from state.events.parser import Parser
from state.log import PartitionBatch, Topics, topic_plan
from state.process import killpoints
from state.process.wall_clock import wall_ms
from state.recordings.crowd import as_utc, told_apart
from state.recordings.files import Recording, digest
from state.recordings.options import add_file_arguments, chosen
from state.recordings.rows import I64, NO_TIME, EncodedRows, Encoder, mapped_fields, shown_reasons

ENOUGH_ROWS = 10  # if so many rows are refused and none is a click, all of them have an error
TOO_OLD, TOO_NEW = "events.max_age_s", "events.max_future_s"
SLICE_S = 0.1
LOOK_S = 0.5
PIECE_ROWS = 4096
NAMED_LINES = 5
SHOWN_EVENTS = 3
COLUMNS_ROWS = 1
CHUNK_ROWS = 1000
MOST_ROWS = 100_000


class Judge:
    """Determines which records will be dead letters, with the parser that the stream runs.

    Args:
        events: The section `[events]`.
    """

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
        return {letter.offset: self._told(letter, int(piece.kafka_ms[letter.offset])) for letter in dead}

    def _told(self, letter: DeadLetter, kafka_ms: int) -> str:
        if letter.reason is not Reason.IMPLAUSIBLE_TIME or letter.value is None or kafka_ms < 0:
            return str(letter.reason)
        try:
            after_ms = parse_time(self._decode(letter.value).time, self._events.time_unit) - kafka_ms
        # A time that no setting could let pass.
        except DecodeError:
            return str(letter.reason)
        if after_ms > self._events.max_future_s * 1000:
            return f"{letter.reason} by {TOO_NEW}"
        return f"{letter.reason} by {TOO_OLD}" if after_ms < -self._events.max_age_s * 1000 else str(letter.reason)


def refuse_all_dead(refused: Mapping[int, str], count: int, oldest_s: float = 0.0) -> None:
    """Stops before the topic is filled with dead letters.

    Args:
        refused: Row -> reason, of the first rows.
        count: How many rows those are.
        oldest_s: Age of the oldest record relative to its Kafka timestamp.

    Raises:
        SettingsError: None of them is a click.
    """
    if count < ENOUGH_ROWS or len(refused) < count:
        return
    reasons = Counter(refused.values())
    ((most, _),) = reasons.most_common(1)
    if most.endswith(TOO_OLD):
        do = (
            f"they lie up to {oldest_s:,.0f} s before the newest row: raise {TOO_OLD}, here and for the stream, "
            "leave them out, or say --keep-time"
        )
    elif most.endswith(TOO_NEW):
        do = "their times are later than this machine's clock: look at both, and at events.time_unit"
    else:
        do = "correct [events] (fields, actions, time_unit, decoder), --columns or --constant"
    raise SettingsError(
        f"none of the first {count:,} rows is a click: {shown_reasons(reasons)}", f"{do}; nothing was sent"
    )


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        sent: Rows of this run.
        late: Of these, those after a row of a later time.
        total: Rows of the recording, where they are known.
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
    """Sends the recording from the journal's position to its end, `options.limit` or `stopped`.

    1. Look up in the topic the piece that was in flight when the last run ended,
       and send the part that did not arrive.
    2. For each piece: record it in the journal, send it, and wait until all of it
       is acknowledged.

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
        """Sends the rest; returns what the run did."""
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
                # A pause between two runs is not a gap: the clock continues from now.
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


@dataclass
class Found:
    """What a replay would send.

    Attributes:
        rows: Rows read.
        refused: Reason -> number of rows that the stream would refuse, and the lines of the first of them.
        unsendable: Lines of the rows that no record can hold.
        first: The first events as they would be sent.
        recorded: Earliest and latest recorded time of the clicks; NO_TIME where none has one.
        sent: The same as they would be sent.
        stray: What was told apart; empty where nothing was.
    """

    rows: int = 0
    refused: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    unsendable: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    recorded: tuple[int, int] = (NO_TIME, NO_TIME)
    sent: tuple[int, int] = (NO_TIME, NO_TIME)
    stray: str = ""

    @property
    def clicks(self) -> int:
        """Rows of which the stream would make clicks."""
        return self.rows - len(self.unsendable) - sum(count for count, _ in self.refused.values())


def try_out(recording: Recording, events: Events, options: Options, now_ms: int) -> Found:
    """Does what a replay that began at `now_ms` would do, from the first row on, but sends nothing.

    Raises:
        SettingsError: None of the first rows is a click, or they do not fit into memory.
        UnreadableRecording: A file is cut or damaged.
    """
    hand = Hand(NO_TIME, float(now_ms))
    opened = open_recording(recording, events, options, Position(now_ms, NO_TIME, 0, 0, hand, {}, {}))
    clock, judge, found = options.clock(now_ms, opened.newest_ms), Judge(events), Found()
    if opened.crowd is not None and opened.crowd.first is not None:
        found.stray = told_apart(opened.crowd, _place(recording, *opened.crowd.first), events.max_age_s)
    for encoded in _cut(opened.chunks, options.limit):
        stamped = stamp(encoded.at_ms, clock, hand)
        hand = stamped.hand(len(encoded) - 1)
        values = opened.encoder.values(encoded, stamped.at_ms)
        refused = judge.judge(Piece(encoded.keys, values, stamped.kafka_ms))
        if not found.rows:
            refuse_all_dead(refused, len(encoded), stamped.oldest_s(len(encoded)))
        found.rows += len(encoded)
        for row, value in enumerate(values):
            where = _place(recording, int(encoded.file[row]), int(encoded.line[row]))
            if len(value) > LARGEST_VALUE:
                found.unsendable.append(where)
            elif reason := refused.get(row):
                count, places = found.refused.get(reason, (0, []))
                found.refused[reason] = count + 1, [*places, where][:NAMED_LINES]
            else:
                if len(found.first) < SHOWN_EVENTS:
                    found.first.append(value.decode())
                if encoded.at_ms[row] != NO_TIME:
                    found.recorded = _wider(found.recorded, int(encoded.at_ms[row]))
                    found.sent = _wider(found.sent, int(stamped.at_ms[row]))
    return found


def _cut(chunks: Iterator[EncodedRows], limit: int | None) -> Iterator[EncodedRows]:
    """Pieces of at most `PIECE_ROWS` rows, of `limit` in all."""
    left = limit
    for chunk in chunks:
        for first in range(0, len(chunk), PIECE_ROWS):
            part = chunk.cut(first, first + (PIECE_ROWS if left is None else min(PIECE_ROWS, left)))
            if not len(part):
                return
            left = None if left is None else left - len(part)
            yield part


def _wider(span: tuple[int, int], at_ms: int) -> tuple[int, int]:
    return (at_ms, at_ms) if span[0] == NO_TIME else (min(span[0], at_ms), max(span[1], at_ms))


def _place(recording: Recording, file: int, line: int) -> str:
    return f"{recording.files[file].path}:{line}"


def report(found: Found, files: int, topic: str) -> str:
    """What was found, in lines.

    >>> print(report(Found(9, {"wrong_type": (3, ["a.csv:4", "a.csv:7"])}, [], ['{"user":"u"}']), 1, "clicks"))
    9 rows of 1 file: 6 clicks, 3 dead letters (3 wrong_type)
    wrong_type: a.csv:4, :7 and 1 more
    the first events as they would be sent to clicks:
      {"user":"u"}
    nothing was sent: without --dry-run the same command sends the rows
    """
    counts = {reason: count for reason, (count, _) in found.refused.items()}
    unsendable = f", {len(found.unsendable):,} too large to send" if found.unsendable else ""
    lines = [
        f"{found.rows:,} rows of {files} file{'s' * (files != 1)}: {found.clicks:,} clicks, "
        f"{shown_reasons(counts)}{unsendable}"
    ]
    named = {reason: places for reason, (_, places) in found.refused.items()} | {"too large to send": found.unsendable}
    for reason, places in named.items():
        more = counts.get(reason, len(places)) - len(places[:NAMED_LINES])
        if places:
            lines.append(f"{reason}: {_listed(places[:NAMED_LINES])}{f' and {more:,} more' if more else ''}")
    if found.stray:
        lines.append(found.stray)
    if found.recorded[0] != NO_TIME:
        lines.append(f"recorded {_span(found.recorded)}, sent as {_span(found.sent)}")
    if found.first:
        lines += [f"the first events as they would be sent to {topic}:", *(f"  {value}" for value in found.first)]
    return "\n".join([*lines, "nothing was sent: without --dry-run the same command sends the rows"])


def _listed(places: Sequence[str]) -> str:
    """Places, the file of each only where it is another than before."""
    files = ["", *(place.rpartition(":")[0] for place in places)]
    return ", ".join(
        place.removeprefix(before) if file == before else place
        for place, file, before in zip(places, files[1:], files, strict=False)
    )


def _span(span: tuple[int, int]) -> str:
    return f"{as_utc(span[0])} to {as_utc(span[1])}"


def check(recording: Recording, events: Events, latest_ms: int) -> None:
    """Opens each file, and reads on in them until a row is a click.

    Times are not compared with today here: that depends on how they are moved.

    Args:
        recording: The files.
        events: How their columns are fields.
        latest_ms: Later times are none.

    Raises:
        SettingsError: A field is no column of a file, or none of the first rows is a click.
        UnreadableRecording: A file is cut or damaged.
    """
    fields = mapped_fields(events)
    for number in range(len(recording.files)):
        with closing(recording.rows(number, fields, COLUMNS_ROWS)) as rows:
            next(rows, None)
    judge, encoder = Judge(events), Encoder(events, recording.constants or {}, latest_ms)
    refused: dict[int, str] = {}
    seen = 0
    with closing(_encoded(recording, fields, encoder)) as chunks:
        for encoded in chunks:
            stamps = np.full(len(encoded), NO_TIMESTAMP, np.int64)
            found = judge.judge(Piece(encoded.keys, encoder.values(encoded, encoded.at_ms), stamps))
            refused |= {seen + row: reason for row, reason in found.items()}
            seen += len(encoded)
            if len(refused) < seen or seen >= MOST_ROWS:
                break
    refuse_all_dead(refused, seen)


def _encoded(recording: Recording, fields: Sequence[str], encoder: Encoder) -> Generator[EncodedRows]:
    for number in range(len(recording.files)):
        with closing(recording.rows(number, fields, CHUNK_ROWS)) as chunks:
            yield from (encoder.encode(rows, number) for rows in chunks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of files; `--speed` and `--limit` are shared with the shoppers and not among them."""
    add_file_arguments(parser, "Only the columns in [events] are sent. The same command resumes where it stopped.")
    times = parser.add_mutually_exclusive_group()
    times.add_argument(
        "--rebase-time",
        action="store_false",
        dest="keep_time",
        default=False,
        help="shift times to now (default): the time of the newest click with --speed max, or of the current click with 60x",
    )
    times.add_argument("--keep-time", action="store_true", help="keep the recorded times")
    parser.add_argument(
        "--longest-wait",
        type=float,
        default=10.0,
        metavar="S",
        help="maximum pause in seconds for a gap in the recording (default 10)",
    )
    parser.add_argument("--restart", action="store_true", help="start again from the beginning")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="send nothing and do not connect to Kafka; print counts, refused rows by reason and line, and the first events",
    )


def identity(recording: Recording, events: Events, options: Options, topic: str, topic_id: str) -> dict[str, Any]:
    """What makes two runs the same replay: files by content, mapping, order, kind of time, and the topic."""
    return {
        "files": [[digest(file.path), file.format, file.delimiter] for file in recording.files],
        "columns": list(recording.columns),
        "constants": dict(recording.constants or {}),
        "fields": [*mapped_fields(events), events.time, events.label, events.time_unit],
        "sort": options.sort,
        "time": "kept" if options.keep else "newest is now" if options.speed == MAX else "paced",
        "topic": [topic, topic_id],
    }


def run(
    options: argparse.Namespace,
    settings: Settings,
    stopped: threading.Event,
    say: Callable[[str], None] = print,
    progress_to: TextIO = sys.stderr,
) -> None:
    """Replays the files named on the command line.

    1. Check files, columns and mapping.
    2. With `--dry-run`, report the findings and stop.
    3. Contact Kafka, and send the rows.

    Raises:
        SpringtideError: Files, settings, Kafka or another replay of the same files are in the way.
    """
    events, topic = settings.events, settings.kafka.clicks_topic
    recording = chosen(options, events)
    how = Options(
        sort=options.sort,
        speed=parse_speed(options.speed or "max"),
        keep=options.keep_time,
        limit=options.limit,
        longest_wait_s=options.longest_wait,
    )
    if not how.longest_wait_s >= 0:
        raise SettingsError(f"--longest-wait {options.longest_wait:g}: write seconds, 0 or more")
    # 1.
    now_ms = wall_ms()
    check(recording, events, now_ms + round(events.max_future_s * 1000))
    # 2.
    if options.dry_run:
        say(report(try_out(recording, events, how, now_ms), len(recording.files), topic))
        return
    # 3.
    progress = Progress(progress_to, time.monotonic)
    with ExitStack() as stack:
        with Topics(settings.kafka) as topics:
            topic_id = topics.ensure(*topic_plan.clicks(settings)).topic_id
        folder = folder_of(settings.state_dir, key_of(identity(recording, events, how, topic, topic_id)))
        stack.enter_context(DirectoryLock(folder))
        journal = ReplayJournal(folder)
        if options.restart:
            journal.forget()
        outbox = stack.enter_context(Outbox(settings.kafka, topic))
        try:
            outcome = replay(recording, events, how, outbox, journal, progress, stopped, wall_ms)
        except LogError:
            progress.say("Kafka stopped the replay; the same command goes on where it was")
            raise
    say(summary(outcome, topic, progress.took_s))


def summary(outcome: Outcome, topic: str, took_s: float) -> str:
    """What a run did and how to continue."""
    position = outcome.position
    if position.complete and not outcome.sent:
        return f"all {position.acknowledged:,} rows are in {topic} already; --restart sends them again"
    done = f"sent {outcome.sent:,} rows to {topic} in {took_s:.1f} s ({outcome.sent / took_s:,.0f} rows/s)"
    parts = [f"{outcome.clicks:,} clicks", shown_reasons(position.refused)]
    if outcome.late:
        parts.append(f"{outcome.late:,} rows were late")
    if position.unsendable:
        parts.append(f"{position.unsendable:,} too large to send")
    of = "" if outcome.total is None else f" of {outcome.total:,}"
    state = (
        "complete" if position.complete else f"row {position.acknowledged:,}{of}; the same command goes on from there"
    )
    return f"{done}: {', '.join(parts)}; {state}"
