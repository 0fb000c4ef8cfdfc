"""How probable it is that one user engages with each of many items, by one version.

The program answers pairs: one row, one user and one item. What it is told of
the user is written once for all rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.inputs import Inputs, add_items, add_own_rows
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.program import PAIRS, batch_of
from state.features.arrays import Vector

F32 = NDArray[np.float32]

ITEM_INPUTS = ("item_row", "category_row", "cross")
"""The program's inputs that speak of the item; with them the rows of the ranker's own tables that do."""


class UserPairs:
    """Scores items for one user; as good as what is prepared.

    Args:
        predictor: What answers.
        prepared: One question, without an item.

    Attributes:
        categories: Of all items so far, those that they count as of; 0 where none is known.
    """

    def __init__(self, predictor: Predictor, prepared: Prepared) -> None:
        self._predictor, self._prepared = predictor, prepared
        self._batches: dict[int, Inputs] = {}
        self.categories: list[int] = []

    def logits(self, items: Sequence[tuple[int, int]]) -> F32:
        """The engagement logit of each item, `[n]` float32. The program must have the version's weights.

        Args:
            items: At most `PAIRS`: the id of each and of its category; 0 where the one that it was last seen in counts.
        """
        prepared, count = self._prepared, len(items)
        version, rows = prepared.version, prepared.rows
        asked = self._predictor.items_of(prepared.asked[0], items)
        self.categories += [one.category for one in asked]
        columns: list[Any] = [np.broadcast_to(column, (count, *column.shape[1:])) for column in prepared.vectors]
        vectors = Vector(*columns)
        inputs = self._batch(batch_of(count))
        for name in ITEM_INPUTS:
            if name in inputs:
                inputs[name][:] = 0.0
        add_items(inputs, version, rows, asked, vectors, version.features.crosses)
        if version.own:
            add_own_rows(inputs, version, rows, asked, vectors, np.repeat(prepared.successors, count, 0))
        return version.program.predict(inputs)["engagement_logit"][:count].reshape(count).copy()

    def _batch(self, size: int) -> Inputs:
        """What the program is told of the user, in `size` rows."""
        if size not in self._batches:
            shapes = self._prepared.version.program.shapes
            self._batches[size] = {
                name: np.repeat(values[:1], size, 0) if shapes[name][0] < 0 else values
                for name, values in self._prepared.inputs.items()
            }
        return self._batches[size]


def in_batches(items: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    """Items in pieces of at most `PAIRS`.

    >>> [len(piece) for piece in in_batches([(1, 0)] * 300)]
    [256, 44]
    """
    return [items[first : first + PAIRS] for first in range(0, len(items), PAIRS)]
