"""Items for one user: ranks those that a caller names, recommends some, and finds those nearest to the user.

All are scored with one version. The program scores pairs: each row is one user and one item (`UserPairs`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.item_index import ClickedItems, ItemSources, NearItems
from deploy.serving.answers.predictor import (
    KINDS,
    Asked,
    Inputs,
    Predictor,
    Prepared,
    add_items,
    add_own_rows,
    cross_logits,
    item_rows,
)
from deploy.serving.answers.program import BATCHES, PAIRS, batch_of
from deploy.serving.answers.query import Cap, Exclusion, NamedItem, Query, WantedItems, about_same, probability
from deploy.serving.answers.version import ShownName, VersionRows
from springtide_client.answers import (
    LeftOutItem,
    RankedItem,
    Ranking,
    Reason,
    Recommendations,
    RecommendedItem,
    SimilarItem,
    SimilarItems,
)
from state.errors import BadRequest
from state.events.identity import public_id
from state.features.arrays import Vector
from state.features.spec import LABELLED, POSITIVE, Events, FeatureSpec
from state.ranking import item_scores
from state.ranking.item_lists import CLICKED, EVERYTHING, FOLLOWED, LIVES, ItemLists, count_visits
from state.ranking.item_scores import (
    ALL,
    COLUMNS,
    INTERESTS,
    INTERESTS_AT,
    NEWEST_AT,
    SECOND_AT,
    SHARES,
    SOURCES,
    UNSEEN,
    Reads,
    Workspace,
    clear,
    gather,
    score,
)
from state.rows.reader import RowReader

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]

_REASONS: dict[str, Reason] = {
    "everything": "popular",
    "category": "category",
    "interests": "category",
    "context": "popular",
    "newest": "next",
    "second": "next",
    "own": "again",
}


def scored(
    prepared: Prepared, outputs: Mapping[str, F32], clicks: Events, category: int | None, kind: int, work: Workspace
) -> NDArray[np.intp]:
    """Scores the candidates of the only query of `prepared`, whose version must have item weights.

    Returns their indices in `work`, best first. `clicks` are the user's, newest first. `category` is the only one to take
    items from; None for all. `kind` is `ALL`, or `UNSEEN` if only items that are new to the user are wanted.
    """
    version, question = prepared.version, prepared.asked[0]
    assert version.item_weights is not None
    # 1. The user's own items: all in the history. A trainer's list holds fewer.
    visited = ItemLists.empty(2, max(2, len(clicks)))
    ordered = clicks[::-1]
    count_visits(np.ascontiguousarray(ordered["item"]), np.ascontiguousarray(ordered["at_ms"]) // 1000, 1, visited)
    # 2. The lists of the version.
    keys, reads = _reads(prepared, outputs, question, category)
    clicked = prepared.rows.item_lists(CLICKED, keys)
    followed = prepared.rows.item_lists(FOLLOWED, [0, *visited.ids[1, :2].tolist()])
    # 3. Scores.
    phi = np.zeros(COLUMNS, np.float32)
    after = np.array([1, 2], np.int32) * (visited.ids[1, :2] != 0).astype(np.int32)
    count = gather(
        clicked, followed, visited, reads, after, int(visited.ids[1, 0] != 0), question.at_ms // 1000, phi, work
    )
    score(version.item_weights[kind], phi, count, work)
    clear(count, work)
    order = np.argsort(-work.scores[:count], kind="stable")
    if category is not None:
        category_items = clicked.ids[1 + len(EVERYTHING)]
        order = order[np.isin(work.items[order], category_items)]
    return order


def _reads(
    prepared: Prepared, outputs: Mapping[str, F32], question: Asked, category: int | None
) -> tuple[list[int], Reads]:
    """The keys of the lists of `clicked` that are read, and how; list 0 is that of no key."""
    if category is None:
        recent = prepared.vectors.recent_categories[0]
        parts = [outputs[f"{kind}_logits"][0] for kind in KINDS if f"{kind}_logits" in outputs]
        ids = [recent, prepared.version.popular, prepared.successors[0]][: len(parts)]
        likely, shares = item_scores.likeliest(np.concatenate(parts)[None], np.concatenate(ids)[None])
        newest, interests, weights = int(recent[0]), likely[0].tolist(), shares[0]
    else:
        newest, interests = category, [category, *[0] * (INTERESTS - 1)]
        weights = np.eye(1, INTERESTS, dtype=np.float32)[0]
    keys = [0, *EVERYTHING.tolist(), newest, *interests, *question.context]
    sources = item_scores.sources_of(len(question.context))
    every = np.ones(len(sources), np.float32)
    every[sources == INTERESTS_AT] = weights
    rows = np.arange(1, len(keys), dtype=np.int32) * (np.array(keys[1:], np.uint64) != 0)
    return keys, Reads(rows.astype(np.int32), sources, every)


def reasons_of(order: NDArray[np.intp], work: Workspace) -> list[Reason]:
    """Returns the source with the largest share of each candidate, given by its index in `work`."""
    shares = work.features[:SHARES, order].T.reshape(len(order), len(SOURCES), LIVES).max(2)
    # That an item followed the user's item is a stronger reason than its popularity.
    shares[:, [NEWEST_AT, SECOND_AT]] *= (work.own[order] == 0)[:, None]
    best = np.where(work.own[order] > 0, len(SOURCES) - 1, shares[:, :-1].argmax(1))
    return [_REASONS[SOURCES[source]] for source in best.tolist()]


MOST_CANDIDATES = 2 * PAIRS
FEW = 4
MOST_OF_CATEGORY = 128
SEEN_CANDIDATES = 64
RETURN, VISITS = 6.0, 2.0
"""The logit bonus for an item that the user clicked before: `RETURN`, plus `VISITS` times the logarithm of its visits.

