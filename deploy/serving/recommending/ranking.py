"""Ranks the items that a caller names for one user, all with one version."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import About, Answer, Query
from deploy.serving.answering import probability
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.recommending.advertising import Cap, LeftOut, bids_of, check_caps, over_caps
from deploy.serving.recommending.pairs import UserPairs, in_batches
from state.events.identity import public_id

MOST_ITEMS = 1000


class NamedItem(NamedTuple):
    """An item to rank.

    Attributes:
        item: The raw id.
        category: The raw id of its category; by default the one it was last seen in.
        bid: The value of an engagement; None to rank items by probability.
        cap: How often the user may see the item; None for no limit.
    """

    item: str
    category: str | None = None
    bid: float | None = None
    cap: Cap | None = None


class RankedItem(TypedDict):
    """A ranked item: the name of its category (None if unknown), and the engagement probability.

    With bids, it also has its bid and the expected value: probability × bid.
    """

    item: str
    category: str | None
    probability: float
    bid: NotRequired[float]
    expected_value: NotRequired[float]


@dataclass(slots=True)
class RankedItems(About):
    """The items of one user, best first.

    Attributes:
        items: The items by descending probability, or with bids by descending expected value; ties keep the order of
            the request.
    """

    items: list[RankedItem]


@dataclass(slots=True)
class CappedItems(RankedItems):
    """The items of one user, best first, if some items have caps.

    Attributes:
        left_out: The items that have reached their caps, in the order of the request.
    """

    left_out: list[LeftOut]


def rank(
    predictor: Predictor, query: Query, items: Sequence[NamedItem], impressions: Sequence[int] = ()
) -> Generator[None, None, RankedItems]:
    """Ranks items and returns the answer; yields after each batch, so that other requests are answered in between.

    Args:
        predictor: The predictor.
        query: The query about the user, without an item.
        items: 1 to `MOST_ITEMS` items.
        impressions: The numbers of the actions that caps count; if empty, all count.

    Raises:
        BadRequest: Bids or caps are invalid; see `advertising.py`.
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: See `Predictor.profiles`.
    """
    ids = [(public_id(one.item), 0 if one.category is None else public_id(one.category)) for one in items]
    bids = bids_of([one.bid for one in items])
    with predictor.reading() as reader:
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        (about,) = predictor.answered(prepared, outputs)
        over = _over(predictor, prepared, items, ids, impressions)
        kept = [place for place in range(len(items)) if place not in over]
        pairs, found = UserPairs(predictor, prepared, outputs), [np.empty(0, np.float32)]
        for piece in in_batches([ids[place] for place in kept]):
            # Other requests may have loaded a newer version in between.
            predictor.take_up(reader)
            found.append(pairs.logits(piece))
            yield
        logits = np.concatenate(found)
    names = {one: predictor.catalogue.name_of(one).name for one in {*pairs.categories} if one}
    shown = [
        RankedItem(item=items[kept[place]].item, category=names.get(category), probability=probability(logit))
        for place, (category, logit) in enumerate(zip(pairs.categories, logits.tolist(), strict=True))
    ]
    scores: NDArray[np.floating[Any]] = logits
    if bids is not None:
        scores = bids[kept] * [one["probability"] for one in shown]
        for one, bid, value in zip(shown, bids[kept].tolist(), scores.tolist(), strict=True):
            one["bid"], one["expected_value"] = bid, value
    ranked = about_user(about, [shown[place] for place in np.argsort(-scores, kind="stable").tolist()])
    if all(one.cap is None for one in items):
        return ranked
    left_out = [LeftOut(item=items[place].item, reason="cap", seen=seen) for place, seen in over.items()]
    return CappedItems(
        ranked.user_id, ranked.known, ranked.cold_start, ranked.version, ranked.at, ranked.at_ms, ranked.clock,
        ranked.items, left_out,
    )  # fmt: skip


def _over(
    predictor: Predictor,
    prepared: Prepared,
    items: Sequence[NamedItem],
    ids: Sequence[tuple[int, int]],
    impressions: Sequence[int],
) -> dict[int, int]:
    """Returns `over_caps` of the items; reads the history only if some items have caps."""
    caps = [one.cap for one in items]
    if all(one is None for one in caps):
        return {}
    check_caps(caps, prepared.version.features.spec)
    asked = prepared.asked[0]
    events = predictor.events_by(asked, prepared.seen[1])
    return over_caps([item for item, _ in ids], caps, events, impressions, asked.at_ms)


def about_user(about: Answer, items: list[RankedItem]) -> RankedItems:
    """Builds the answer about a user's items."""
    return RankedItems(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock, items
    )
