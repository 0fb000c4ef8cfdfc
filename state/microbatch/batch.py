"""The micro-batch: the rows of one training step, and a header with their origin.

One micro-batch is one record of the micro-batch log and one training step.
`state/microbatch/codec.py` encodes it, `state/microbatch/cutting.py` splits one that is too large.

Besides rows for events at their own offset there are rows only for histories
and rows only for the trainer (`state/microbatch/row_kinds.py`). A row only for
the trainer has the offset at which its label became known, that of the event
that made it known. So several rows can share one offset, and a micro-batch
never ends between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.microbatch.columns import ATTRIBUTES, NAMES, SEQUENCES, SINCE_2, absent_column
from state.positions import Range

_UNSAID: NDArray[Any] = np.empty(0, np.uint8)


def _unsaid() -> NDArray[Any]:
    return _UNSAID


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a micro-batch.

    Attributes:
        spec: Digest of the feature spec.
        salt: Fingerprint of the users' salt.
        ranges: One contiguous range of positions per source; `source` of a row is an index into it.
        created_ms: When the batch was cut, wall clock.
        mask_generation: The generation of the mask that its windows were computed with; 0 for none.
        names: Id -> name, of categories and measured attributes that the stream had not announced recently.
        attributes: Names of the attributes of users and of items, in the order of their columns.
        log_epoch: The epoch of the log in which it was written, see `state/registry/log_line.py`.
        clocks: For each range the time before its first and after its last event, ms, by the clocks of many users;
            see `state/microbatch/log_time.py`. Empty if the stream did not write it.
    """

    spec: str
    salt: str
    ranges: tuple[Range, ...]
    created_ms: int
    mask_generation: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    attributes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    log_epoch: int = 1
    clocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The rows of one training step, in the order of the log within each source.

    Attributes:
        header: The header.
        user: `[n]` uint64 ids; 0 is none.
        item: `[n]` uint64 ids.
        category: `[n]` uint64 ids.
        action: `[n]` uint8 index into the configured actions.
        at_ms: `[n]` int64 event time, ms.
        label: `[n]` float32; NaN if unknown.
        weight: `[n]` float32 weight of the action.
        source: `[n]` uint16 index into `header.ranges`.
        offset: `[n]` int64 offset of the row within the source.
        context: `[n, K]` uint64 ids.
        features: `[n, D]` uint16.
        recent_categories: `[n, L]` uint64 category ids, newest first; 0 pads.
        category_windows: `[n, L, F]` uint16.
        kind: `[n]` uint8 `Kind`.
        waited: `[n]` int64, the row's offset minus that of its event.
        delay_ms: `[n]` int64, how much later than the row's event its label became known, event time, ms.
        request: `[n]` uint64 id by which an impression and its outcome are paired; 0 is none.
        user_attributes: `[n, Au]` uint64 ids, see `state/attributes/values.py`.
        item_attributes: `[n, Ai]` uint64 ids; never shown to the interest head.
        sequence_items: `[n, T]` uint64 ids of the user's latest events, see `state/features/kernel.py`; T may be 0.
        sequence_categories: `[n, T]` uint64 ids.
        sequence_actions: `[n, T]` uint16, 1 and up; 0 pads.
        sequence_ages: `[n, T]` uint16 recencies.
    """

    header: Header
    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    context: NDArray[np.uint64]
    features: NDArray[np.uint16]
    recent_categories: NDArray[np.uint64]
    category_windows: NDArray[np.uint16]
    kind: NDArray[np.uint8] = field(default_factory=_unsaid)
    waited: NDArray[np.int64] = field(default_factory=_unsaid)
    delay_ms: NDArray[np.int64] = field(default_factory=_unsaid)
    request: NDArray[np.uint64] = field(default_factory=_unsaid)
    user_attributes: NDArray[np.uint64] = field(default_factory=_unsaid)
    item_attributes: NDArray[np.uint64] = field(default_factory=_unsaid)
    sequence_items: NDArray[np.uint64] = field(default_factory=_unsaid)
    sequence_categories: NDArray[np.uint64] = field(default_factory=_unsaid)
    sequence_actions: NDArray[np.uint16] = field(default_factory=_unsaid)
    sequence_ages: NDArray[np.uint16] = field(default_factory=_unsaid)

    def __post_init__(self) -> None:
        """Fills missing columns: rows that did not wait, without attributes and sequences."""
        for name in (*SINCE_2, *ATTRIBUTES, *SEQUENCES):
            if getattr(self, name) is _UNSAID:
                object.__setattr__(self, name, absent_column(name, len(self.user)))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.user)

    @property
    def opened(self) -> NDArray[np.int64]:
        """The offset of each row's own event, `[n]` int64; unique among the rows that are `trained`."""
        return self.offset - self.waited

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by name, as `encode` takes them."""
        names = (*NAMES, *SEQUENCES) if self.sequence_items.shape[1] else NAMES
        return {name: getattr(self, name) for name in names}

    def rows(self, part: slice) -> MicroBatch:
        """A slice of the rows, as views, with the same header."""
        return MicroBatch(self.header, **{name: column[part] for name, column in self.columns.items()})

    def take(self, keep: NDArray[np.bool_]) -> MicroBatch:
        """The rows selected by `keep` (`[n]` bool), with the same header."""
        if keep.all():
            return self
        return MicroBatch(self.header, **{name: column[keep] for name, column in self.columns.items()})
