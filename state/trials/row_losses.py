"""Files with the loss of each row of the training log, as one trainer scored it before learning. Bounded size.

    losses/<name>.wanted       a reader exists: a trainer writes only while there is such a file
    losses/<number>.losses     frames, one for each record of the training log, in the order of training

A frame has three parts, all little-endian:

- its header: offset int64, rows uint32, CRC-32 of the rest, uint32;
- for each row with a category the block of its user, uint16: `users modulo BLOCKS`, so it has no pseudonym;
- the log loss of each of these rows, float64.

Each start of a trainer begins a new file, so only the last frame of a file may be
torn; a torn frame is never read. Records that a trainer learns again after a crash
are in the files again. Nothing is synced. Losses that a power failure destroys are
left out of the comparison.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state import layout
from state.statistics.confidence_sequence import BLOCKS

Blocks = NDArray[np.uint16]
F64 = NDArray[np.float64]

SEGMENT_BYTES = 4 << 20
SEGMENTS = 8
"""Number of files that are kept; at 5,000 rows a second one is filled in 80 s."""

_HEAD = struct.Struct("<qII")
_ROW_BYTES = 10
_MOST_ROWS = 1 << 20
_WANTED, _SEGMENT = ".wanted", ".losses"


class RowLosses(NamedTuple):
    """Losses of the rows of one record that have a category.

    Attributes:
        offset: Offset of the record in the training log.
        blocks: `[n]` uint16, the blocks of their users.
        losses: `[n]` float64, their log losses in nats.
    """

    offset: int
    blocks: Blocks
    losses: F64


def blocks_of(users: NDArray[np.uint64]) -> Blocks:
    """The blocks of `[n]` uint64 pseudonyms.

    >>> blocks_of(np.array([3, BLOCKS + 3], np.uint64)).tolist()
    [3, 3]
    """
    return (users % np.uint64(BLOCKS)).astype(np.uint16)


# Readers


def want(registry: Path, name: str) -> None:
    """Requests that the trainer of a registry writes its losses; idempotent.

    Raises:
        OSError: The disk refused.
    """
    mark = registry / layout.LOSSES / f"{name}{_WANTED}"
    if not mark.exists():
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def unwant(registry: Path, name: str) -> None:
    """Withdraws the request; the trainer removes the files if there is no other reader.

    Raises:
        OSError: The disk refused.
    """
    (registry / layout.LOSSES / f"{name}{_WANTED}").unlink(missing_ok=True)


def is_wanted(registry: Path) -> bool:
    """Whether the losses of a registry's trainer have a reader."""
    try:
        return any(path.name.endswith(_WANTED) for path in (registry / layout.LOSSES).iterdir())
    except OSError:
        return False


# Files


def segments(registry: Path) -> list[int]:
    """The numbers of the files, ascending."""
    try:
        names = [path.name for path in (registry / layout.LOSSES).iterdir()]
    except OSError:
        return []
    return sorted(int(name.removesuffix(_SEGMENT)) for name in names if name.endswith(_SEGMENT))


def path_of(registry: Path, segment: int) -> Path:
    """The path of a file by its number."""
    return registry / layout.LOSSES / f"{segment:08d}{_SEGMENT}"


def remove_all(registry: Path) -> None:
    """Removes all files of losses. Only the trainer calls it."""
    for segment in segments(registry):
        path_of(registry, segment).unlink(missing_ok=True)


class LossWriter:
    """Writes the losses of one start of a trainer, in new files. Use it from one thread only.

    Args:
        registry: The trainer's registry; its `losses/` exists.
        segment_bytes: Size at which a new file begins.
        kept: Number of files that are kept.
    """

    def __init__(self, registry: Path, segment_bytes: int = SEGMENT_BYTES, kept: int = SEGMENTS) -> None:
        self._registry, self._segment_bytes, self._kept = registry, segment_bytes, kept
        self._handle, self._bytes = -1, 0

    def append(self, record: RowLosses) -> None:
        """Writes a record's frame with one system call, so that a reader in another process sees it at once.

        Raises:
            OSError: The disk refused; the next frame begins a new file.
        """
        body = record.blocks.astype("<u2").tobytes() + record.losses.astype("<f8").tobytes()
        frame = _HEAD.pack(record.offset, len(record.losses), zlib.crc32(body)) + body
        if self._handle < 0 or self._bytes >= self._segment_bytes:
            self._begin()
        if os.write(self._handle, frame) < len(frame):
            self.close()
            raise OSError(f"{self._registry / layout.LOSSES} took a part of a frame only")
        self._bytes += len(frame)

    def close(self) -> None:
        """Closes the file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _begin(self) -> None:
        self.close()
        before = segments(self._registry)
        for old in before[: max(0, len(before) - self._kept + 1)]:
            path_of(self._registry, old).unlink(missing_ok=True)
        path = path_of(self._registry, (before or [0])[-1] + 1)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._bytes = 0


# Reading


class LossReader:
    """Reads a trainer's losses, beginning with the oldest file that is kept. Use it from one thread only.

    Args:
        registry: The trainer's registry.
    """

    def __init__(self, registry: Path) -> None:
        self._registry = registry
        self._segment = self._at = 0

    def read(self) -> list[RowLosses]:
        """Returns the new records of at most one file. Skips a torn frame at the end of an older file."""
        for segment in segments(self._registry):
            if segment < self._segment:
                continue
            if segment > self._segment:
                self._segment, self._at = segment, 0
            data = b""
            # The writer may just have removed it.
            with suppress(OSError), path_of(self._registry, segment).open("rb") as file:
                file.seek(self._at)
                data = file.read()
            found = list(_frames(data))
            if found:
                self._at += sum(_HEAD.size + _ROW_BYTES * len(one.losses) for one in found)
                return found
        return []


def _frames(data: bytes) -> Iterator[RowLosses]:
    """The complete frames at the beginning of `data`."""
    at = 0
    while at + _HEAD.size <= len(data):
        offset, rows, checksum = _HEAD.unpack_from(data, at)
        begin, end = at + _HEAD.size, at + _HEAD.size + _ROW_BYTES * rows
        if rows > _MOST_ROWS or end > len(data) or zlib.crc32(data[begin:end]) != checksum:
            return
        blocks = np.frombuffer(data, "<u2", rows, begin).astype(np.uint16)
        yield RowLosses(offset, blocks, np.frombuffer(data, "<f8", rows, begin + 2 * rows).astype(np.float64))
        at = end