Engagement is trained against items of other users, so it hardly predicts repeated clicks. On Taobao's clicks, a quarter
repeat an item. There, the top 20 by engagement alone contain the next item 4 times in 100, with the bonus 16 times.
The user's own 20 latest items contain it 15 times (`tests/bench/recommend.py`)."""
SIMILAR_CANDIDATES = 96
PROPOSED = 4
"""The factor by which candidates exceed the requested similar items: the index may lag, and lacks attributes."""
ITEM_INPUTS = ("item_row", "category_row", "cross")
"""The program's inputs that depend on the item, in addition to the item's rows of the ranker's custom tables."""


class UserPairs:
    """Scores items for one user; valid as long as the prepared query.

    The user's inputs are written once for all rows of a batch. If the program has the output `item_query` (see
    `trainer/model/ranker.py`), it runs once per category, without an item. Each item then adds one dot product and its
    crosses.

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
            return self._by_query(items, self.query)
        questions = self._predictor.items_of(prepared.asked[0], items)
        self.categories += [question.category for question in questions]
        return self._engagement(questions, batch_of(len(items)))

    def _by_query(self, items: Sequence[tuple[int, int]], query: F32) -> F32:
        """Computes logits as the sum of the category's logit, the item's row times the query, and the crosses."""
        prepared, predictor, size = self._prepared, self._predictor, BATCHES[-1]
        version, rows = prepared.version, prepared.rows
        categories = predictor.catalogue.categories_of(items)
        self.categories += categories
        new = [(0, category) for category in dict.fromkeys(categories) if category not in self._of_category]
        for first in range(0, len(new), size):
            of_none = predictor.items_of(prepared.asked[0], new[first : first + size])
            logits = self._engagement([question._replace(query=prepared.asked[0].query) for question in of_none], size)
            self._of_category |= zip([question.category for question in of_none], logits.tolist(), strict=True)
        logits = np.array([self._of_category[category] for category in categories], np.float32)
        if not predictor.item_attributes and not version.cross_shares.size:
            return logits + rows.items([item for item, _ in items]) @ query
        questions = predictor.items_of(
            prepared.asked[0], [(item, category) for (item, _), category in zip(items, categories, strict=True)]
        )
        logits += item_rows(rows, questions) @ query
        if version.cross_shares.size:
            vectors = self._vectors(len(questions))
            logits += cross_logits(rows, questions, vectors.features, vectors.sequence_items)
        return logits

    def _engagement(self, questions: Sequence[Asked], size: int) -> F32:
        """Runs the program on each pair, in one batch of `size` rows."""
        version, rows, count = self._prepared.version, self._prepared.rows, len(questions)
        vectors, inputs = self._vectors(count), self._batch(size)
        for name in ITEM_INPUTS:
            if name in inputs:
                inputs[name][:] = 0.0
        add_items(inputs, version, rows, questions, vectors)
        if version.own:
            add_own_rows(inputs, version, rows, questions, vectors, np.repeat(self._prepared.successors, count, 0))
        return version.predict(inputs)["engagement_logit"][:count].reshape(count).copy()

    def _vectors(self, count: int) -> Vector:
        """Repeats the user's windows `count` times."""
        columns: list[Any] = [np.broadcast_to(column, (count, *column.shape[1:])) for column in self._prepared.vectors]
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


