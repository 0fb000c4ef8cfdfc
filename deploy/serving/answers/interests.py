"""Interests of a version: the model's logits, corrected by decayed counts (`state/ranking/interest_scores.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.version import LoadedVersion, VersionRows
from state.features.arrays import Vector
from state.features.mask import Mask
from state.features.spec import LABELLED, POSITIVE, Events
from state.ranking.interest_scores import MASKED, READ, Columns, correct, keys_of_items
from state.ranking.item_lists import EVERYTHING

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
_LABEL = LABELLED | POSITIVE
_EVERY = (0, *EVERYTHING.tolist())
_columns = lru_cache(maxsize=4)(Columns)


class Correction(NamedTuple):
    """The correction of the logits of n queries: `factor` times the logit plus `offset`.

    Attributes:
        factor: `[n, 1]` float32.
        offset: `[n, M]` float32.
    """

    factor: F32
    offset: F32

    def apply(self, logits: F32) -> F32:
        """Returns corrected logits, `[n, M]` float32; masked ones stay masked."""
        return np.where(logits > MASKED / 2, self.factor * logits + self.offset, logits)


def newest_item(events: Events, at_ms: int, mask: Mask, user: int) -> int:
    """Returns the item of a user's latest click up to a time; 0 without one.

    Args:
        events: In the order in which they were appended.
        at_ms: The time of the query.
        mask: Hides events.
        user: The user.
    """
    if not len(events):
        return 0
    # Usually the latest event is such a click.
    latest = events[len(events) - 1 - int(np.argmax(events["at_ms"][::-1]))]
    if not mask and latest["item"] and latest["at_ms"] <= at_ms and latest["flags"] & _LABEL != LABELLED:
        return int(latest["item"])
    clicks = (events["item"] != 0) & (events["at_ms"] <= at_ms) & (events["flags"] & _LABEL != LABELLED)
    if mask:
        clicks &= ~mask.events(events, user)
    clicked = events[clicks]
    if not len(clicked):
        return 0
    return int(clicked["item"][len(clicked) - 1 - int(np.argmax(clicked["at_ms"][::-1]))])


def correction_of(
    version: LoadedVersion,
    rows: VersionRows,
    vectors: Vector,
    ids: U64,
    masks: Sequence[F32],
    asked: Sequence[tuple[int, int]],
) -> Correction:
    """Returns the correction for n queries; the version must have one.

    Args:
        version: The version.
        rows: Its rows.
        vectors: The features of n users.
        ids: `[n, M]` uint64, the candidates.
        masks: The program's masks of the M candidates, by kind, `[n or more, .]` float32: 1 for a candidate, else 0.
        asked: For each query the item of the user's latest click, 0 for none, and the time in ms.
    """
    weights = version.interest_weights
    assert weights is not None
    recent, count = vectors.recent_categories, len(asked)
    items, at_ms = zip(*asked, strict=True)
    of_items = keys_of_items(np.array(items, np.uint64)).tolist()
    lists, places = rows.next_categories([*_EVERY, *recent[:, 0].tolist(), *of_items])
    read = np.empty((count, READ), np.int32)
    read[:] = places[1 : 1 + READ]
    read[:, READ - 2] = places[len(_EVERY) : len(_EVERY) + count]
    read[:, READ - 1] = places[len(_EVERY) + count :]
    offset = np.concatenate(masks, 1)[:count]
    # 0 for a candidate, MASKED for none.
    offset -= np.float32(1.0)
    offset *= -MASKED
    phi = _columns(version.features.spec).phi(vectors.features, vectors.category_windows)
    at_s = np.array(at_ms, np.int64) // 1000
    correct(lists, read, at_s, ids, offset, recent.shape[1], weights, phi, version.interest_work)
    return Correction((phi @ weights[0]).astype(np.float32)[:, None], offset)
