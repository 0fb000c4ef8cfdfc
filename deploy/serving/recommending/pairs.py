"""Scores how likely one user is to engage with each of many items, with one version.

The program scores pairs: each row is one user and one item. The user's inputs are
written once for all rows of a batch. If the program has the output `item_query`
(see `trainer/model/ranker.py`), it runs once per category, without an item. Each
item then adds one dot product and its crosses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.inputs import Asked, Inputs, add_items, add_own_rows, cross_logits, item_rows
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.program import BATCHES, PAIRS, batch_of
from state.features.arrays import Vector

F32 = NDArray[np.float32]

ITEM_INPUTS = ("item_row", "category_row", "cross")
"""The program's inputs that depend on the item, in addition to the item's rows of the ranker's custom tables."""


class UserPairs:
    """Scores items for one user; valid as long as the prepared query.

    Args:
        predictor: The predictor.
        prepared: One prepared query, without an item.
        outputs: The program's outputs for it.

    Attributes:
        categories: The categories of all items scored so far; 0 if unknown.
        query: The vector that item rows are multiplied with, `[dim]` float32; None if the program does not have it.
    """

    def __init__(self, predictor: Predictor, prepared: Prepared, outputs: Mapping[str, F32]) -> None:
        self._predictor, self._prepared = predictor, prepared
        self._batches: dict[int, Inputs] = {}
        self._of_category: dict[int, float] = {}
        self.categories: list[int] = []
        self.query: F32 | None = outputs["item_query"][0].copy() if "item_query" in outputs else None

    def logits(self, items: Sequence[tuple[int, int]]) -> F32:
        """Returns the engagement logit of each item, `[n]` float32. The program must have the version's weights loaded.

        Args:
            items: At most `PAIRS` pairs of item id and category id; 0 for the category the item was last seen in.
        """
        prepared = self._prepared
        if self.query is not None and not prepared.version.own:
            return self._near(items, self.query)
        asked = self._predictor.items_of(prepared.asked[0], items)
        self.categories += [one.category for one in asked]
        return self._engagement(asked, batch_of(len(items)))

    def _near(self, items: Sequence[tuple[int, int]], query: F32) -> F32:
        """Computes logits as the sum of the category's logit, the item's row times the query, and the crosses."""
        prepared, predictor, size = self._prepared, self._predictor, BATCHES[-1]
        version, rows = prepared.version, prepared.rows
        categories = predictor.catalogue.categories_of(items)
        self.categories += categories
        new = [(0, one) for one in dict.fromkeys(categories) if one not in self._of_category]
        for first in range(0, len(new), size):
            of_none = predictor.items_of(prepared.asked[0], new[first : first + size])
            logits = self._engagement([one._replace(query=prepared.asked[0].query) for one in of_none], size)
            self._of_category |= zip([one.category for one in of_none], logits.tolist(), strict=True)
        found = np.array([self._of_category[one] for one in categories], np.float32)
        if not predictor.item_attributes and not version.cross_shares.size:
            return found + rows.items([item for item, _ in items]) @ query
        asked = predictor.items_of(
            prepared.asked[0], [(item, one) for (item, _), one in zip(items, categories, strict=True)]
        )
        found += item_rows(rows, asked) @ query
        if version.cross_shares.size:
            found += cross_logits(version, rows, asked, self._vectors(len(asked)).features, version.features.crosses)
        return found

    def _engagement(self, asked: Sequence[Asked], size: int) -> F32:
        """Runs the program on each pair, in one batch of `size` rows."""
        version, rows, count = self._prepared.version, self._prepared.rows, len(asked)
        vectors, inputs = self._vectors(count), self._batch(size)
        for name in ITEM_INPUTS:
            if name in inputs:
                inputs[name][:] = 0.0
        add_items(inputs, version, rows, asked, vectors, version.features.crosses)
        if version.own:
            add_own_rows(inputs, version, rows, asked, vectors, np.repeat(self._prepared.successors, count, 0))
        return version.program.predict(inputs)["engagement_logit"][:count].reshape(count).copy()

    def _vectors(self, count: int) -> Vector:
        """Repeats the user's windows `count` times."""
        columns: list[Any] = [np.broadcast_to(one, (count, *one.shape[1:])) for one in self._prepared.vectors]
        return Vector(*columns)

    def _batch(self, size: int) -> Inputs:
        """Returns the user's inputs, repeated in `size` rows."""
        if size not in self._batches:
            shapes = self._prepared.version.program.shapes
            self._batches[size] = {
                name: np.repeat(values[:1], size, 0) if shapes[name][0] < 0 else values
                for name, values in self._prepared.inputs.items()
            }
        return self._batches[size]


def in_batches(items: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    """Splits items into batches of at most `PAIRS`.

    >>> [len(piece) for piece in in_batches([(1, 0)] * 300)]
    [256, 44]
    """
    return [items[first : first + PAIRS] for first in range(0, len(items), PAIRS)]
