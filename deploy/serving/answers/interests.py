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
from state.ranking.interest_scores import MASKED, READ, Columns, Workspace, correct, keys_of_items
from state.ranking.item_lists import EVERYTHING

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
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
    clicks = (events["item"] != 0) & (events["at_ms"] <= at_ms) & (events["flags"] & (LABELLED | POSITIVE) != LABELLED)
    if mask:
        clicks &= ~mask.events(events, user)
    places = np.flatnonzero(clicks)
    if not places.size:
        return 0
    times = events["at_ms"][places]
    return int(events["item"][places[places.size - 1 - int(np.argmax(times[::-1]))]])


def correction_of(
    version: LoadedVersion,
    rows: VersionRows,
    vectors: Vector,
    successors: U64,
    newest: Sequence[int],
    at_ms: Sequence[int],
) -> Correction | None:
    """Returns the correction for n queries; None if the version has none.

    Args:
        version: The version.
        rows: Its rows.
        vectors: The features of n users.
        successors: `[n, S]` uint64, padded with 0.
        newest: The item of each user's latest click; 0 for none.
        at_ms: The time of each query.
    """
    weights = version.interest_weights
    if weights is None:
        return None
    recent, count = vectors.recent_categories, len(newest)
    has_successors = "successor_mask" in version.program.shapes
    popular = np.broadcast_to(version.popular, (count, version.popular.size))
    ids = np.concatenate([recent, popular, successors] if has_successors else [recent, popular], 1)
    items = keys_of_items(np.array(newest, np.uint64)).tolist()
    keys = [0, *EVERYTHING.tolist(), *recent[:, 0].tolist(), *items]
    read = np.empty((count, READ), np.int32)
    read[:, : len(EVERYTHING)] = np.arange(1, 1 + len(EVERYTHING))
    read[:, READ - 2 :] = np.arange(1 + len(EVERYTHING), len(keys)).reshape(2, count).T
    phi = _columns(version.features.spec).phi(vectors.features, vectors.category_windows)
    offset = np.where(ids != 0, np.float32(0.0), MASKED)
    # A popular category that is also the user's own is a candidate once.
    slots = slice(recent.shape[1], recent.shape[1] + popular.shape[1])
    offset[:, slots][(recent[:, :, None] == version.popular).any(1)] = MASKED
    there = offset == 0.0
    lists = rows.next_categories(keys)
    correct(
        lists, read, np.array(at_ms) // 1000, ids, offset, recent.shape[1], weights, phi, Workspace.empty(ids.shape[1])
    )
    return Correction((phi @ weights[0]).astype(np.float32)[:, None], np.where(there, offset, np.float32(0.0)))
