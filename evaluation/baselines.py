"""Simple baselines of `springtide evaluate`. Each predicts a click from the clicks before it, then learns the click.

Stored counts are not decayed. Instead, a click weighs 2 ** ((time - begin) / half-life), which gives the same order of
items. All weights are divided when they become too large.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled
from trainer.measures.progressive import NONE, CategoryPrediction

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

HOUR_MS = 3_600_000
HALF_LIVES_MS = {"30m": HOUR_MS // 2, "6h": 6 * HOUR_MS, "1d": 24 * HOUR_MS}
LISTED = 1024
"""Items in the ordered list of a popularity baseline; an eighth of it for a category."""
LARGEST_EXPONENT = 256.0
REMEMBERED = 256
COVISITED, NEIGHBOURS = 5, 128
"""Number of the user's earlier items that count as co-visits of a click, and of co-visited items kept per item."""
ASKED_ITEMS, FALLING = 10, 0.8
"""Number of a user's latest items whose neighbours are proposed, and the weight of each relative to the newer one."""


@dataclass(slots=True)
class UserPast:
    """The earlier events of one user, `items` oldest first; `category` is that of the last click, 0 for none."""

    items: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    seen: set[int] = field(default_factory=set)
    category: int = 0
    clicks: int = 0

    def latest(self, most: int) -> list[int]:
        """The latest distinct items, newest first."""
        return list(islice(dict.fromkeys(reversed(self.items)), most))


class ItemClick(NamedTuple):
    """One click."""

    item: int
    category: int
    at_ms: int


class ItemBaseline(Protocol):
    """Proposes items for a user's next click."""

    name: str

    def propose(self, past: UserPast) -> Iterator[int]:
        """Returns items, best first, each once; may include items that the user has seen."""

    def learn(self, click: ItemClick, past: UserPast) -> None:
        """Learns a click of a user whose `past` does not include it."""


class Growing:
    """The weight of a click, which doubles with each half-life; an infinite half-life weighs 1."""

    def __init__(self, half_life_ms: float) -> None:
        self._half_life_ms, self._begin_ms = half_life_ms, 0

    def weight(self, at_ms: int) -> tuple[float, float]:
        """Returns the weight of a click, and the factor for all earlier weights, which is nearly always 1."""
        if math.isinf(self._half_life_ms):
            return 1.0, 1.0
        self._begin_ms = self._begin_ms or at_ms
        exponent = (at_ms - self._begin_ms) / self._half_life_ms
        if exponent <= LARGEST_EXPONENT:
            return 2.0 ** max(exponent, -LARGEST_EXPONENT), 1.0
        self._begin_ms = at_ms
        return 1.0, 2.0 ** -min(exponent, 1000.0)


class Ordered:
    """Weights that only grow, and the `most` items with the largest ones (`best`), by falling weight.

    >>> ordered = Ordered(2)
    >>> for item in (7, 8, 8, 9):
    ...     ordered.add(item, 1.0)
    >>> ordered.best
    [8, 7]
    """

    def __init__(self, most: int) -> None:
        self._most, self._weights, self._places = most, dict[int, float](), dict[int, int]()
        self.best: list[int] = []

    def add(self, item: int, weight: float) -> None:
        """Adds to the weight of an item."""
        weights, ranks, best = self._weights, self._places, self.best
        total = weights[item] = weights.get(item, 0.0) + weight
        rank = ranks.get(item)
        if rank is None:
            if len(best) < self._most:
                best.append(item)
            elif total > weights[best[-1]]:
                del ranks[best[-1]]
                best[-1] = item
            else:
                return
            rank = len(best) - 1
        while rank and weights[best[rank - 1]] < total:
            best[rank] = best[rank - 1]
            ranks[best[rank]] = rank
            rank -= 1
        best[rank] = item
        ranks[item] = rank

    def scale(self, factor: float) -> None:
        """Multiplies all weights; items whose weight becomes 0 are dropped unless they are in the list."""
        self._weights = {
            item: weight * factor
            for item, weight in self._weights.items()
            if weight * factor > 0.0 or item in self._places
        }


