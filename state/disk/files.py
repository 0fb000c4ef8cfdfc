"""Writes files durably: a write that returned survives a power cut, and an interrupted write leaves nothing behind.

The order is always: temporary file, fsync, rename, fsync of the directory.

A store that is not synced at each commit has a marker file: whether it was closed cleanly, and the last boot id.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from state.disk import documents

HOST = socket.gethostname()
_LIBC = ctypes.CDLL(None, use_errno=True)
_HERE, _EXCHANGE = -100, 2


def write(path: Path, data: bytes) -> None:
    """Creates a file and syncs it. The caller renames it or its directory, and syncs the parent directory."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Creates or replaces a file; durable when this returns. If the disk refuses (OSError), the old file is unchanged.

    Without `temporary` the file must have one writer at a time.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
    try:
        write(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def create(path: Path, data: bytes, temporary: Path) -> bool:
    """Creates a file durably and returns True, or False if it exists. Of concurrent callers one gets True.

    No other writer may use `temporary`. An OSError means that nothing was created.
    """
    try:
        write(temporary, data)
        return link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link(temporary: Path, path: Path) -> bool:
    """Gives a synced temporary file its final name, durably; False if another file has that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    sync_directory(path.parent)
    return True


def unique(path: Path) -> Path:
    """A path for a temporary file next to `path` that no other thread or process uses; see `is_temporary`."""
    return path.with_name(f"{path.name}~{os.getpid()}-{os.urandom(4).hex()}")


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `unique` returned."""
    return "~" in name


def digest(data: bytes) -> str:
    """SHA-256 of `data`, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class Noted(NamedTuple):
    """What a `Progress` recorded.

    Attributes:
        at_ms: Until when all was complete, in milliseconds since 1970; 0 for never.
        problem: Why it cannot be completed now; empty if it can be.
    """

    at_ms: int
    problem: str


class Progress:
    """Records in a file until when something is complete (its modification time), and what is wrong (its content).

    Recording is cheap: nothing is synced. On a full disk nothing is recorded. Readers see the old record or the new one.
    """

    NOTE_MS = 1000

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, noted_at(path)

    def note(self, at_ms: int) -> None:
        """Records that all is complete up to `at_ms`; written at most once a second."""
        if self._written.problem or not 0 <= at_ms - self._written.at_ms < self.NOTE_MS:
            self._write(Noted(at_ms, ""))

    def fail(self, problem: str) -> None:
        """Records what is wrong; an empty `problem`: nothing is, but the time of completeness is as before."""
        if self._written.problem != problem:
            self._write(self._written._replace(problem=problem))

    def _write(self, noted: Noted) -> None:
        temporary = unique(self._path)
        with suppress(OSError):
            if self._path.exists() and noted_at(self._path).problem == noted.problem:
                _set_time(self._path, noted.at_ms)
            else:
                try:
                    temporary.write_text(noted.problem, "utf-8", "replace")
                    _set_time(temporary, noted.at_ms)
                    temporary.replace(self._path)
                finally:
                    temporary.unlink(missing_ok=True)
        self._written = noted


def noted_at(path: Path) -> Noted:
    """Returns what a `Progress` recorded in a file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return Noted(os.fstat(file.fileno()).st_mtime_ns // 1_000_000, file.read())
    except FileNotFoundError:
        return Noted(0, "")


def _set_time(path: Path, at_ms: int) -> None:
    os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))


def sync_directory(path: Path) -> None:
    """Makes the names in directory `path` durable with fsync."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Makes every file and name under `path` durable, for trees that another library wrote."""
    for folder, _, files in os.walk(path):
        for name in files:
            handle = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(folder))


def exchange(first: Path, second: Path) -> None:
    """Exchanges the names of two directories, atomically if the file system can; else `second` is briefly missing."""
    renamed = _LIBC.renameat2(_HERE, os.fsencode(first.absolute()), _HERE, os.fsencode(second.absolute()), _EXCHANGE)
    if renamed == 0:
        return
    between = first.with_name(f"{first.name}.between")
    second.rename(between)
    first.rename(second)
    between.rename(first)


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine booted; None if it has ended.

    Setting the clock does not change it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 22 of proc_pid_stat(5). The name of the program, field 2, may contain spaces and parentheses.
    return int(stat.rpartition(b")")[2].split()[19])


def owner_mark() -> str:
    """Host, pid and start of this process, for names of temporary files; cleanup detects dead owners by it."""
    return _mark_of(os.getpid())


@functools.cache
def _mark_of(pid: int) -> str:
    return f"{HOST}@{pid}@{_start_ticks(pid)}"


def is_dead(mark: str) -> bool:
    """Whether the process that `owner_mark` identified has ended; a process of another host counts as alive."""
    host, pid, started = mark.rsplit("@", 2)
    if host != HOST:
        return False
    ticks = _start_ticks(int(pid))
    # Release 0.1.0 wrote the time, with a fraction; it changes when the clock is set.
    return ticks is None or (started.isdigit() and int(started) != ticks)


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CleanMark(msgspec.Struct, frozen=True):
    """The content of a marker file: whether the store was closed cleanly, and the boot id when it was last open."""

    clean: bool
    boot_id: str

    def trusts(self, boot: str) -> bool:
        """Whether the store has all its pages: it was closed cleanly, or was last open under this boot id."""
        return self.clean or self.boot_id == boot


def boot_id() -> str:
    """The boot id of this machine."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"


def read_clean_mark(path: Path) -> CleanMark | None:
    """Reads the marker at `path`; None if there is none. A damaged file gives a marker that no boot id trusts."""
    if not path.exists():
        return None
    try:
        return documents.decode(path.read_bytes(), CleanMark)
    except msgspec.MsgspecError:
        return CleanMark(False, "")


def write_clean_mark(path: Path, mark: CleanMark) -> None:
    """Replaces the marker; durable when this returns."""
    replace(path, msgspec.json.encode(mark))
