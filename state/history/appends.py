"""What histories gain by a batch of events, grouped by user."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from state.features.spec import EVENT, Events


@dataclass(frozen=True, slots=True, eq=False)
class Appends:
    """What histories gain, by user; each user once.

    Attributes:
        users: `[k]` uint64, unique.
        starts: `[k]` int64, where the user's events begin in `events`.
        lengths: `[k]` int64, how many they are.
        events: `[m]` EVENT, each user's in order of arrival.
    """

    users: NDArray[np.uint64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    events: Events

    @classmethod
    def none(cls) -> Appends:
        """No events.

        >>> len(Appends.none().users)
        0
        """
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, EVENT))

    @classmethod
    def of(cls, users: NDArray[np.uint64], events: Events) -> Appends:
        """Groups events by user.

        Args:
            users: `[m]` uint64, the user of each event.
            events: `[m]` EVENT in order of arrival.

        >>> appends = Appends.of(np.array([7, 5, 7], np.uint64), np.zeros(3, EVENT))
        >>> appends.users.tolist(), appends.starts.tolist(), appends.lengths.tolist()
        ([5, 7], [0, 1], [1, 2])
        """
        if not len(users):
            return cls.none()
        order = np.argsort(users, kind="stable")
        ordered = users[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        return cls(ordered[starts], starts, np.diff(np.append(starts, len(users))), events[order])
