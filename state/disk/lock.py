"""One writer per state directory: an exclusive file lock that names its holder.

The kernel releases the lock when its process ends, however it ends, so a kill leaves nothing to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

import psutil

from state import layout
from state.errors import LockHeld, UnusableDisk, reason_of
from state.process.private_files import close_to_others

RETRY_S = 0.02
"""Interval between two attempts to take a lock that another holder has."""


class DirectoryLock:
    """Holds the lock of directory `path`, which is created if missing, from `acquire` (or `with`) to `release`."""

    def __init__(self, path: Path, name: str = layout.LOCK) -> None:
        self._path = Path(path)
        self._file = self._path / name
        self._handle: int | None = None

    def acquire(self, wait_s: float = 0.0) -> DirectoryLock:
        """Takes the lock within `wait_s`, else raises `LockHeld`; the lock file names host, pid and start time."""
        end_s = time.monotonic() + wait_s
        while True:
            try:
                return self._acquire()
            except LockHeld:
                if time.monotonic() >= end_s:
                    raise
                time.sleep(RETRY_S)

    def _acquire(self) -> DirectoryLock:
        if self._handle is not None:
            return self
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            close_to_others(self._path)
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UnusableDisk(
                f"{self._path} cannot be locked ({reason_of(error)})",
                "correct its access rights, or choose another paths.state",
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(handle, 4096, 0))
            os.close(handle)
            raise LockHeld(
                f"{self._path} is in use by {holder}", "stop that process, or choose another paths.state"
            ) from None
        started_s = psutil.Process().create_time()
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started_s": started_s})
        # The holder's name is only a hint: a full disk must not prevent commands that free space.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, content.encode(), 0)
        self._handle = handle
        return self

    def release(self) -> None:
        """Releases the lock; the file stays, since removing it would allow two holders."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> DirectoryLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(path: Path, name: str = layout.LOCK) -> bool:
    """Whether the process named in the lock file runs; takes no lock. A process on another host counts as running."""
    try:
        fields = json.loads((path / name).read_bytes())
        if fields["host"] != socket.gethostname():
            return True
        return bool(psutil.Process(fields["pid"]).create_time() == fields["started_s"])
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def _holder(content: bytes) -> str:
    """Describes the lock's holder, which may not have written the file yet."""
    try:
        fields = json.loads(content)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(fields["started_s"]))
        return f"process {fields['pid']} on {fields['host']}, started {started}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
