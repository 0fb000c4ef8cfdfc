"""Recommends items to one user: generates hundreds of candidates, ranks them, and reserves a share for new items.

1. Rank the candidate categories with the version (the user's, popular ones and successors), and read the user's clicks.
2. Generate candidates: the most clicked items of each category, more of them for a more probable category; new items;
   items that the user clicked; items whose rows are nearest to the user's item query vector.
3. Score the engagement with each item, with the same version; add a bonus for items that the user clicked before.
4. Choose the best items, a share of which is new.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import About, Answer, Query
from deploy.serving.answering import probability
from deploy.serving.item_feed import NEW_MS
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.program import PAIRS
from deploy.serving.recommending.pairs import UserPairs, in_batches
from deploy.serving.recommending.shelves import NewItem, Shelves
from deploy.serving.recommending.similar import near_to
from deploy.serving.recommending.sources import ItemSources
from state.events.identity import public_id
from state.features.mask import Mask

MOST_CANDIDATES = 2 * PAIRS
FRESH_SHARE = 0.1
"""The share of new items in an answer, if there are enough new ones."""
FRESH_CANDIDATES = 64
FEW = 4
MOST_OF_CATEGORY = 128
SEEN_CANDIDATES = 64
RETURN, VISITS = 6.0, 2.0
"""The logit bonus for an item that the user clicked before: `RETURN`, plus `VISITS` times the logarithm of its visits.

Engagement is trained against items of other users, so it hardly predicts repeated clicks. On Taobao's clicks, a quarter
repeat an item. There, the top 20 by engagement alone contain the next item 4 times in 100, with the bonus 16 times.
The user's own 20 latest items contain it 15 times (`tests/bench/recommend.py`)."""
SIMILAR_CANDIDATES = 96

Reason = Literal["again", "category", "next", "popular", "similar", "fresh"]


class WantedItems(NamedTuple):
    """The parameters of a recommendation.

    Attributes:
        most: The maximum number of items.
        category: Recommend only items of the category with this raw id.
        exclude_seen: Whether to leave out items that the user clicked.
    """

    most: int
    category: str | None = None
    exclude_seen: bool = False


class Recommended(TypedDict):
    """A recommended item: its name (its id if it has no name), id, category name, probability and reason."""

    item: str
    id: str
    category: str
    probability: float
    reason: Reason


@dataclass(slots=True)
class Recommendations(About):
    """The items of one user, best first; items that the user clicked before rank above their probability."""

    items: list[Recommended]


class Proposed(NamedTuple):
    """The reason why an item is a candidate, and its category; 0 for the category it was last seen in."""

    reason: Reason
    category: int


def recommend(
    predictor: Predictor, sources: ItemSources, query: Query, wanted: WantedItems
) -> Generator[None, None, Recommendations]:
    """Recommends items and returns the answer; yields after each batch, so that other requests are answered in between.

    Args:
        predictor: The predictor.
        sources: The sources of candidate items.
        query: The query about the user, without an item, and with all interests.
        wanted: The parameters of the recommendation.

    Raises:
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: See `Predictor.profiles`.
    """
    with predictor.reading() as reader:
        # 1.
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        (about,) = predictor.answered(prepared, outputs)
        one, mask = prepared.asked[0], prepared.seen[1]
        visits = visits_of(predictor.events_by(one, mask)["item"])
        # 2.
        pairs, parts = UserPairs(predictor, prepared, outputs), [np.empty(0, np.float32)]
        near: Sequence[int] = ()
        if wanted.category is None and pairs.query is not None:
            near = near_to(sources.near, pairs.query, prepared.rows, SIMILAR_CANDIDATES)
        shelves = sources.shelves
        shares = _shares(about, None if wanted.category is None else public_id(wanted.category))
        new = _new(shelves, shares, one.at_ms, mask)
        found = candidates(shelves, shares, _kinds(prepared), new, wanted, visits, near)
        ids = [(item, proposed.category) for item, proposed in found.items()]
        # 3.
        for piece in in_batches(ids):
            # Other requests may have loaded a newer version in between.
            predictor.take_up(reader)
            parts.append(pairs.logits(piece))
            yield
        logits = np.concatenate(parts)
    # 4.
    fresh = np.array([proposed.reason == "fresh" for proposed in found.values()], np.bool_)
    items = []
    scores = logits + returning([visits.get(item, 0.0) for item in found])
    for place in best(scores, fresh, wanted.most).tolist():
        name = predictor.catalogue.item_name(ids[place][0])
        items.append(
            Recommended(
                item=name.name,
                id=name.hex,
                category=predictor.catalogue.name_of(pairs.categories[place]).name,
                probability=probability(float(logits[place])),
                reason=found[ids[place][0]].reason,
            )
        )
    return Recommendations(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock, items
    )


def _shares(about: Answer, only: int | None) -> dict[int, float]:
    """Returns the categories to take candidates from, with their probabilities; only the requested one if given."""
    if only is not None:
        return {only: 1.0}
    return {int(one["id"], 16): one["probability"] for one in about.interests}


