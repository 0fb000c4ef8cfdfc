"""What a stopped broker has on disk, made less: as after an election of a leader that lacked records, or a power cut."""

from __future__ import annotations

import os
from pathlib import Path

# Where the length of a record batch and the number of its last record stand in it.
_LENGTH_AT, _LAST_DELTA_AT, _BEFORE = 8, 23, 12
_MARKER_AT, _MARKER = 22, 0x20


def cut_back(data: Path, topic: str, partition: int, end: int, in_a_transaction: bool = False) -> int:
    """Takes away the record batches of a partition from offset `end` on; the broker must be down."""
    reached, ends = 0, list[tuple[Path, int, int, bool]]()
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
            ends.append((segment, at, int.from_bytes(raw[at : at + 8], "big"), bool(raw[at + _MARKER_AT] & _MARKER)))
            at, reached = at + _BEFORE + length, last + 1
        os.truncate(segment, at)
    if in_a_transaction and ends[-1][3]:
        segment, at, reached, _ = ends[-1]
        os.truncate(segment, at)
    forget_clean_stop(data)
    return reached


def forget_clean_stop(data: Path) -> None:
    """Makes the broker look through its segments at the next start, as after a crash."""
    for name in (".kafka_cleanshutdown", "recovery-point-offset-checkpoint"):
        (data / name).unlink(missing_ok=True)
