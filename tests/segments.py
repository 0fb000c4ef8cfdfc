"""What a stopped broker has on disk, made less: as after an election of a leader that lacked records, or a power cut."""

from __future__ import annotations

import os
from pathlib import Path

# Where the length of a record batch and the number of its last record stand in it.
_LENGTH_AT, _LAST_DELTA_AT, _BEFORE = 8, 23, 12


def cut_back(data: Path, topic: str, partition: int, end: int) -> int:
    """Takes away the record batches of a partition from offset `end` on; the broker must be down.

    Args:
        data: The broker's log directory.
        topic: The topic's name.
        partition: Its partition.
        end: The partition ends there, or before, at the begin of a batch.

    Returns:
        Where it ends now.
    """
    reached = 0
    for segment in sorted((data / f"{topic}-{partition}").glob("*.log")):
        raw, at = segment.read_bytes(), 0
        reached = max(reached, min(int(segment.stem), end))
        while at + _BEFORE <= len(raw):
            length = int.from_bytes(raw[at + _LENGTH_AT : at + _BEFORE], "big")
            last = int.from_bytes(raw[at : at + 8], "big") + int.from_bytes(
                raw[at + _LAST_DELTA_AT : at + _LAST_DELTA_AT + 4], "big"
            )
            # A segment is allocated ahead: zeros stand behind its last batch.
            if length == 0 or last >= end:
                break
            at, reached = at + _BEFORE + length, last + 1
        os.truncate(segment, at)
    forget_clean_stop(data)
    return reached


def forget_clean_stop(data: Path) -> None:
    """Makes the broker look through its segments at the next start, as after a crash."""
    for name in (".kafka_cleanshutdown", "recovery-point-offset-checkpoint"):
        (data / name).unlink(missing_ok=True)
