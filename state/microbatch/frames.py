"""Frames micro-batches for a pipe: each after its length, then an end marker that a crashed writer does not send."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
END = _LENGTH.pack(0)
"""The end marker."""


def framed(value: bytes) -> bytes:
    """Frames an encoded micro-batch."""
    return _LENGTH.pack(len(value)) + value


class Frames:
    """Parses framed micro-batches from a pipe's bytes as they arrive.

    Attributes:
        ended: Whether the end marker has arrived.

    >>> frames = Frames()
    >>> [list(frames.take(part)) for part in (framed(b"one") + framed(b"two")[:5], b"wo" + END)], frames.ended
    ([[b'one'], [b'two']], True)
    """

    def __init__(self) -> None:
        self._rest, self.ended = b"", False

    def take(self, data: bytes) -> Iterator[bytes]:
        """The micro-batches that are complete now, each once."""
        self._rest += data
        at = 0
        while at + _LENGTH.size <= len(self._rest):
            (length,) = _LENGTH.unpack_from(self._rest, at)
            end = at + _LENGTH.size + length
            if not length:
                self.ended = True
            if end > len(self._rest):
                break
            if length:
                yield self._rest[at + _LENGTH.size : end]
            at = end
        self._rest = self._rest[at:]
