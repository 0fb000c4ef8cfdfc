"""How probable it is that one user engages with each of many items, by one version.

The program answers pairs: one row, one user and one item. What it is told of
the user is written once for all rows of a batch. Where it says what items are
near to (`item_query`, see `trainer/model/ranker.py`), it is asked once for each
category, without an item, and each item adds one product and its crosses.
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
"""The program's inputs that speak of the item; with them the rows of the ranker's own tables that do."""


class UserPairs:
    """Scores items for one user; as good as what is prepared.

    Args:
        predictor: What answers.
        prepared: One question, without an item.
        outputs: What the program says of it.

    Attributes:
        categories: Of all items so far, those that they count as of; 0 where none is known.
        query: What items are near to, `[dim]` float32; None where the version's program does not say.
    """

    def __init__(self, predictor: Predictor, prepared: Prepared, outputs: Mapping[str, F32]) -> None:
        self._predictor, self._prepared = predictor, prepared
        self._batches: dict[int, Inputs] = {}
        self._of_category: dict[int, float] = {}
        self.categories: list[int] = []
        self.query: F32 | None = outputs["item_query"][0].copy() if "item_query" in outputs else None

    def logits(self, items: Sequence[tuple[int, int]]) -> F32:
        """The engagement logit of each item, `[n]` float32. The program must have the version's weights.

        Args:
            items: At most `PAIRS`: the id of each and of its category; 0 where the one that it was last seen in counts.
        """
        prepared = self._prepared
        if self.query is not None and not prepared.version.own:
            return self._near(items, self.query)
        asked = self._predictor.items_of(prepared.asked[0], items)
        self.categories += [one.category for one in asked]
        return self._engagement(asked, batch_of(len(items)))

    def _near(self, items: Sequence[tuple[int, int]], query: F32) -> F32:
        """What the category of each item says, its row times the query, and its crosses."""
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
        """What the program says of each, in one batch of `size` rows."""
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
        """The user's windows, as often as that."""
        columns: list[Any] = [np.broadcast_to(one, (count, *one.shape[1:])) for one in self._prepared.vectors]
        return Vector(*columns)

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
