"""One writer at a place: who makes a backup there, or prunes, is alone, so that nobody removes what another counts on.

1. A file under `locks/` says who, and when it was last looked after.
2. Whoever then sees another one takes its own away and gives up: of two at once both may, never none.

A writer that died on this machine is known by its process; one elsewhere by
its silence. Before a backup counts its writer looks whether it still is alone:
one that slept for long, a suspended machine, finds its file gone and begins anew.
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
    """Holds a place in its block.

    Args:
        place: The place.
        clock: The wall clock, seconds.
        owner: Who holds it: host, pid and start time.

    Raises:
        LockHeld: Another one writes there.
    """

    def __init__(self, place: FilePlace, clock: Callable[[], float] = time.time, owner: str = "") -> None:
        self._place, self._clock = place, clock
        self._owner = owner or durable.owner_mark()
        self._name = f"{LOCKS}/{os.urandom(8).hex()}.json"
        self._written_s = 0.0

    def __enter__(self) -> Lease:
        """Takes it."""
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
        """Gives it back."""
        self._place.remove(self._name)

    def refresh(self) -> None:
        """Says that its holder lives; cheap enough to call all the time."""
        if self._clock() - self._written_s >= REFRESH_S:
            self.require_held()
            self._write()

    def require_held(self) -> None:
        """Raises BackupError where somebody took it for one of the dead."""
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
        """Whether a holder lives; the file of one that does not is removed."""
        try:
            document = json.loads(self._place.read(f"{LOCKS}/{name}"))
            silent_s = self._clock() - document["at_ms"] / 1000
            dead = silent_s > STALE_S or durable.is_dead(document["owner"])
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            # Of a disk that filled up at that moment; who holds it cannot be told.
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
