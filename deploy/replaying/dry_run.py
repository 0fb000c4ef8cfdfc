"""What a replay would send, without Kafka: counts, the refused rows by reason and line, the first events. `replay --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from deploy.replaying.clock import Hand, stamp
from deploy.replaying.journal import Position
from deploy.replaying.judging import Judge, refuse_all_dead
from deploy.replaying.options import Options
from deploy.replaying.reading import open_recording
from deploy.replaying.sender import LARGEST_VALUE, Piece
from state.config.sections import Events
from state.recordings.crowd import as_utc, told_apart
from state.recordings.files import Recording
from state.recordings.rows import NO_TIME, EncodedRows, shown_reasons

PIECE_ROWS = 4096
NAMED_LINES = 5
SHOWN_EVENTS = 3


@dataclass
class Found:
    """What a replay would send.

    Attributes:
        rows: Rows read.
        refused: Reason -> how many rows the stream would refuse, and where the first of them stand.
        unsendable: Where the rows stand that no record holds.
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
