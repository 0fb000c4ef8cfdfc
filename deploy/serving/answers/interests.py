"""Interests of a version: the model's logits, corrected by decayed counts (`state/ranking/interest_scores.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.version import LoadedVersion, VersionRows
from state.compiled import compiled
from state.features.arrays import Vector
from state.features.mask import Mask
from state.features.spec import LABELLED, POSITIVE, Events
from state.ranking.interest_scores import MASKED, Columns, correct, key_of_item
from state.ranking.item_lists import EVERYTHING, LISTS_OF_EVERYTHING

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
_LABEL = LABELLED | POSITIVE
_EVERY = (0, *EVERYTHING.tolist())
_NOTHING_HIDDEN = np.zeros(0, np.bool_)
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
        corrected = logits * self.factor
        corrected += self.offset
        corrected[logits <= MASKED / 2] = MASKED
        return corrected


def newest_item(events: Events, at_ms: int, mask: Mask, user: int) -> int:
    """Returns the item of a user's latest click up to a time; 0 without one.

    Args:
        events: In the order in which they were appended.
        at_ms: The time of the query.
        mask: Hides events.
        user: The user.
    """
    hidden = mask.events(events, user) if mask else _NOTHING_HIDDEN
    return int(_newest_item(events["at_ms"], events["item"], events["flags"], hidden, at_ms))


@compiled("const(i8[:]), const(u8[:]), const(u1[:]), bool[::1], i8")
def _newest_item(
    at_ms: I64, items: U64, flags: NDArray[np.uint8], hidden: NDArray[np.bool_], until_ms: int
) -> np.uint64:
    newest_ms, newest = np.int64(-1), np.uint64(0)
    for i in range(at_ms.shape[0]):
        if newest_ms <= at_ms[i] <= until_ms and items[i] != 0 and flags[i] & _LABEL != LABELLED:
            if hidden.shape[0] == 0 or not hidden[i]:
                newest_ms, newest = at_ms[i], items[i]
    return newest


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
    count = len(asked)
    keys = [*_EVERY, *vectors.recent_categories[:, 0].tolist(), *(key_of_item(np.uint64(item)) for item, _ in asked)]
    lists, found = rows.next_categories(keys)
    # The first list is that of no key.
    places = np.array(found[1:], np.int32)
    # 0 for a candidate, MASKED for none.
    offset = np.concatenate(masks, 1)[:count]
    offset -= np.float32(1.0)
    offset *= -MASKED
    phi = _columns(version.features.spec).phi(vectors.features, vectors.category_windows)
    correct(
        lists,
        places[:LISTS_OF_EVERYTHING],
        np.ascontiguousarray(places[LISTS_OF_EVERYTHING:].reshape(-1, count).T),
        np.array([at_ms // 1000 for _, at_ms in asked]),
        ids,
        offset,
        weights,
        phi,
        version.interest_work,
    )
    return Correction((phi @ weights[0]).astype(np.float32)[:, None], offset)
