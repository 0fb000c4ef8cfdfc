"""Finds the items nearest to one user: the dot product of the user's item query vector and each item's row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import About, Answer, Query
from deploy.serving.inputs import item_rows
from deploy.serving.loaded_version import VersionRows
from deploy.serving.predictor import Predictor
from deploy.serving.recommending.near_items import NearItems
from state.errors import NotOffered

PROPOSED = 4
"""The factor by which candidates exceed the requested items: the index may lag, and does not include attributes."""


class NearWanted(NamedTuple):
    """The parameters of a request for similar items.

    Attributes:
        most: The maximum number of items.
        exclude_seen: Whether to leave out items that the user clicked.
    """

    most: int
    exclude_seen: bool = False


class SimilarItem(TypedDict):
    """A similar item: its name (its id if it has no name), id, category name or None, and similarity."""

    item: str
    id: str
    category: str | None
    similarity: float


@dataclass(slots=True)
class SimilarItems(About):
    """The items nearest to one user, nearest first."""

    items: list[SimilarItem]


def similar(predictor: Predictor, near: NearItems, query: Query, wanted: NearWanted) -> SimilarItems:
    """Finds the items nearest to a user; all rows are from one version.

    Args:
        predictor: The predictor.
        near: The index that proposes items.
        query: The query about the user, without an item.
        wanted: The parameters of the request.

    Raises:
        NotOffered: The version's model has no output `item_query`.
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: See `Predictor.profiles`.
    """
    with predictor.reading() as reader:
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        (about,) = predictor.answered(prepared, outputs)
        one = prepared.asked[0]
        if "item_query" not in outputs:
            raise NotOffered(
                f"the model of version {about.version['number']} has no query of items",
                "ask /v1/recommendations, or give the ranker an item_query",
            )
        user = outputs["item_query"][0].copy()
        left_out = {*predictor.events_by(one, prepared.seen[1])["item"].tolist()} if wanted.exclude_seen else set[int]()
        found = near_to(near, user, prepared.rows, PROPOSED * wanted.most + len(left_out))
        asked = predictor.items_of(one, [(item, 0) for item in found if item not in left_out])
        products = item_rows(prepared.rows, asked) @ user
    order = np.argsort(-products, kind="stable")[: wanted.most].tolist()
    items = []
    for place in order:
        name, category = predictor.catalogue.item_name(asked[place].item), asked[place].category
        items.append(
            SimilarItem(
                item=name.name,
                id=name.hex,
                category=predictor.catalogue.name_of(category).name if category else None,
                similarity=float(products[place]),
            )
        )
    return _about(about, items)


def near_to(near: NearItems, user: NDArray[np.float32], rows: VersionRows, most: int) -> Sequence[int]:
    """Returns the items nearest to a user that have a row in the version, approximately in order.

    Args:
        near: The index that proposes items.
        user: `[dim]` float32, the user's item query vector.
        rows: The version's rows.
        most: The maximum number of items.
    """
    return [item for item in near.nearest(user, most) if rows.has_item(item)]


def _about(about: Answer, items: list[SimilarItem]) -> SimilarItems:
    return SimilarItems(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock, items
    )