def rank(
    predictor: Predictor, query: Query, items: Sequence[NamedItem], impressions: Sequence[int] = ()
) -> Generator[None, None, Ranking]:
    """Ranks 1 to `MOST_ITEMS` items; yields after each batch, so that other requests are answered in between.

    With bids, items are ordered by expected value: probability × bid. `impressions` are the numbers of the actions that
    caps count; if empty, all count. Raises as `bids_of`, `check_caps` and `Predictor.profiles` do.
    """
    ids = [(public_id(item.item), 0 if item.category is None else public_id(item.category)) for item in items]
    bids = bids_of([item.bid for item in items])
    caps = [item.cap for item in items]
    over: dict[int, int] = {}
    with predictor.reading() as reader:
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.predict(prepared.inputs)
        (answer,) = predictor.answered(prepared, outputs)
        if any(caps):
            check_caps(caps, prepared.version.features.spec)
            question = prepared.asked[0]
            events = predictor.events_by(question, prepared.mask)
            over = over_caps([item for item, _ in ids], caps, events, impressions, question.at_ms)
        kept_items = [index for index in range(len(items)) if index not in over]
        pairs, parts = UserPairs(predictor, prepared, outputs), [np.empty(0, np.float32)]
        for piece in in_batches([ids[index] for index in kept_items]):
            # Other requests may have loaded a newer version in between.
            predictor.load_version(reader)
            parts.append(pairs.logits(piece))
            yield
        logits = np.concatenate(parts)
    names = {category: predictor.catalogue.name_of(category).name for category in {*pairs.categories} if category}
    probabilities = [probability(logit) for logit in logits.tolist()]
    scores: NDArray[np.floating[Any]] = logits if bids is None else bids[kept_items] * probabilities
    best_first = np.argsort(-scores, kind="stable").tolist()
    return about_same(
        Ranking,
        answer,
        items=[
            RankedItem(
                item=items[kept_items[place]].item,
                category=names.get(pairs.categories[place]),
                probability=probabilities[place],
                bid=items[kept_items[place]].bid,
                expected_value=None if bids is None else float(scores[place]),
            )
            for place in best_first
        ],
        left_out=[LeftOutItem(items[index].item, "cap", seen) for index, seen in over.items()],
    )


