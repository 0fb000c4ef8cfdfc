"""One writer per state directory: an exclusive file lock that names its holder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import psutil

from state import layout
from state.disk import files as durable
from state.errors import LockHeld, UnusableDisk, reason_of
from state.process.private_files import close_to_others

RETRY_S = 0.02
"""Interval between two attempts to take a lock that another holder has."""


class Seen(NamedTuple):
    """A lock file at one moment.

    Attributes:
        inode: The inode of the file, which differs after a takeover.
        renewed_ns: When its holder last renewed it, in the file system's clock.
        content: Describes the holder; see `holder_of`.
    """

    inode: int
    renewed_ns: int
    content: bytes


class DirectoryLock:
    """Holds the lock of directory `path`, which is created if missing, from `acquire` (or `with`) to `release`.

    Args:
        about: Additional facts about the holder, for the lock file.
    """

    def __init__(self, path: Path, name: str = layout.LOCK, about: Mapping[str, str] = MappingProxyType({})) -> None:
        self._path, self._holder = Path(path), about
        self._file = self._path / name
        self._handle: int | None = None

    def acquire(self, wait_s: float = 0.0) -> DirectoryLock:
        """Takes the lock within `wait_s`, or raises `LockHeld`; the lock file names host, pid and start time."""
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
        while True:
            handle = self._open(self._file)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = holder_of(os.pread(handle, 4096, 0))
                os.close(handle)
                raise LockHeld(
                    f"{self._path} is in use by {holder}", "stop that process, or choose another paths.state"
                ) from None
            if self._is_at(self._file, handle):
                break
            # Another process replaced the file meanwhile.
            os.close(handle)
        self._handle = handle
        self._write_holder()
        return self

    def take_over(self) -> None:
        """Replaces the lock file by one that this process holds. The former holder finds that its lock `is_lost`."""
        temporary = durable.unique(self._file)
        handle = self._open(temporary)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._handle = handle
        self._write_holder()
        temporary.replace(self._file)

    def renew(self) -> None:
        """Shows that the holder is running, by a change in the result of `seen`."""
        if self._handle is not None:
            os.utime(self._handle)

    def seen(self) -> Seen:
        """The current lock file; takes no lock."""
        with contextlib.closing(os.fdopen(self._open(self._file), "rb")) as file:
            status = os.fstat(file.fileno())
            return Seen(status.st_ino, status.st_mtime_ns, file.read(4096))

    @property
    def is_lost(self) -> bool:
        """Whether another process took over the lock that this object holds."""
        return self._handle is not None and not self._is_at(self._file, self._handle)

    def _open(self, path: Path) -> int:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            close_to_others(self._path)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UnusableDisk(
                f"{self._path} cannot be locked ({reason_of(error)})",
                "correct its access rights, or choose another paths.state",
            ) from error

    @staticmethod
    def _is_at(path: Path, handle: int) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(handle))
        except FileNotFoundError:
            return False

    def _write_holder(self) -> None:
        assert self._handle is not None
        started_s, owner = psutil.Process().create_time(), durable.owner_mark()
        holder = {"host": durable.HOST, "pid": os.getpid(), "started_s": started_s, "owner": owner, **self._holder}
        # The holder's name is only informative: a full disk must not prevent commands that free space.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Releases the lock; the file stays, because removing it would allow two holders."""
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
    """Whether the process in the lock file is running; takes no lock. A process on another host counts as running."""
    try:
        fields = json.loads((path / name).read_bytes())
        # Release 0.1.0 wrote the parts of a mark only.
        mark = str(fields["owner"]) if "owner" in fields else "{host}@{pid}@{started_s}".format_map(fields)
        return not durable.is_dead(mark)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def holder_of(content: bytes) -> str:
    """Describes the lock's holder, which may not have written the file yet."""
    try:
        fields = json.loads(content)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(fields["started_s"]))
        return f"process {fields['pid']} on {fields['host']}, started {started}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
