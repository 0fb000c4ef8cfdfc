"""Sends records of attributes into their topic: acknowledged, and refused rows named and counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from deploy.replaying.attribute_records import AttributeFiles, encode
from deploy.replaying.progress import Progress
from deploy.replaying.sender import Piece, rows_within
from state.errors import SettingsError
from state.recordings.rows import RecordedRows, shown_reasons

ENOUGH_ROWS = 10  # so many rows and no record: the mapping is wrong
REFUSED = "refused row"
BY_SIDE = {"user": "users", "item": "items"}


@dataclass
class SentAttributes:
    """What became of the rows of one side.

    Attributes:
        sent: Records.
        refused: Rows by reason.
        valued: Per attribute the records that have a value.
        complete: Whether the files were read to their ends.
    """

    sent: int
    refused: Counter[str]
    valued: Counter[str]
    complete: bool = False


def send(
    files: AttributeFiles,
    deliver: Callable[[Piece], object],
    progress: Progress,
    stopped: threading.Event,
    wall_ms: Callable[[], int],
) -> SentAttributes:
    """Sends the records of all files of one side, until their ends or `stopped`.

    Args:
        files: What to send.
        deliver: Takes records and returns when they are acknowledged.
        progress: Is told.
        stopped: Ends it between two pieces.
        wall_ms: Unix time, the records' timestamp.

    Raises:
        SettingsError: The columns do not fit, or none of the first rows is a record.
        UnreadableRecording: A file is cut or damaged.
        LogError: Kafka refused, or did not answer: run it again.
    """
    outcome = SentAttributes(0, Counter(), Counter())
    for number, rows in _chunks(files):
        made = encode(rows, files)
        reasons = Counter(reason for _, reason in made.refused)
        if not outcome.sent and not made.records and len(rows) >= ENOUGH_ROWS:
            raise SettingsError(
                f"none of the first {len(rows):,} rows of {files.recording.files[number].path} is a record of "
                f"{article(files.side)}: {shown_reasons(reasons, REFUSED)}",
                f"{files.recording.remedy}; nothing was sent",
            )
        for row, reason in made.refused:
            progress.name(f"{files.recording.files[number].path}:{int(rows.lines[row])}", reason)
        outcome.refused += reasons
        outcome.valued += made.valued
        left = made.records
        while left:
            if stopped.is_set():
                return outcome
            count = rows_within([len(key) + len(value) for key, value in left])
            keys, values = zip(*left[:count], strict=True)
            deliver(Piece(keys, values, np.full(count, wall_ms(), np.int64)))
            left = left[count:]
            outcome.sent += count
            seen = outcome.sent + outcome.refused.total()
            progress.show(seen, seen, None, outcome.refused.total())
    outcome.complete = True
    return outcome


def _chunks(files: AttributeFiles) -> Iterator[tuple[int, RecordedRows]]:
    for number in range(len(files.recording.files)):
        for rows in files.recording.rows(number, files.columns):
            yield number, rows


def article(side: str) -> str:
    """A side with its article.

    >>> article("user"), article("item")
    ('a user', 'an item')
    """
    return f"an {side}" if side == "item" else f"a {side}"


def summary(files: AttributeFiles, outcome: SentAttributes, took_s: float) -> str:
    """What a run did.

    A name that no record has a value for may be misspelled; a file of JSON lines does not tell.
    """
    seen = outcome.sent + outcome.refused.total()
    parts = [
        f"sent {outcome.sent:,} records of {BY_SIDE[files.side]} to {files.topic} in {took_s:.1f} s "
        f"({seen / took_s:,.0f} rows/s), {shown_reasons(outcome.refused, REFUSED)}",
    ]
    parts += [
        f"no record has a value for {one.name}: is the field {one.path!r} spelled so?"
        for one in files.table.fields
        if outcome.sent and not outcome.valued[one.name]
    ]
    parts.append("complete" if outcome.complete else "stopped before the end: the same command sends all of it again")
    return "; ".join(parts)
