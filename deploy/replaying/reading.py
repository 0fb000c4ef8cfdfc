"""Reads a recording from a replay's position: the remaining rows in send order, and facts about the whole recording."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import psutil

from deploy.replaying.journal import Position
from deploy.replaying.options import Options
from state.config.sections import Events
from state.recordings.crowd import Crowd, RecordedTimes
from state.recordings.files import Recording, refuse_beyond_memory
from state.recordings.rows import I64, NO_TIME, EncodedRows, Encoder, joined, order, time_of

SLICE_ROWS = 4096


class Opened(NamedTuple):
    """A recording that is being read.

    Attributes:
        encoder: Completes the rows.
        chunks: The rows that are not acknowledged yet, in send order.
        newest_ms: The newest recorded time apart from strays; NO_TIME if it is not needed.
        total: Rows of the recording; None if they are not counted yet.
        crowd: How `newest_ms` was found; None if it was known, or not needed.
    """

    encoder: Encoder
    chunks: Iterator[EncodedRows]
    newest_ms: int
    total: int | None
    crowd: Crowd | None


def open_recording(recording: Recording, events: Events, options: Options, position: Position) -> Opened:
    """Opens a recording after the acknowledged rows.

    Args:
        recording: The files.
        events: Names of fields, and the unit of times.
        options: The order, and whether times are rebased; if they are, the newest time is found before the first row.
        position: The replay's position.

    Raises:
        SettingsError: The files do not fit into memory, or columns are missing.
        UnreadableRecording: A file is truncated or damaged.
    """
    find_newest, times = not options.keep and position.newest_ms == NO_TIME, RecordedTimes()
    # Times of a recording are in the past.
    latest_ms = position.now_ms + round(events.max_future_s * 1000)
    encoder, total, done = Encoder(events, recording.constants or {}, latest_ms), None, position.acknowledged
    if options.sort == "memory":
        refuse_beyond_memory(recording, psutil.virtual_memory().available)
        whole = joined(list(recording.encoded(encoder, events)))
        total, chunks = len(whole), _slices(whole, order(whole.at_ms), done)
        if find_newest:
            times.add(whole.at_ms, whole.file, whole.line)
    else:
        chunks = _behind(recording.encoded(encoder, events), done)
        if find_newest:
            times = recorded_times(recording, events, latest_ms)
    crowd = times.crowd(round(events.max_age_s * 1000)) if find_newest else None
    return Opened(encoder, chunks, position.newest_ms if crowd is None else crowd.newest_ms, total, crowd)


def recorded_times(recording: Recording, events: Events, latest_ms: int) -> RecordedTimes:
    """Collects all recorded times; reads the time column of all files."""
    field, unit, times = events.time, events.time_unit, RecordedTimes()
    if not field:
        return times
    if (constant := (recording.constants or {}).get(field)) is not None:
        times.add(np.array([time_of(constant, unit, latest_ms)], np.int64), 0, np.ones(1, np.int64))
        return times
    for number in range(len(recording.files)):
        for rows in recording.rows(number, (field,)):
            at_ms = np.array([time_of(value, unit, latest_ms) for value in rows.columns[field]], np.int64)
            times.add(at_ms, number, rows.lines)
    return times


def _slices(whole: EncodedRows, rows: I64, done: int) -> Iterator[EncodedRows]:
    for first in range(done, len(whole), SLICE_ROWS):
        yield whole.take(rows[first : first + SLICE_ROWS])


def _behind(chunks: Iterator[EncodedRows], done: int) -> Iterator[EncodedRows]:
    for encoded in chunks:
        if done < len(encoded):
            yield encoded.cut(done, len(encoded))
        done = max(0, done - len(encoded))
