"""Which ids leave a table that is full: those used least and longest ago, a function of what a version holds.

An id ranks by the log time of its last sighting, and by a day more for each
doubling of its use. So an id that was used a thousand times is kept ten days
longer than one that was seen once, and a flood of new ids pushes out itself.
What ranks equal leaves by the smaller id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.tables.index import U64

I64 = npt.NDArray[np.int64]

DOUBLING_MS = 86_400_000
"""By how much longer an id is kept for each doubling of its use."""

LEAST = 2.0**-20
"""Less use than this counts as none."""

ROOM = 8
"""One of so many ids of a full table leaves at once, so that it is not full again in the next step."""


def octaves(use: npt.NDArray[np.generic]) -> I64:
    """How often `[n]` amounts of use were doubled, rounded down: exact, so that no rounding decides who leaves.

    >>> octaves(np.array([0.0, 0.5, 1.0, 3.9, 4.0])).tolist()
    [-20, -1, 0, 1, 2]
    """
    return np.frexp(np.maximum(use.astype(np.float64), LEAST))[1].astype(np.int64) - 1


def least_used(ids: U64, last_seen_ms: I64, doublings: I64, most: int) -> npt.NDArray[np.int64]:
    """Who leaves a table of more than `most` ids, so that there is some room again.

    Args:
        ids: `[n]` uint64, distinct.
        last_seen_ms: `[n]` int64.
        doublings: `[n]` int64, see `octaves`.
        most: The cap.

    Returns:
        Which of them, in no order that counts.

    >>> least_used(np.array([5, 6, 7], np.uint64), np.array([3, 1, 2]), np.array([0, 1, 0]), 2).tolist()
    [2]
    """
    leaving = len(ids) - (most - most // ROOM)
    ranks = last_seen_ms + DOUBLING_MS * doublings
    bound = np.partition(ranks, leaving - 1)[leaving - 1]
    surely, equal = np.flatnonzero(ranks < bound), np.flatnonzero(ranks == bound)
    return np.concatenate([surely, equal[np.argsort(ids[equal])[: leaving - surely.size]]])