def _kinds(prepared: Prepared) -> dict[int, Reason]:
    """Returns the reason why each category is a candidate."""
    kinds: dict[int, Reason] = dict.fromkeys(prepared.successors[0].tolist(), "next")
    return kinds | dict.fromkeys(prepared.asked[0].recent_categories, "category")


def _new(shelves: Shelves, shares: Mapping[int, float], at_ms: int, mask: Mask) -> list[NewItem]:
    """Returns new items of the likeliest categories and of all; excludes items first clicked in a masked period."""
    likely = sorted(shares, key=lambda category: -shares[category])[:8]
    found = {one.item: one for category in likely for one in shelves.newest(FEW, category)}
    if len(shares) > 1:
        found = {one.item: one for one in shelves.newest(FRESH_CANDIDATES)} | found
    return [
        one
        for one in found.values()
        if one.at_ms > at_ms - NEW_MS and not any(begin <= one.at_ms < end for begin, end in mask.times)
    ]


def candidates(
    shelves: Shelves,
    shares: Mapping[int, float],
    kinds: Mapping[int, Reason],
    new: Sequence[NewItem],
    wanted: WantedItems,
    visits: Mapping[int, float],
    near: Sequence[int],
) -> dict[int, Proposed]:
    """Generates at most `MOST_CANDIDATES` items, each with the reason.

    Args:
        shelves: The candidate index: items by category.
        shares: The probability of each category to take candidates from.
        kinds: The reason for each category; `popular` if missing.
        new: The new items.
        wanted: The parameters of the recommendation.
        visits: The items that the user clicked, from `visits_of`.
        near: The items nearest to the user.
    """
    found = {one.item: Proposed("fresh", one.category) for one in new}
    if wanted.category is None and not wanted.exclude_seen:
        found = dict.fromkeys(islice(visits, SEEN_CANDIDATES), Proposed("again", 0)) | found
    for category, share in sorted(shares.items(), key=lambda one: -one[1]):
        most = min(MOST_OF_CATEGORY, FEW + round(share * MOST_CANDIDATES)) if len(shares) > 1 else MOST_CANDIDATES
        proposed = Proposed(kinds.get(category, "popular"), category)
        for item in shelves.best(category, most):
            found.setdefault(item, proposed)
    found = dict(list(found.items())[: MOST_CANDIDATES - len(near)])
    for item in near:
        found.setdefault(item, Proposed("similar", 0))
    if wanted.exclude_seen:
        return {item: proposed for item, proposed in found.items() if item not in visits}
    again = ((item, found[item]) for item in visits if item in found)
    return found | {item: proposed._replace(reason="again") for item, proposed in again}


def visits_of(items: NDArray[np.uint64]) -> dict[int, float]:
    """Computes how much a user visited each item; the most visited come first.

    >>> visits_of(np.array([7, 9, 0, 7], np.uint64))
    {7: 1.5, 9: 0.7071067811865475}

    Args:
        items: `[n]` uint64, the items of the user's events, newest first; 0 for an event without an item.

    Returns:
        By item, the sum over its events of 1 / sqrt(k), where k is 1 for the user's newest event, 2 for the next, ...
    """
    found, first, place = np.unique(items, return_index=True, return_inverse=True)
    sums = np.bincount(place, 1.0 / np.sqrt(np.arange(1, len(items) + 1)), len(found))
    order = np.lexsort((first, -sums))
    return {item: much for item, much in zip(found[order].tolist(), sums[order].tolist(), strict=True) if item}


def returning(visits: Sequence[float]) -> NDArray[np.float32]:
    """Returns the logit bonus of items that the user clicked before, `[n]` float32; 0 for items without visits.

    >>> returning([0.0, 1.0]).tolist()
    [0.0, 6.0]
    """
    given = np.array(visits, np.float32)
    return np.where(given > 0.0, RETURN + VISITS * np.log(np.maximum(given, 1e-9)), 0.0).astype(np.float32)


def best(scores: NDArray[np.float32], fresh: NDArray[np.bool_], count: int) -> NDArray[np.intp]:
    """Returns the indices of the best items, best first; reserves `FRESH_SHARE` for fresh items if there are enough.

    >>> best(np.array([3.0, 2.0, 1.0, 0.0]), np.array([False, False, False, True]), 2).tolist()
    [0, 3]
    """
    order = np.argsort(-scores, kind="stable")
    chosen = order[:count]
    lacking = math.ceil(FRESH_SHARE * len(chosen)) - int(fresh[chosen].sum())
    if lacking > 0:
        more = order[count:][fresh[order[count:]]][:lacking]
        stale = chosen[~fresh[chosen]]
        kept = np.concatenate((chosen[fresh[chosen]], stale[: len(stale) - len(more)], more))
        chosen = kept[np.argsort(-scores[kept], kind="stable")]
    return chosen
