"""What kind of row a row of a micro-batch is: whether it happened at its place, and whether it is learned from.

An event whose label is known, or will never be asked for, is one row: it goes
into the histories and into the weights. An impression whose label comes later
is two: one at its own place, for the histories, and one where its label became
known, for the weights. An outcome, such as a click on an impression, goes into
the histories only, for its impression's row carries it as label.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Kind(enum.IntEnum):
    """The kinds, as micro-batches write them."""

    ROW = 0  # happened here, and is learned from
    OPENED = 1  # an impression that waits for its label; a later row is learned from
    DROPPED = 2  # an impression that cannot wait: it came too late, or too many wait
    FEEDBACK = 3  # an outcome
    JOINED = 4  # an earlier impression, labelled by the outcome at this place
    EXPIRED = 5  # an earlier impression whose wait is over at this place: negative


KINDS = len(Kind)


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Earlier impressions whose label a batch of events made known.

    Attributes:
        by: `[m]` int64, the event behind which each stands, an index of the batch: the last one of its source that is not
            after its place; -1 before the first one.
        source: `[m]` uint16, of its place, an index of the batch's ranges.
        offset: `[m]` int64, of its place.
        opened: `[m]` int64, offset of the impression in the same source.
        kind: `[m]` uint8, JOINED or EXPIRED.
        label: `[m]` float32.
        weight: `[m]` float32, of the outcome's action; NaN keeps that of the impression's.
        at_ms: `[m]` int64 event time at which it became known.
        columns: Their columns as a micro-batch has them; None until they were looked up.
    """

    by: NDArray[np.int64]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    opened: NDArray[np.int64]
    kind: NDArray[np.uint8]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    at_ms: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]] | None = None

    def __len__(self) -> int:
        """How many they are."""
        return len(self.by)

    def __bool__(self) -> bool:
        """None of them is known too."""
        return True


def happened(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows are events at their place, for histories.

    >>> happened(np.array([Kind.ROW, Kind.FEEDBACK, Kind.JOINED], np.uint8)).tolist()
    [True, True, False]
    """
    found: NDArray[np.bool_] = kind < Kind.JOINED
    return found


def trained(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows are learned from.

    >>> trained(np.array([Kind.ROW, Kind.OPENED, Kind.EXPIRED], np.uint8)).tolist()
    [True, False, True]
    """
    found: NDArray[np.bool_] = (kind == Kind.ROW) | (kind >= Kind.JOINED)
    return found


def counts(kind: NDArray[np.uint8]) -> dict[str, int]:
    """Rows by what a `Range` counts; a dropped impression was opened too.

    >>> counts(np.array([Kind.ROW, Kind.OPENED, Kind.DROPPED, Kind.EXPIRED], np.uint8))
    {'rows': 1, 'opened': 2, 'feedback': 0, 'joined': 0, 'expired': 1, 'dropped': 1}
    """
    return _named(np.bincount(kind, minlength=KINDS))


def counts_by_range(kind: NDArray[np.uint8], source: NDArray[np.uint16], ranges: int) -> list[dict[str, int]]:
    """The same for each range of a batch; `source` is an index of its `ranges` ranges."""
    found = np.bincount(source.astype(np.int64) * KINDS + kind, minlength=KINDS * ranges)
    return [_named(one) for one in found.reshape(-1, KINDS)[:ranges]]


def _named(found: NDArray[np.int64]) -> dict[str, int]:
    rows, opened, dropped, feedback, joined, expired = found.tolist()
    return {
        "rows": rows,
        "opened": opened + dropped,
        "feedback": feedback,
        "joined": joined,
        "expired": expired,
        "dropped": dropped,
    }
