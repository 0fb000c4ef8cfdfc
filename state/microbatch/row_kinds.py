"""The kinds of rows in a micro-batch: whether a row is an event at its offset, and whether it is learned from.

An event whose label is known, or that never gets one, is one row: it goes into
the histories and into the weights. An impression whose label comes later is two
rows: one at its own offset, for the histories, and one where its label became
known, for the weights. An outcome, such as a click on an impression, goes only
into the histories, since its impression's row carries it as the label.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Kind(enum.IntEnum):
    """The kinds, with the values that micro-batches store."""

    ROW = 0  # an event at its own offset, which is learned from
    OPENED = 1  # an impression that waits for its label; a later row is learned from
    DROPPED = 2  # an impression that cannot wait: it came too late, or too many wait
    FEEDBACK = 3  # an outcome
    JOINED = 4  # an earlier impression, labelled by the outcome at this offset
    EXPIRED = 5  # an earlier impression whose wait ended at this offset: negative


KINDS = len(Kind)


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Earlier impressions whose label became known in a batch of events.

    Attributes:
        by: `[m]` int64 index into the batch: the last event of the source that is not after the row's offset; -1 if
            there is none.
        source: `[m]` uint16 source of the row's offset, an index into the batch's ranges.
        offset: `[m]` int64 offset at which the label became known.
        opened: `[m]` int64, offset of the impression in the same source.
        kind: `[m]` uint8, JOINED or EXPIRED.
        label: `[m]` float32.
        weight: `[m]` float32 weight of the outcome's action; NaN keeps the impression's weight.
        at_ms: `[m]` int64 event time at which the label became known.
        columns: The rows' columns as in a micro-batch; None until they are loaded.
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
        """The number of rows."""
        return len(self.by)

    def __bool__(self) -> bool:
        """Always true, even without rows."""
        return True


def happened(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows are events at their own offset, for histories.

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
    """Counts rows by the outcomes of a `Range`; a dropped impression counts as opened too.

    >>> counts(np.array([Kind.ROW, Kind.OPENED, Kind.DROPPED, Kind.EXPIRED], np.uint8))
    {'rows': 1, 'opened': 2, 'feedback': 0, 'joined': 0, 'expired': 1, 'dropped': 1}
    """
    return _named(np.bincount(kind, minlength=KINDS))


def counts_by_range(kind: NDArray[np.uint8], source: NDArray[np.uint16], ranges: int) -> list[dict[str, int]]:
    """Like `counts`, for each range of a batch; `source` is an index of its `ranges` ranges."""
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
