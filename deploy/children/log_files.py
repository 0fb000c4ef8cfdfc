"""Takes what children say into log files of a bounded size, which take turns while the children run.

A child writes to a pipe, and one thread for all children reads the pipes into
`<name>.log`. A file that is full becomes `<name>.log.1`, the one before it
`<name>.log.2`, and so on: no line is lost or cut in two, for nobody but the
thread writes. Where the disk takes nothing, lines are dropped and counted in the
log, and no child waits.
"""

from __future__ import annotations

import os
import selectors
import threading
from pathlib import Path

from state.config.settings import Settings
from state.storage.shares import LOGS, kept_bytes

READ_BYTES = 1 << 16
LOOK_S = 0.5
MOST_READS = 64  # in a row, of a child that does not stop
CHILDREN = 16  # that the share of the logs is meant for


def log_sizes(settings: Settings) -> tuple[int, int]:
    """How large one log may become, so that all of them keep to their share, and how many older ones are kept.

    >>> from state.config.sections import StorageSettings
    >>> log_sizes(Settings()), log_sizes(Settings(storage=StorageSettings(budget_gb=0.5)))
    ((10000000, 1), (625000, 1))
    """
    older = settings.up.older_logs
    return min(settings.up.log_mb * 1_000_000, kept_bytes(settings, LOGS) // (CHILDREN * (1 + older))), older


class LogFile:
    """The log of one child, and those before it.

    Args:
        path: `<name>.log`.
        most_bytes: Of one file, and somewhat more: what is read at once is not cut but at a line.
        older: How many files are kept beside the one that is written.
    """

    def __init__(self, path: Path, most_bytes: int, older: int) -> None:
        self._path, self._most_bytes, self._older = path, most_bytes, older
        self._lost = 0

    def add(self, said: bytes) -> None:
        """Appends what a child said; the next file begins with a line."""
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            if size + len(said) > self._most_bytes and size:
                # What belongs to the line that was begun stays with it.
                begun = said.find(b"\n") + 1 if not self._ends_a_line() else 0
                self._append(said[:begun])
                said = said[begun:]
                if begun or self._ends_a_line():
                    self._turn()
            self._append(said)
        except OSError:
            self._lost += said.count(b"\n") + 1

    def _append(self, said: bytes) -> None:
        if not said:
            return
        note = f"({self._lost} lines could not be written here)\n".encode() if self._lost else b""
        with self._path.open("ab") as file:
            file.write(note + said)
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
    """Reads the pipes of all children into their logs.

    Args:
        most_bytes: Of one file.
        older: How many full files of each child are kept.
    """

    def __init__(self, most_bytes: int, older: int) -> None:
        self._most_bytes, self._older = most_bytes, older
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def open(self, path: Path) -> int:
        """The descriptor that a child writes to, whose log is `path`; close it once the child has it."""
        # A log that cannot be made refuses the start, and is not found out later.
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
        """Takes all that has been said by now; any thread may call it."""
        with self._lock:
            for _ in range(MOST_READS):
                ready = self._selector.select(0)
                if not sum(self._read(key) for key, _ in ready):
                    break

    def _run(self) -> None:
        while True:
            ready = self._selector.select(LOOK_S)
            if ready:
                self.catch_up()

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Reads a pipe once; False where there was nothing to read."""
        try:
            said = os.read(key.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if said:
            log: LogFile = key.data
            log.add(said)
            return True
        # All who could write have closed it.
        self._selector.unregister(key.fd)
        os.close(key.fd)
        return False