def bids_of(bids: Sequence[float | None]) -> NDArray[np.float64] | None:
    """Returns the bids of n items, `[n]` float64; None if no item has one.

    >>> bids_of([1.5, 0.0]).tolist(), bids_of([None, None])
    ([1.5, 0.0], None)

    Raises:
        BadRequest: Some items have a bid and others do not, or a bid is negative or not finite.
    """
    if all(bid is None for bid in bids):
        return None
    for index, bid in enumerate(bids):
        if bid is None:
            raise BadRequest(
                f"item {index} has no bid, others have", "give each item a bid, or none", f"/items/{index}"
            )
        if not (math.isfinite(bid) and bid >= 0):
            raise BadRequest(
                f"item {index} has a bid of {bid}", "give a finite number, 0 or more", f"/items/{index}/bid"
            )
    return np.array(bids, np.float64)


def check_caps(caps: Sequence[Cap | None], spec: FeatureSpec) -> None:
    """Refuses caps that cannot be checked against a history.

    >>> check_caps([Cap(3, 86400.0), None], FeatureSpec())

    Args:
        caps: The caps of n items.
        spec: The served version's feature spec, which defines how many events a history holds, and for how long.

    Raises:
        BadRequest: A count is less than 1 or more than a history holds. Or a period is not above 0, or exceeds the
            longest window.
    """
    longest_s = spec.windows_s[-1]
    for index, cap in enumerate(caps):
        if cap is None:
            continue
        if not 1 <= cap.count <= spec.history:
            do = f"give 1 to {spec.history}, the events that a history holds (features.history)"
            raise BadRequest(f"item {index} has a cap of {cap.count} times", do, f"/items/{index}/cap/count")
        if not 0 < cap.within_s <= longest_s:
            do = f"give seconds above 0, up to the longest window's {longest_s} (features.windows_s)"
            raise BadRequest(f"item {index} has a cap within {cap.within_s} s", do, f"/items/{index}/cap/within_s")


def over_caps(
    items: Sequence[int], caps: Sequence[Cap | None], events: Events, impressions: Sequence[int], at_ms: int
) -> dict[int, int]:
    """Returns the items that have reached their caps: index to the number of times seen within the cap's period.

    Events of the actions `impressions` count; if empty, all. They are at most as late as `at_ms`, the time of the query,
    and less than `within_s` older.
    """
    shown = events[np.isin(events["action"], impressions)] if len(impressions) else events
    times: dict[int, list[int]] = {}
    for item, event_ms in zip(shown["item"].tolist(), shown["at_ms"].tolist(), strict=True):
        times.setdefault(item, []).append(event_ms)
    over = {}
    for index, (item, cap) in enumerate(zip(items, caps, strict=True)):
        if cap is not None:
            after_ms = at_ms - round(cap.within_s * 1000)
            seen = sum(after_ms < event_ms <= at_ms for event_ms in times.get(item, ()))
            if seen >= cap.count:
                over[index] = seen
    return over


class Proposed(NamedTuple):
    """The reason why an item is a candidate, and its category; 0 for the category it was last seen in."""

    reason: Reason
    category: int


