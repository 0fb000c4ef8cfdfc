"""Writes the output of child processes to rotated log files of bounded size."""

from __future__ import annotations

import os
import selectors
import threading
from pathlib import Path

from state.config.settings import Settings
from state.storage.shares import LOGS, kept_bytes

LOG_BYTES, OLDER_LOGS = 10_000_000, 1
READ_BYTES = 1 << 16
POLL_S = 0.5
MOST_READS = 64  # in a row, of a child that does not stop
CHILDREN = 16  # that the share of the logs is meant for


def log_sizes(settings: Settings) -> tuple[int, int]:
    """Returns the maximum bytes of one log file, so that all logs fit their storage share, and how many old ones stay.

    >>> from state.config.sections import StorageSettings
    >>> log_sizes(Settings()), log_sizes(Settings(storage=StorageSettings(budget_gb=0.5)))
    ((10000000, 1), (625000, 1))
    """
    return min(LOG_BYTES, kept_bytes(settings, LOGS) // (CHILDREN * (1 + OLDER_LOGS))), OLDER_LOGS


class LogFile:
    """The log of one child, with its older files.

    Args:
        path: `<name>.log`.
        most_bytes: Maximum size of one file. A file can be somewhat larger, because data is split only at a line end.
        older: How many older files are kept.
    """

    def __init__(self, path: Path, most_bytes: int, older: int) -> None:
        self._path, self._most_bytes, self._older = path, most_bytes, older
        self._lost = 0

    def add(self, output: bytes) -> None:
        """Appends a child's output, and rotates the file at a line end if it is full."""
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            if size + len(output) > self._most_bytes and size:
                # The rest of an unfinished line stays in the same file.
                begun = output.find(b"\n") + 1 if not self._ends_a_line() else 0
                self._append(output[:begun])
                output = output[begun:]
                if begun or self._ends_a_line():
                    self._turn()
            self._append(output)
        except OSError:
            self._lost += output.count(b"\n") + 1

    def _append(self, output: bytes) -> None:
        if not output:
            return
        note = f"({self._lost} lines could not be written here)\n".encode() if self._lost else b""
        with self._path.open("ab") as file:
            file.write(note + output)
        self._lost = 0

    def _ends_a_line(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _turn(self) -> None:
        names = [self._path, *(self._path.with_suffix(f".log.{number}") for number in range(1, self._older + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)
        if self._older == 0:
            self._path.unlink()


class LogPump:
    """Reads the pipes of all children into their logs, each with `older` full files of at most `most_bytes`."""

    def __init__(self, most_bytes: int, older: int) -> None:
        self._most_bytes, self._older = most_bytes, older
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def open(self, path: Path) -> int:
        """Returns a descriptor for a child to write its log `path` to; close it once the child has inherited it."""
        # A log that cannot be created prevents the start, instead of failing later.
        path.open("ab").close()
        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        with self._lock:
            self._selector.register(reads, selectors.EVENT_READ, LogFile(path, self._most_bytes, self._older))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
                self._thread.start()
        return writes

    def catch_up(self) -> None:
        """Reads everything that the children have written so far; any thread may call it."""
        with self._lock:
            for _ in range(MOST_READS):
                ready = self._selector.select(0)
                if not sum(self._read(key) for key, _ in ready):
                    break

    def _run(self) -> None:
        while True:
            ready = self._selector.select(POLL_S)
            if ready:
                self.catch_up()

    def _read(self, key: selectors.SelectorKey) -> bool:
        try:
            output = os.read(key.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if output:
            log: LogFile = key.data
            log.add(output)
            return True
        # All writers have closed the pipe.
        self._selector.unregister(key.fd)
        os.close(key.fd)
        return False
