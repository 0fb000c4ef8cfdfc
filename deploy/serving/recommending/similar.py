"""Items near to one user, by nothing but the rows: what the user's engagement is multiplied with, times the item's row."""

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
"""So many times the items that are asked for are looked at: the index may be behind, and knows no attributes."""


class NearWanted(NamedTuple):
    """What is asked for.

    Attributes:
        most: So many items at most.
        exclude_seen: Leaves out what the user clicked.
    """

    most: int
    exclude_seen: bool = False


class SimilarItem(TypedDict):
    """An item (its name, or id where it has none), its id, its category's name or None, and how near it is."""

    item: str
    id: str
    category: str | None
    similarity: float


@dataclass(slots=True)
class SimilarItems(About):
    """The items near to one user, the nearest first."""

    items: list[SimilarItem]


def similar(predictor: Predictor, near: NearItems, query: Query, wanted: NearWanted) -> SimilarItems:
    """Finds them; all rows are of one version.

    Args:
        predictor: What answers.
        near: What proposes.
        query: About the user, without an item.
        wanted: What is asked for.

    Raises:
        NotOffered: The version's model has no query of items.
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
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
    """The items near to a user that the version has a row of, nearly in order.

    Args:
        near: What proposes.
        user: `[dim]` float32, what the user's engagement is multiplied with.
        rows: Of the version.
        most: How many at most.
    """
    return [item for item in near.nearest(user, most) if rows.has_item(item)]


def _about(about: Answer, items: list[SimilarItem]) -> SimilarItems:
    return SimilarItems(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock, items
    )
