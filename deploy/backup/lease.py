"""The lock of a backup location: only one process at a time makes a backup there or prunes.

Without it, a prune could remove objects that a backup in progress relies on.

1. The writer creates a file under `locks/` with its identity and the time of its last refresh.
2. If it then sees another lock, it removes its own and gives up. Of two writers at once both may give up, but at
   least one does.

A dead writer on this machine is recognised by its process id, one on another machine by its silence. Before a
backup becomes valid, its writer checks that it still holds its lock. If a writer was suspended for long, its lock has
been removed and the backup must be repeated.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from types import TracebackType

from deploy.backup.places import LOCKS
from state.disk import files as durable
from state.errors import BackupError, LockHeld
from state.places.place import FilePlace

REFRESH_S, STALE_S = 60.0, 3600.0


class Lease:
    """Context manager that holds the lock of a backup location.

    Args:
        place: The backup location.
        clock: The wall clock, seconds.
        owner: Identity of the holder: host, pid and start time.

    Raises:
        LockHeld: Another process writes there.
    """

    def __init__(self, place: FilePlace, clock: Callable[[], float] = time.time, owner: str = "") -> None:
        self._place, self._clock = place, clock
        self._owner = owner or durable.owner_mark()
        self._name = f"{LOCKS}/{os.urandom(8).hex()}.json"
        self._written_s = 0.0

    def __enter__(self) -> Lease:
        """Acquires the lock."""
        # 1.
        self._write()
        # 2.
        try:
            others = [one for one in self._place.names(LOCKS) if f"{LOCKS}/{one}" != self._name and self._lives(one)]
            if others:
                raise LockHeld(
                    f"{self._place.told} is in use: {self._holder(others[0])}",
                    "wait for it; where it is gone for good, remove that file",
                )
        except BaseException:
            self._place.remove(self._name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the lock."""
        self._place.remove(self._name)

    def refresh(self) -> None:
        """Renews the lock if `REFRESH_S` has passed; cheap enough to call often."""
        if self._clock() - self._written_s >= REFRESH_S:
            self.require_held()
            self._write()

    def require_held(self) -> None:
        """Raises BackupError if another process removed the lock as stale."""
        if self._name.rpartition("/")[2] not in self._place.names(LOCKS):
            raise BackupError(
                f"{self._place.told} was given to another while this one was silent",
                "repeat it; what was sent is there",
            )

    def _write(self) -> None:
        self._written_s = self._clock()
        document = {"owner": self._owner, "at_ms": int(self._written_s * 1000)}
        self._place.write(self._name, json.dumps(document).encode())

    def _lives(self, name: str) -> bool:
        """Returns whether a lock's holder is alive; removes the lock of a dead holder."""
        try:
            document = json.loads(self._place.read(f"{LOCKS}/{name}"))
            silent_s = self._clock() - document["at_ms"] / 1000
            dead = silent_s > STALE_S or durable.is_dead(document["owner"])
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            # The file is incomplete, because the disk was full when it was written; its holder is unknown.
            dead = False
        if dead:
            self._place.remove(f"{LOCKS}/{name}")
        return not dead

    def _holder(self, name: str) -> str:
        try:
            host, pid, _ = json.loads(self._place.read(f"{LOCKS}/{name}"))["owner"].rsplit("@", 2)
            return f"{LOCKS}/{name} is of process {pid} on {host}"
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return f"{LOCKS}/{name} is of somebody who has just begun or ended"
