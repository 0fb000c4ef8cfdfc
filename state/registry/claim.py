"""A trainer's claim on a registry's directory: a lock with a lease, and a staging folder that fences the former holder.

A trainer publishes only files that it wrote to its own staging folder, `tmp/claim-*`. A rename or a hard link from that
folder makes each file visible. A process that takes the claim first moves the staging folders of all others away. From
then on the file system refuses every publication of a former holder, even between its last check and the rename.

1. The lock is free once its holder has ended, for whatever reason. The kernel releases it at once.
2. A frozen holder keeps the lock, but does not renew it. After `LEASE_S` without a renewal, another trainer takes the
   lock over. The clocks of two hosts are never compared.
3. Commands such as `springtide upgrade` hold the lock without a lease, so it cannot be taken over.

The file system must be one on which a rename is atomic for all hosts, such as a local disk, NFS or CephFS.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.disk.lock import DirectoryLock, Seen, holder_of, is_held
from state.errors import LockHeld, RegistryError, UnusableRegistry
from state.file_store import usable
from state.process import killpoints

LEASE_S = 10.0
"""Time without a renewal after which a standby takes over."""
RENEW_S, POLL_S = 2.0, 0.25
STANDBY_S = 10.0
"""A standby whose file is older than this no longer counts."""
_CLAIM, _STANDBY = "claim-", "standby-"
_LEASE = "lease"
logger = logging.getLogger(__name__)


class Silence:
    """Measures how long a value that another process renews has not changed.

    A late poll counts as `MOST_S` at most, because this process may have been frozen together with the other one.
    """

    MOST_S = 4.0

    def __init__(self, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._elapsed = elapsed
        self._seen: object = None
        self._polled_s = self._silent_s = 0.0

    def poll(self, seen: object) -> float:
        """How long `seen` has been unchanged, in seconds."""
        now_s = self._elapsed()
        self._silent_s += min(now_s - self._polled_s, self.MOST_S)
        if seen != self._seen:
            self._seen, self._silent_s = seen, 0.0
        self._polled_s = now_s
        return self._silent_s


class Claim:
    """The claim of one trainer on a registry's directory. Any thread may check and confirm.

    Attributes:
        staging: The folder from which this trainer publishes; it exists while the claim is held.
        held: Whether `take` succeeded; `check` detects whether the claim was lost since.
        took_over: Whether the claim was taken from a process that may still run.
        ask_store: Checks the claim in the object store of a shared registry (LockHeld, UnusableRegistry); None if the
            registry is not shared.
    """

    def __init__(self, path: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._path, self._silence = path, Silence(elapsed)
        self.staging = path / layout.TEMPORARY / f"{_CLAIM}{os.urandom(4).hex()}~{durable.owner_mark()}"
        self._lock = DirectoryLock(path, layout.TRAINER_LOCK, {_LEASE: self.staging.name})
        self._stop, self._renewing = threading.Event(), threading.Thread(target=self._renew, name="claim", daemon=True)
        self.held = self.took_over = False
        self.ask_store: Callable[[], None] | None = None
        self._elapsed, self._ticked_s, self._slept = elapsed, elapsed(), False

    def take(self) -> None:
        """Takes the claim if it is free or its lease has expired.

        1. Other processes are temporarily excluded from claiming.
        2. The staging folders of all former holders are moved away, so that these can no longer publish.
        3. The lock is taken over if its holder is silent.

        Raises:
            LockHeld: Another process holds the claim.
            UnusableRegistry: The disk refused.
        """
        # 1.
        with DirectoryLock(self._path, layout.TAKEOVER_LOCK):
            try:
                self._lock.acquire()
            except LockHeld:
                if not self._has_expired(self._lock.seen()):
                    raise
                self.took_over = True
            with usable(str(self._path), "be claimed", UnusableRegistry):
                # 2.
                self._fence()
                killpoints.reach("claim.fenced")
                # 3.
                if self.took_over:
                    self._lock.take_over()
                self.staging.mkdir(parents=True)
        self._ticked_s = self._elapsed()
        self.held = True
        self._renewing.start()

    def check(self) -> None:
        """Checks that the claim is still held; takes some microseconds.

        Raises:
            LockHeld: Another trainer took it over.
        """
        if self.held and self._lock.is_lost:
            raise LockHeld(
                f"this trainer lost its claim on {self._path} to {holder_of(self._lock.seen().content)}, because it did not "
                f"renew it for {LEASE_S:g} s; it has published nothing since",
                "start it again: it becomes the standby",
            )

    def confirm(self) -> None:
        """Checks the claim before a publication. If this process was frozen, it also checks with the object store.

        Raises:
            LockHeld: Another trainer took it over.
            UnusableRegistry: The object store is needed and cannot be reached.
        """
        self.check()
        self._tick()
        if self._slept:
            if self.ask_store is not None:
                self.ask_store()
            self._slept = False

    def release(self) -> None:
        """Releases the claim, so that another trainer can take it at once."""
        self._stop.set()
        if self.held:
            self._renewing.join()
        shutil.rmtree(self.staging, ignore_errors=True)
        self._lock.release()

    def _has_expired(self, seen: Seen) -> bool:
        try:
            leased = _LEASE in json.loads(seen.content)
        except ValueError:
            leased = False
        return self._silence.poll(seen) >= LEASE_S and leased

    def _fence(self) -> None:
        folder = self._path / layout.TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_CLAIM}*"):
            grave = folder / f"fenced-{os.urandom(4).hex()}~{durable.owner_mark()}"
            # The lock's holder may be releasing it.
            with suppress(FileNotFoundError):
                path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._tick()
            self._lock.renew()

    def _tick(self) -> None:
        now_s = self._elapsed()
        self._slept = self._slept or now_s - self._ticked_s > LEASE_S / 2
        self._ticked_s = now_s


@contextmanager
def claiming(path: Path, stopping: threading.Event, on_wait: Callable[[str], None]) -> Iterator[Claim]:
    """Holds the claim on a registry's directory while the block runs; waits as a standby until it is free or expired.

    Args:
        path: The registry's directory.
        stopping: Ends the wait: SystemExit.
        on_wait: Called once with the holder, in words, if this process has to wait.

    Raises:
        LockHeld: The claim was lost while the block ran.
        SystemExit: `stopping` was set while it waited.
    """
    claim, present = Claim(path), None
    try:
        while not claim.held:
            try:
                claim.take()
            except LockHeld as error:
                if present is None:
                    on_wait(str(error.what))
                    present = StandbyFile(path)
                present.renew()
                if stopping.wait(POLL_S):
                    raise SystemExit(0) from None
        if present is not None:
            present.remove()
        try:
            yield claim
        except (RegistryError, OSError):
            # The file system may have refused a publication because the claim was lost.
            claim.check()
            raise
    finally:
        if present is not None:
            present.remove()
        claim.release()


class StandbyFile:
    """A file under `tmp/` with which a standby announces itself; `springtide status` lists these files."""

    def __init__(self, path: Path) -> None:
        self._file = path / layout.TEMPORARY / f"{_STANDBY}{os.urandom(4).hex()}~{durable.owner_mark()}"

    def renew(self) -> None:
        """Renews the file, to show that the standby is running."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()

    def remove(self) -> None:
        """Removes the file."""
        self._file.unlink(missing_ok=True)


def trainer_of(path: Path) -> str:
    """Describes the process that holds the claim of a registry's directory; empty if there is none.

    In a copy of a shared registry, it is the standby of this host.
    """
    if not is_held(path, layout.TRAINER_LOCK):
        return ""
    return holder_of((path / layout.TRAINER_LOCK).read_bytes())


def standbys(path: Path, now_s: float) -> list[str]:
    """The standbys of a registry's directory, each as `process PID on HOST`, ascending."""
    names = []
    for file in (path / layout.TEMPORARY).glob(f"{_STANDBY}*"):
        with suppress(FileNotFoundError):
            if now_s - file.stat().st_mtime < STANDBY_S:
                host, pid, _ = file.name.rpartition("~")[2].rsplit("@", 2)
                names.append(f"process {pid} on {host}")
    return sorted(names)