class PopularItems:
    """The most clicked items of all users; with `new_first`, items that are new to the user come first."""

    def __init__(self, name: str, half_life_ms: float = math.inf, new_first: bool = False) -> None:
        self.name, self._new_first = name, new_first
        self._growing, self._items = Growing(half_life_ms), Ordered(LISTED)

    def propose(self, past: UserPast) -> Iterator[int]:
        """See `ItemBaseline`."""
        best = self._items.best
        if not self._new_first:
            return iter(best)
        return chain(
            (item for item in best if item not in past.seen),
            (item for item in best if item in past.seen),
        )

    def learn(self, click: ItemClick, past: UserPast) -> None:
        """See `ItemBaseline`."""
        weight, factor = self._growing.weight(click.at_ms)
        if factor < 1.0:
            self._items.scale(factor)
        self._items.add(click.item, weight)


class LastCategory:
    """The most clicked items of the category of the user's last click."""

    name = "last category"

    def __init__(self) -> None:
        self._categories: dict[int, Ordered] = {}

    def propose(self, past: UserPast) -> Iterator[int]:
        """See `ItemBaseline`."""
        ordered = self._categories.get(past.category)
        return iter(() if ordered is None else ordered.best)

    def learn(self, click: ItemClick, past: UserPast) -> None:
        """See `ItemBaseline`."""
        if click.category not in self._categories:
            self._categories[click.category] = Ordered(LISTED // 8)
        self._categories[click.category].add(click.item, 1.0)


class OwnItems:
    """The user's own items: each event counts 1 / sqrt(k), k = 1 for the newest."""

    name = "own items"

    def propose(self, past: UserPast) -> Iterator[int]:
        """See `ItemBaseline`."""
        sums: dict[int, float] = {}
        for k, item in enumerate(reversed(past.items), 1):
            sums[item] = sums.get(item, 0.0) + 1.0 / math.sqrt(k)
        return iter(sorted(sums, key=lambda item: -sums[item]))

    def learn(self, click: ItemClick, past: UserPast) -> None:
        """See `ItemBaseline`; nothing is learned, because the past has all that it needs."""


class ItemNeighbours:
    """Items that users clicked next to the user's latest items.

    The similarity of items i and j is w(i, j) / sqrt(w(i) w(j)). w(i, j) is the sum of the decayed co-visits, and w(i)
    the sum of the decayed clicks (item-based collaborative filtering, Sarwar et al. 2001, with decay).
    """

    name = "item-kNN"

    def __init__(self) -> None:
        self._growing = Growing(HALF_LIVES_MS["1d"])
        self._clicks: dict[int, float] = {}
        self._covisits: dict[int, dict[int, float]] = {}

    def propose(self, past: UserPast) -> Iterator[int]:
        """See `ItemBaseline`."""
        scores: dict[int, float] = {}
        share = 1.0
        for item in past.latest(ASKED_ITEMS):
            for other, weight in self._covisits.get(item, {}).items():
                similarity = weight / math.sqrt(self._clicks[item] * self._clicks[other])
                scores[other] = scores.get(other, 0.0) + share * similarity
            share *= FALLING
        return iter(sorted(scores, key=lambda item: -scores[item]))

    def learn(self, click: ItemClick, past: UserPast) -> None:
        """See `ItemBaseline`."""
        weight, factor = self._growing.weight(click.at_ms)
        if factor < 1.0:
            self._scale(factor)
        self._clicks[click.item] = self._clicks.get(click.item, 0.0) + weight
        for other in past.latest(COVISITED):
            if other != click.item and other in self._clicks:
                self._count(other, click.item, weight)
                self._count(click.item, other, weight)

    def _count(self, item: int, other: int, weight: float) -> None:
        covisits = self._covisits.setdefault(item, {})
        covisits[other] = covisits.get(other, 0.0) + weight
        if len(covisits) > 2 * NEIGHBOURS:
            strongest = sorted(covisits, key=lambda covisited: -covisits[covisited])[:NEIGHBOURS]
            self._covisits[item] = {covisited: covisits[covisited] for covisited in strongest}

    def _scale(self, factor: float) -> None:
        clicks = {item: weight * factor for item, weight in self._clicks.items() if weight * factor > 0.0}
        self._clicks = clicks
        self._covisits = {
            item: {other: weight * factor for other, weight in covisits.items() if other in clicks}
            for item, covisits in self._covisits.items()
            if item in clicks
        }


def item_baselines() -> list[ItemBaseline]:
    """A new set of all baselines of the next item."""
    now = [PopularItems(f"popular now ({name})", half, new_first=True) for name, half in HALF_LIVES_MS.items()]
    return [PopularItems("popular so far"), *now, LastCategory(), OwnItems(), ItemNeighbours()]


class CategoryRows(NamedTuple):
    """t rows whose category is predicted, in the order of the log.

    Attributes:
        category: `[t]` int64, the number of the clicked category, counted from 0 in order of appearance.
        recent: `[t, 5]` int64, numbers of the user's latest categories, newest first; -1 pads.
    """

    category: I64
    recent: I64
    at_ms: I64


class CategoryBaseline(Protocol):
    """Predicts the category of the next click."""

    name: str

    def predict(self, rows: CategoryRows, categories: int) -> CategoryPrediction:
        """Predicts each row, then learns it before the next one; `categories` is more than any number in `rows`."""


class PopularCategories:
    """All categories, by their decayed clicks."""

    def __init__(self, name: str, half_life_ms: float = math.inf) -> None:
        self.name, self._half_life_ms = name, half_life_ms
        self._counts, self._state = np.zeros(1024), np.zeros(3)

    def predict(self, rows: CategoryRows, categories: int) -> CategoryPrediction:
        """See `CategoryBaseline`."""
        while len(self._counts) < categories:
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        size = rows.category.size
        prediction = CategoryPrediction(np.empty(size, np.int32), np.empty(size), np.empty(size, np.int32))
        _popular(rows.category, rows.at_ms, self._counts, self._state, self._half_life_ms, *prediction)
        return prediction


@compiled("i8[::1], i8[::1], f8[::1], f8[::1], f8, i4[::1], f8[::1], i4[::1]")
def _popular(
    category: I64, at_ms: I64, counts: F64, state: F64, half_life_ms: float, rank: I32, log_share: F64, candidates: I32
) -> None:
    """`state` has the sum of the counts, the start time, and the number of categories with a count."""
    for row in range(category.shape[0]):
        clicked, categories = category[row], np.int64(state[2])
        count = counts[clicked]
        rank[row], log_share[row], candidates[row] = NONE, 0.0, categories
        if count > 0.0:
            # A share of a count that nobody repeats for long underflows, its logarithm does not.
            log_share[row] = np.log(count) - np.log(state[0])
            before = 0
            for other in range(counts.shape[0]):
                if counts[other] > count or (counts[other] == count and other < clicked):
                    before += 1
                    # Only the first ranks matter.
                    if before == 100:
                        break
            rank[row] = before
        else:
            state[2] += 1.0
        weight = 1.0
        if not np.isinf(half_life_ms):
            if state[1] == 0.0:
                state[1] = at_ms[row]
            exponent = (at_ms[row] - state[1]) / half_life_ms
            if exponent > LARGEST_EXPONENT:
                # A count that became 0 would be one of an unknown category.
                counts[:] = np.where(counts > 0.0, np.maximum(counts * 2.0**-exponent, 1e-290), 0.0)
                state[0], state[1], exponent = counts.sum(), at_ms[row], 0.0
            weight = 2.0 ** max(exponent, -LARGEST_EXPONENT)
        counts[clicked] += weight
        state[0] += weight


class PreviousCategories:
    """The user's latest categories, newest first. The share of each rank is how often it was right so far."""

    name = "previous category"

    def __init__(self) -> None:
        self._hits = np.full(5, 0.5)

    def predict(self, rows: CategoryRows, categories: int) -> CategoryPrediction:
        """See `CategoryBaseline`; shares are learned after the record."""
        valid, is_clicked = rows.recent >= 0, rows.recent == rows.category[:, None]
        hit, rank = is_clicked.any(1), is_clicked.argmax(1)
        total = (valid * self._hits).sum(1)
        log_share = np.zeros(len(hit))
        log_share[hit] = np.log(self._hits[rank[hit]] / total[hit])
        self._hits = self._hits + np.bincount(rank[hit], minlength=5)
        return CategoryPrediction(np.where(hit, rank, NONE).astype(np.int32), log_share, valid.sum(1).astype(np.int32))


def category_baselines() -> list[CategoryBaseline]:
    """A new set of all baselines of the next category."""
    return [PopularCategories("popular so far"), PopularCategories("popular now (1h)", HOUR_MS), PreviousCategories()]


RATE_SO_FAR, RATE_OF_ITEM = "click rate so far", "click rate of the item (1d)"
PRIOR_ROWS = 10.0
"""An item's click rate starts as if this many rows had had the click rate of all items."""


class ClickRates:
    """The click rate of all rows so far, and that of the item, whose rows halve each day."""

    def __init__(self) -> None:
        self._items, self._state = np.zeros((1024, 3)), np.array([0.5, 1.0])

    def predict(self, item: I64, clicked: NDArray[np.bool_], at_ms: I64, items: int) -> dict[str, F64]:
        """Predicts the click probability of each of n rows by both baselines, `[n]` float64, then learns the row.

        `item` is `[n]` int64 numbers, all below `items`; `clicked` is `[n]` bool, and `at_ms` `[n]` int64.
        """
        while len(self._items) < items:
            self._items = np.concatenate([self._items, np.zeros_like(self._items)])
        overall, of_item = np.empty(item.size), np.empty(item.size)
        _rates(item, clicked, at_ms, self._items, self._state, float(HALF_LIVES_MS["1d"]), overall, of_item)
        return {RATE_SO_FAR: overall, RATE_OF_ITEM: of_item}


@compiled("i8[::1], bool[::1], i8[::1], f8[:, ::1], f8[::1], f8, f8[::1], f8[::1]")
def _rates(
    item: I64,
    clicked: NDArray[np.bool_],
    at_ms: I64,
    items: F64,
    state: F64,
    half_life_ms: float,
    overall: F64,
    item_rate: F64,
) -> None:
    """`items` has clicks, rows and the time of the last row of each item, `state` clicks and rows of all."""
    for row in range(item.shape[0]):
        of_item = items[item[row]]
        left = 2.0 ** (-max(at_ms[row] - of_item[2], 0.0) / half_life_ms)
        of_item[0] *= left
        of_item[1] *= left
        of_item[2] = max(of_item[2], float(at_ms[row]))
        overall[row] = state[0] / state[1]
        item_rate[row] = (of_item[0] + PRIOR_ROWS * overall[row]) / (of_item[1] + PRIOR_ROWS)
        hit = 1.0 if clicked[row] else 0.0
        of_item[0] += hit
        of_item[1] += 1.0
        state[0] += hit
        state[1] += 1.0


class Numbers:
    """Numbers ids from 0 on, in order of appearance.

    >>> numbers = Numbers()
    >>> numbers.of(np.array([70, 90, 70], np.uint64)).tolist(), len(numbers)
    ([0, 1, 0], 2)
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, ids: U64) -> I64:
        """Returns the numbers of ids, of the same shape, int64; -1 for id 0."""
        numbers, flat = self._numbers, ids.reshape(-1)
        unique, inverse = np.unique(flat, return_inverse=True)
        own_numbers = [numbers.setdefault(identity, len(numbers)) if identity else -1 for identity in unique.tolist()]
        return np.array(own_numbers, np.int64)[inverse].reshape(ids.shape)