def recommend(
    predictor: Predictor, sources: ItemSources, query: Query, wanted: WantedItems, impressions: Sequence[int] = ()
) -> Generator[None, None, Recommendations]:
    """Recommends items and returns the answer; yields after each batch, so that other requests are answered in between.

    1. Rank the candidate categories with the version. A version with weights of the item score answers from its lists.
    2. Without them, or for a category with too few items, candidates are the most clicked items of each category, items
       that the user clicked, and the items nearest to the user. A user without clicks gets the most clicked items.
    3. Score the engagement with each item; add a bonus for items that the user clicked before.

    `query` has no item, and asks for all interests. `impressions` are the numbers of the actions that are no clicks
    without a positive label. Raises as `Predictor.profiles` does.
    """
    with predictor.reading() as reader:
        # 1.
        prepared, outputs, clicks, excluded, chosen = _best(predictor, sources, reader, query, wanted, impressions)
        question = prepared.asked[0]
        if chosen is not None:
            yield
            predictor.load_version(reader)
            if len(chosen) == wanted.most or wanted.category is None:
                without_interests = prepared._replace(asked=[question._replace(query=question.query._replace(top=0))])
                (answer,) = predictor.answered(without_interests, outputs)
                items = _recommended(predictor, UserPairs(predictor, prepared, outputs), chosen)
                return about_same(Recommendations, answer, items=items)
        (answer,) = predictor.answered(prepared, outputs)
        visits = visits_of(clicks["item"])
        # 2.
        pairs, parts = UserPairs(predictor, prepared, outputs), [np.empty(0, np.float32)]
        near: Sequence[int] = ()
        if wanted.category is None and pairs.query is not None:
            near = near_to(sources.near, pairs.query, prepared.rows, SIMILAR_CANDIDATES)
        if wanted.category is None:
            shares = {int(interest.id, 16): interest.probability for interest in answer.interests}
        else:
            shares = {public_id(wanted.category): 1.0}
        reasons: dict[int, Reason] = dict.fromkeys(prepared.successors[0].tolist(), "next")
        reasons |= dict.fromkeys(question.recent_categories, "category")
        proposals = candidates(sources.clicked, shares, reasons, wanted, visits, near, {*excluded.tolist()})
        ids = [(item, proposed.category) for item, proposed in proposals.items()]
        # 3.
        for piece in in_batches(ids):
            # Other requests may have loaded a newer version in between.
            predictor.load_version(reader)
            parts.append(pairs.logits(piece))
            yield
        logits = np.concatenate(parts)
    items = []
    # Engagement does not know popularity, which is the best order for a user without clicks.
    scores = logits + returning([visits.get(item, 0.0) for item in proposals]) if visits else -np.arange(len(logits))
    for row in np.argsort(-scores, kind="stable")[: wanted.most].tolist():
        name = predictor.catalogue.item_name(ids[row][0])
        items.append(
            RecommendedItem(
                item=name.name,
                id=name.hex,
                category=predictor.catalogue.name_of(pairs.categories[row]).name,
                probability=probability(float(logits[row])),
                reason=proposals[ids[row][0]].reason,
            )
        )
    return about_same(Recommendations, answer, items=items)


def ranked(
    predictor: Predictor, sources: ItemSources, query: Query, wanted: WantedItems, impressions: Sequence[int] = ()
) -> list[tuple[int, Reason]] | None:
    """Returns the ids and reasons of the items that `recommend` answers, in the same order, without their probabilities.

    The program runs once, and not again for each category. `query` and `impressions` are as for `recommend`, and
    `wanted` has no category. Returns None if the version has no weights of the item score.
    """
    with predictor.reading() as reader:
        chosen = _best(predictor, sources, reader, query, wanted, impressions).chosen
    return None if chosen is None else [(item.item, item.reason) for item in chosen]


def clicks_in(events: Events, impressions: Sequence[int]) -> Events:
    """Returns the events that the trainer counts as clicks: not labelled as something else, and no impressions."""
    flags = events["flags"]
    clicks: Events = events[
        (flags & POSITIVE != 0) | ((flags & LABELLED == 0) & ~np.isin(events["action"], impressions))
    ]
    return clicks


def excluded_items(events: Events, clicks: Events, exclude: Collection[Exclusion]) -> U64:
    """Returns the items to leave out of a list, `[n]` uint64. `clicks` are the events that count as clicks.

    An item of a click and of an impression counts as clicked, not as shown.
    """
    items = [np.empty(0, np.uint64)]
    if "clicked" in exclude:
        items.append(clicks["item"])
    if "shown" in exclude:
        items.append(events["item"][~np.isin(events["item"], clicks["item"])])
    return np.concatenate(items)


class _Chosen(NamedTuple):
    """An item of an answer."""

    item: int
    category: int
    name: ShownName
    reason: Reason


