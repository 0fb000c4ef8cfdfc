"""Which workers of one port accept connections: those that are prepared, or all of them while none is.

A worker compiles or loads its kernels at its start and computes first answers. Meanwhile it would answer requests with
503 that another worker can answer, and the client of a shared port cannot choose. While no worker is prepared, all
accept connections, so that health checks are answered and other requests are refused with the reason.
"""

from __future__ import annotations

import ctypes

AWAY, WAITING, PREPARED = range(3)
"""States of a worker: it accepts no connections, it accepts some although it is not prepared, or it is prepared."""

States = ctypes.Array[ctypes.c_ubyte]
"""The state of each worker of a port, by number, in memory that they share."""


class Rotation:
    """One worker's part in the rotation.

    >>> states = (ctypes.c_ubyte * 2)()
    >>> first, second = Rotation(states, 0), Rotation(states, 1)
    >>> second.open(), first.prepare()
    (True, None)
    >>> first.accepts, second.accepts, first.is_settled
    (True, False, False)
    >>> second.closed()
    >>> first.is_settled
    True

    Args:
        states: Of all workers; each worker writes its own, and their parent that of a worker that has died.
        number: The number of this worker.
    """

    def __init__(self, states: States | None = None, number: int = 0) -> None:
        self._states: States = (ctypes.c_ubyte * 1)() if states is None else states
        self._number = number

    @property
    def accepts(self) -> bool:
        """Whether this worker is to accept connections now."""
        states = self._states[:]
        return states[self._number] == PREPARED or PREPARED not in states

    @property
    def is_settled(self) -> bool:
        """Whether no worker accepts connections without being prepared."""
        return WAITING not in self._states[:]

    def prepare(self) -> None:
        """Reports that this worker is prepared."""
        self._states[self._number] = PREPARED

    def open(self) -> bool:
        """Reports that this worker is about to accept connections; returns whether it still is to."""
        if self._states[self._number] != PREPARED:
            self._states[self._number] = WAITING
            # Another worker is prepared since this one asked; or it sees from now on that this one accepts.
            if not self.accepts:
                self.closed()
        return self.accepts

    def closed(self) -> None:
        """Reports that this worker accepts no more connections."""
        self._states[self._number] = AWAY
