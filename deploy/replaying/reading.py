"""Reads a recording from where a replay stands: its rows in the order of sending, and what is known of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import psutil

from deploy.replaying.journal import Position
from state.config.sections import Events
from state.recordings.files import Recording, refuse_beyond_memory
from state.recordings.rows import I64, NO_TIME, EncodedRows, Encoder, joined, order, time_of

SLICE_ROWS = 4096


class Opened(NamedTuple):
    """A recording that is being read.

    Attributes:
        chunks: The rows that are not acknowledged yet, in the order of sending.
        newest_ms: The latest recorded time; NO_TIME where nobody asked for it.
        total: Rows of the recording; None where they are not counted yet.
    """

    chunks: Iterator[EncodedRows]
    newest_ms: int
    total: int | None


def open_sorted(recording: Recording, events: Events, encoder: Encoder, position: Position) -> Opened:
    """All rows at once, in the order of time.

    Raises:
        SettingsError: They do not fit into memory, or the columns are not there.
        UnreadableRecording: A file is cut or damaged.
    """
    refuse_beyond_memory(recording, psutil.virtual_memory().available)
    whole = joined(list(recording.encoded(encoder, events)))
    newest_ms = int(whole.at_ms.max()) if len(whole) else position.newest_ms
    return Opened(_slices(whole, order(whole.at_ms), position.acknowledged), newest_ms, len(whole))


def open_in_file_order(
    recording: Recording, events: Events, encoder: Encoder, position: Position, find_newest: bool, latest_ms: int
) -> Opened:
    """The rows as the files have them, a chunk at a time.

    Args:
        recording: The files.
        events: Names of fields, and the unit of times.
        encoder: Makes records.
        position: Where the replay stands.
        find_newest: Whether to read all times before the first row.
        latest_ms: Times after this are none.

    Raises:
        SettingsError: The columns are not there.
        UnreadableRecording: A file is cut or damaged.
    """
    newest_ms = position.newest_ms
    if find_newest and newest_ms == NO_TIME:
        newest_ms = newest_time(recording, events, latest_ms)
    return Opened(_behind(recording.encoded(encoder, events), position.acknowledged), newest_ms, None)


def newest_time(recording: Recording, events: Events, latest_ms: int) -> int:
    """The latest recorded time; reads the time column of all files."""
    field, unit, newest_ms = events.time, events.time_unit, NO_TIME
    if not field or field in (recording.constants or {}):
        return newest_ms
    for number in range(len(recording.files)):
        for rows in recording.rows(number, (field,)):
            times = (time_of(value, unit, latest_ms) for value in rows.columns[field])
            newest_ms = max(newest_ms, max(times))
    return newest_ms


def _slices(whole: EncodedRows, rows: I64, done: int) -> Iterator[EncodedRows]:
    for first in range(done, len(whole), SLICE_ROWS):
        yield whole.take(rows[first : first + SLICE_ROWS])


def _behind(chunks: Iterator[EncodedRows], done: int) -> Iterator[EncodedRows]:
    for encoded in chunks:
        if done < len(encoded):
            yield encoded.cut(done, len(encoded))
        done = max(0, done - len(encoded))