class _Best(NamedTuple):
    """The best items for a user, and what they were chosen from.

    Attributes:
        prepared: The user's inputs.
        outputs: Of the program.
        clicks: The user's clicks.
        excluded: `[n]` uint64, the items that may not be chosen.
        chosen: Best first; None by a version without weights of the item score.
    """

    prepared: Prepared
    outputs: Mapping[str, F32]
    clicks: Events
    excluded: U64
    chosen: list[_Chosen] | None


def _best(
    predictor: Predictor,
    sources: ItemSources,
    reader: RowReader,
    query: Query,
    wanted: WantedItems,
    impressions: Sequence[int],
) -> _Best:
    prepared, work, chosen = predictor.prepare([query], reader), sources.work, None
    outputs = prepared.version.predict(prepared.inputs)
    events = predictor.events_by(prepared.asked[0], prepared.mask)
    clicks = clicks_in(events, impressions)
    excluded = excluded_items(events, clicks, wanted.exclude)
    if prepared.version.item_weights is not None:
        category = None if wanted.category is None else public_id(wanted.category)
        order = scored(prepared, outputs, clicks, category, UNSEEN if "clicked" in wanted.exclude else ALL, work)
        if len(excluded):
            order = order[~np.isin(work.items[order], excluded)]
        chosen = _chosen(predictor, order, work, wanted)
    return _Best(prepared, outputs, clicks, excluded, chosen)


def _chosen(predictor: Predictor, order: NDArray[np.intp], work: Workspace, wanted: WantedItems) -> list[_Chosen]:
    """Chooses the best items whose category is known on this host, as many as are wanted in all and of each category.

    `order` has the indices of candidates in `work`, best first.
    """
    chosen, of_category = list[_Chosen](), Counter[int]()
    limit = wanted.most if wanted.category is not None else wanted.per_category or wanted.most
    for first in range(0, len(order), wanted.most):
        best = order[first : first + wanted.most]
        items = work.items[best].tolist()
        named, reasons = predictor.catalogue.named_items(items), reasons_of(best, work)
        for item, (category, name), reason in zip(items, named, reasons, strict=True):
            if category and len(chosen) < wanted.most and of_category[category] < limit:
                chosen.append(_Chosen(item, category, name, reason))
                of_category[category] += 1
        if len(chosen) == wanted.most:
            break
    return chosen


def _recommended(predictor: Predictor, pairs: UserPairs, chosen: Sequence[_Chosen]) -> list[RecommendedItem]:
    """The chosen items as an answer shows them, in their order."""
    pieces = in_batches([(item.item, item.category) for item in chosen])
    logits = np.concatenate([np.empty(0, np.float32), *map(pairs.logits, pieces)])
    return [
        RecommendedItem(
            item=item.name.name,
            id=item.name.hex,
            category=predictor.catalogue.name_of(item.category).name,
            probability=probability(logit),
            reason=item.reason,
        )
        for item, logit in zip(chosen, logits.tolist(), strict=True)
    ]


def candidates(
    clicked: ClickedItems,
    shares: Mapping[int, float],
    reasons: Mapping[int, Reason],
    wanted: WantedItems,
    visits: Mapping[int, float],
    near: Sequence[int],
    excluded: Collection[int],
) -> dict[int, Proposed]:
    """Generates at most `MOST_CANDIDATES` items that are not `excluded`, each with the reason.

    `shares` has the probability of each category to take candidates from, and `reasons` its reason, by default
    `popular`. `visits` is from `visits_of`, and `near` are the items nearest to the user.
    """
    if not visits and wanted.category is None:
        best = (item for item in clicked.best(None, wanted.most + len(excluded)) if item not in excluded)
        return dict.fromkeys(islice(best, wanted.most), Proposed("popular", 0))
    proposals = dict[int, Proposed]()
    if wanted.category is None:
        own = (item for item in visits if item not in excluded)
        proposals = dict.fromkeys(islice(own, SEEN_CANDIDATES), Proposed("again", 0))
    for category, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        most = min(MOST_OF_CATEGORY, FEW + round(share * MOST_CANDIDATES)) if len(shares) > 1 else MOST_CANDIDATES
        proposed = Proposed(reasons.get(category, "popular"), category)
        for item in clicked.best(category, most):
            proposals.setdefault(item, proposed)
    proposals = dict(list(proposals.items())[: MOST_CANDIDATES - len(near)])
    for item in near:
        proposals.setdefault(item, Proposed("similar", 0))
    return {
        item: proposed._replace(reason="again") if item in visits else proposed
        for item, proposed in proposals.items()
        if item not in excluded
    }


