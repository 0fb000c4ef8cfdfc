"""A spool of exposures: workers, which do not use Kafka, write files that the applier of their host sends to Kafka."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from state.process.said_once import SaidOnce

FILE_MS = 250

SETTLED_MS = 500
"""The age after which a file is no longer written."""

MOST_BYTES = 256 << 20
"""The maximum size of all files; if Kafka is unreachable, the oldest files beyond it are removed."""

_ENDING = ".jsonl"


class ExposureSpool:
    """Writes the exposures of one worker. Used by one thread."""

    def __init__(self, folder: Path, now_ms: Callable[[], int], say: Callable[[str, str], object]) -> None:
        self._folder, self._now_ms, self._log_once = folder, now_ms, SaidOnce(say)
        self._handle, self._opened_ms = -1, 0

    def write(self, record: bytes) -> None:
        """Writes an exposure; a disk error is only logged, and does not affect the answer."""
        now_ms = self._now_ms()
        try:
            if self._handle < 0 or not self._opened_ms <= now_ms < self._opened_ms + FILE_MS:
                self._open(now_ms)
            os.write(self._handle, record + b"\n")
        except OSError as error:
            self.close()
            self._log_once(f"exposures are lost: {error}")

    def close(self) -> None:
        """Closes the current file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _open(self, now_ms: int) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{now_ms:015d}-{os.getpid()}{_ENDING}"
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._opened_ms = now_ms


def settled(folder: Path, now_ms: int) -> Iterator[tuple[Path, list[bytes]]]:
    """Yields the files that are no longer written, oldest first, with their records, without a torn last record."""
    for path in _files(folder):
        if int(path.name.partition("-")[0]) <= now_ms - SETTLED_MS:
            lines = path.read_bytes().split(b"\n")
            yield path, [line for line in lines[:-1] if line]


def make_room(folder: Path, most_bytes: int = MOST_BYTES) -> int:
    """Removes the oldest files until at most `most_bytes` are left; returns the number of removed files."""
    files = _files(folder)
    bytes_left, removed = sum(path.stat().st_size for path in files), 0
    for path in files:
        if bytes_left <= most_bytes:
            break
        bytes_left -= path.stat().st_size
        path.unlink()
        removed += 1
    return removed


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_ENDING}"))
