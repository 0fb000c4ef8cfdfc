"""Ranks the items that a caller names, for one user, all by one version."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np

from deploy.serving.answer import About, Answer, Query
from deploy.serving.answering import probability
from deploy.serving.predictor import Predictor
from deploy.serving.recommending.pairs import UserPairs, in_batches
from state.events.identity import public_id

MOST_ITEMS = 1000


class NamedItem(NamedTuple):
    """An item as a caller names it.

    Attributes:
        item: The raw id.
        category: The raw id of its category; by default the one it was last seen in.
    """

    item: str
    category: str | None = None


class RankedItem(TypedDict):
    """An item with the name of the category that it counts as of, None where none is known, and the probability."""

    item: str
    category: str | None
    probability: float


@dataclass(slots=True)
class RankedItems(About):
    """The items of one user, best first.

    Attributes:
        items: The most probable first; of equal ones the one that was named first.
    """

    items: list[RankedItem]


def rank(predictor: Predictor, query: Query, items: Sequence[NamedItem]) -> Generator[None, None, RankedItems]:
    """Ranks items; stops after each batch, so that others are answered meanwhile, and returns the answer.

    Args:
        predictor: What answers.
        query: About the user, without an item.
        items: At least one, at most `MOST_ITEMS`.

    Raises:
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
    """
    ids = [(public_id(one.item), 0 if one.category is None else public_id(one.category)) for one in items]
    with predictor.reading() as reader:
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        (about,) = predictor.answered(prepared, outputs)
        pairs, found = UserPairs(predictor, prepared, outputs), []
        for piece in in_batches(ids):
            # Others may have been answered by a version that came meanwhile.
            predictor.take_up(reader)
            found.append(pairs.logits(piece))
            yield
        logits = np.concatenate(found)
    names = {one: predictor.catalogue.name_of(one).name for one in {*pairs.categories} if one}
    ranked = [
        RankedItem(
            item=items[place].item,
            category=names.get(pairs.categories[place]),
            probability=probability(float(logits[place])),
        )
        for place in np.argsort(-logits, kind="stable").tolist()
    ]
    return about_user(about, ranked)


def about_user(about: Answer, items: list[RankedItem]) -> RankedItems:
    """The answer about a user's items."""
    return RankedItems(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock, items
    )