def visits_of(items: NDArray[np.uint64]) -> dict[int, float]:
    """Computes how much a user visited each item; the most visited come first.

    >>> visits_of(np.array([7, 9, 0, 7], np.uint64))
    {7: 1.5, 9: 0.7071067811865475}

    Args:
        items: `[n]` uint64, the items of the user's events, newest first; 0 for an event without an item.

    Returns:
        By item, the sum over its events of 1 / sqrt(k), where k is 1 for the user's newest event, 2 for the next, ...
    """
    distinct, first, of_event = np.unique(items, return_index=True, return_inverse=True)
    sums = np.bincount(of_event, 1.0 / np.sqrt(np.arange(1, len(items) + 1)), len(distinct))
    order = np.lexsort((first, -sums))
    return {item: much for item, much in zip(distinct[order].tolist(), sums[order].tolist(), strict=True) if item}


def returning(visits: Sequence[float]) -> F32:
    """Returns the logit bonus of items that the user clicked before, `[n]` float32; 0 for items without visits.

    >>> returning([0.0, 1.0]).tolist()
    [0.0, 6.0]
    """
    visit_counts = np.array(visits, np.float32)
    return np.where(visit_counts > 0.0, RETURN + VISITS * np.log(np.maximum(visit_counts, 1e-9)), 0.0).astype(
        np.float32
    )


def similar(
    predictor: Predictor, near: NearItems, query: Query, wanted: WantedItems, impressions: Sequence[int] = ()
) -> SimilarItems:
    """Finds the items of any category with the largest dot product of the user's item query vector and the item's row.

    `impressions` are as for `recommend`. Raises as `Predictor.profiles` does, and BadRequest if the version's model has no output `item_query`.
    """
    with predictor.reading() as reader:
        prepared = predictor.prepare([query], reader)
        outputs = prepared.version.predict(prepared.inputs)
        (answer,) = predictor.answered(prepared, outputs)
        question = prepared.asked[0]
        if "item_query" not in outputs:
            raise BadRequest(
                f"the model of version {answer.version.number} has no query of items",
                "ask /v1/recommendations, or give the ranker an item_query",
                http_status=501,
            )
        user = outputs["item_query"][0].copy()
        excluded = set[int]()
        if wanted.exclude:
            events = predictor.events_by(question, prepared.mask)
            excluded.update(excluded_items(events, clicks_in(events, impressions), wanted.exclude).tolist())
        neighbours = near_to(near, user, prepared.rows, PROPOSED * wanted.most + len(excluded))
        questions = predictor.items_of(question, [(item, 0) for item in neighbours if item not in excluded])
        products = item_rows(prepared.rows, questions) @ user
    items = []
    for row in np.argsort(-products, kind="stable")[: wanted.most].tolist():
        name, category = predictor.catalogue.item_name(questions[row].item), questions[row].category
        items.append(
            SimilarItem(
                item=name.name,
                id=name.hex,
                category=predictor.catalogue.name_of(category).name if category else None,
                similarity=float(products[row]),
            )
        )
    return about_same(SimilarItems, answer, items=items)


def near_to(near: NearItems, user: F32, rows: VersionRows, most: int) -> Sequence[int]:
    """Returns the items nearest to a user, `[dim]` float32, that have a row in the version, approximately in order."""
    return [item for item in near.nearest(user, most) if rows.has_item(item)]
