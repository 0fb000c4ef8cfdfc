"""Looks at files and mapping before anything is sent, and before Kafka is asked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np

from deploy.replaying.clock import NO_TIMESTAMP
from deploy.replaying.judging import Judge, refuse_all_dead
from deploy.replaying.sender import Piece
from state.config.sections import Events
from state.recordings.files import Recording
from state.recordings.rows import EncodedRows, Encoder, mapped_fields

COLUMNS_ROWS = 1
CHUNK_ROWS = 1000
MOST_ROWS = 100_000


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
