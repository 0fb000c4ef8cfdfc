"""Synthetic shoppers whose taste drifts, and the pace at which they click.

1. Consecutive clicks stay near one category with probability `STAY`.
2. Otherwise the category is drawn from the shopper's taste or, with probability `WANDER`, from the overall popularity
   (Zipf).
3. The focus of the taste moves from one favourite to the next, once in `Population.drift_s` on average. A fifth of the moves jump
   to a new category.
4. Items belong to categories. Within a category their popularity is Zipf too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from deploy.replaying.sender import Piece
from state.config.sections import Events
from state.config.settings import Settings

FAVOURITES = 4
STAY = 0.55
WANDER = 0.1
JUMP = 0.2
# Shares of the first four actions; further ones share the last.
ACTION_SHARES = (0.80, 0.07, 0.09, 0.04)
POPULARITY = 1.0
FOCUS_WEIGHTS = np.array([0.70, 0.18, 0.08, 0.04])

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
SLICE_S = 0.1
SEED = 7
MOST_PER_SLICE = 20_000


@dataclass(frozen=True)
class Clicks:
    """n clicks in order of time.

    Attributes:
        users: n raw ids, as a shop would write them.
        items: n ids.
        categories: n names.
        actions: n names.
        at_ms: `[n]` int64, ascending.
    """

    users: Sequence[str]
    items: Sequence[str]
    categories: Sequence[str]
    actions: Sequence[str]
    at_ms: I64

    def __len__(self) -> int:
        return len(self.users)


def zipf(n: int, exponent: float = POPULARITY) -> F64:
    """`[n]` float64 probabilities that fall with the rank.

    >>> zipf(3).round(3).tolist()
    [0.545, 0.273, 0.182]
    """
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def action_shares(n: int) -> F64:
    """`[n]` float64: how often each of n actions happens."""
    shares = np.array((ACTION_SHARES + (ACTION_SHARES[-1] / 2,) * n)[:n])
    return np.asarray(shares / shares.sum())


def encode(clicks: Clicks, events: Events) -> Piece:
    """Clicks as records, with the field names of the settings; Kafka's timestamp of each is its own time.

    >>> clicks = Clicks(["ada"], ["i"], ["c"], ["view"], np.array([5]))
    >>> encode(clicks, Events()).values
    [b'{"user":"ada","item":"i","category":"c","action":"view","time":5}']
    """
    unit = 1 if events.time_unit in ("auto", "ms") else 1000
    times: list[object] = (clicks.at_ms // unit if unit > 1 else clicks.at_ms).tolist()
    if events.time_unit == "iso":
        times = [f"{time}Z" for time in clicks.at_ms.astype("datetime64[ms]").astype(str).tolist()]
    names = (events.user, events.item, events.category, events.action, events.time)
    rows = zip(clicks.users, clicks.items, clicks.categories, clicks.actions, times, strict=True)
    values = [orjson.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return Piece([user.encode() for user in clicks.users], values, clicks.at_ms)


def burst(user: str, category: str, count: int, at_ms: int, action: str) -> Clicks:
    """`count` clicks of one user in one category, one millisecond apart, the last at `at_ms`."""
    return Clicks(
        users=[user] * count,
        items=[f"{category}-burst-{number % 10}" for number in range(count)],
        categories=[category] * count,
        actions=[action] * count,
        at_ms=np.arange(at_ms - count + 1, at_ms + 1, dtype=np.int64),
    )


@dataclass(frozen=True)
class Population:
    """How many users, categories and items there are, and the mean time in seconds until a user's taste moves."""

    users: int
    categories: int = 64
    items: int = 4000
    drift_s: float = 120.0


class ShopperCrowd:
    """A crowd of shoppers with a clock of its own."""

    def __init__(self, population: Population, rate: float, seed: int, start_ms: int, actions: Sequence[str]) -> None:
        """Gives each shopper a taste.

        Args:
            population: Their number and variety.
            rate: Clicks per second of them all; sets their clock's pace.
            seed: The seed of every random choice.
            start_ms: Their clock at the first click, Unix ms.
            actions: Names, the most frequent first.
        """
        users, categories, items = population.users, population.categories, population.items
        self._random = np.random.default_rng(seed)
        self._start_ms = start_ms
        self._drawn = 0
        self._step_ms = 1000.0 / rate if rate > 0 else 1.0
        self._drift_ms = population.drift_s * 1000.0
        self._popular = np.cumsum(zipf(categories))
        # The popular categories are not the first by name.
        order = self._random.permutation(categories)
        # By user, the favourite categories, the strongest first; the category of the last click; and when the taste moves.
        self._favourites = order[self._draw(self._popular, users * FAVOURITES)].reshape(users, FAVOURITES).tolist()
        self._session = [favourites[0] for favourites in self._favourites]
        self._next_move_ms = (start_ms + self._random.exponential(self._drift_ms, users)).tolist()
        self._order = order
        self._per_category = max(1, items // categories)
        self._item_ranks = np.cumsum(zipf(self._per_category))
        self._activity = np.cumsum(zipf(users, 0.6))
        self._shares = np.cumsum(action_shares(len(actions)))
        self._actions = np.array(actions, dtype=object)
        self._user_names = np.array([f"shopper-{number}" for number in range(users)], dtype=object)
        self._category_names = np.array([f"category-{number:02d}" for number in range(categories)], dtype=object)
        self._item_names = np.array(
            [f"item-{category:02d}-{rank:03d}" for category in range(categories) for rank in range(self._per_category)],
            dtype=object,
        )

    @classmethod
    def from_settings(cls, settings: Settings, seed: int | None, rate: float, start_ms: int) -> ShopperCrowd:
        """The shoppers of the section [shoppers]."""
        population = Population(settings.shoppers.users)
        return cls(population, rate, SEED if seed is None else seed, start_ms, settings.events.actions)

    def click(self, n: int) -> Clicks:
        """The next n clicks; the clock advances by n / rate seconds."""
        at_ms = self._start_ms + ((self._drawn + np.arange(1, n + 1)) * self._step_ms).astype(np.int64)
        self._drawn += n
        users = self._draw(self._activity, n)
        categories = self._categories(users, at_ms)
        ranks = self._draw(self._item_ranks, n)
        actions = self._draw(self._shares, n)
        return Clicks(
            users=self._user_names[users].tolist(),
            items=self._item_names[categories * self._per_category + ranks].tolist(),
            categories=self._category_names[categories].tolist(),
            actions=self._actions[actions].tolist(),
            at_ms=at_ms,
        )

    def _categories(self, users: I64, at_ms: I64) -> I64:
        """`[n]` int64: the category of each click, which depends on the shopper's last one."""
        n = len(users)
        chance = self._random.random(n)
        wandering = self._order[self._draw(self._popular, n)]
        focus = self._draw(np.cumsum(FOCUS_WEIGHTS), n)
        jumps = self._random.random(n) < JUMP
        fresh = self._order[self._random.integers(0, len(self._order), n)]
        moves_ms = at_ms + self._random.exponential(self._drift_ms, n)
        draws = zip(*(column.tolist() for column in (users, at_ms, chance, wandering, focus)), strict=True)
        session, next_move_ms, categories = self._session, self._next_move_ms, []
        for row, (user, now_ms, drawn, category, rank) in enumerate(draws):
            if now_ms >= next_move_ms[user]:
                # The old focus becomes the weakest favourite, or is forgotten.
                favourites = self._favourites[user]
                favourites.append(favourites.pop(0))
                if jumps[row]:
                    favourites[0] = int(fresh[row])
                next_move_ms[user] = float(moves_ms[row])
                session[user] = favourites[0]
            if drawn >= STAY + WANDER:
                session[user] = self._favourites[user][rank]
            categories.append(category if STAY <= drawn < STAY + WANDER else session[user])
        return np.array(categories, np.int64)

    def _draw(self, cumulative: F64, n: int) -> I64:
        """`[n]` ranks drawn from cumulative probabilities."""
        drawn = np.searchsorted(cumulative, self._random.random(n), side="right")
        return np.minimum(drawn, len(cumulative) - 1)


@dataclass(frozen=True)
class Pace:
    """How fast shoppers click, and how often.

    Attributes:
        rate: Clicks per second of the shoppers' clock; 0: as fast as the sender accepts them.
        speed: Seconds of the shoppers' clock per second of wall clock.
        limit: Number of clicks in all; None for no end.
        head_start_s: How long the shoppers have been clicking already; those clicks are due at once.
    """

    rate: float
    speed: float = 1.0
    limit: int | None = None
    head_start_s: float = 0.0


def let_click(
    shoppers: ShopperCrowd,
    send: Callable[[Clicks], None],
    pace: Pace,
    stopped: threading.Event,
    wall_s: Callable[[], float] = time.time,
) -> int:
    """Lets the shoppers click until `stopped` or the limit; returns the number of clicks sent.

    Every tenth of a second all clicks that are due are passed to `send`, which returns once they are acknowledged. A sender
    that cannot keep up falls behind in wall time, never in order. `wall_s` returns Unix time, in seconds.
    """
    started_s, sent = wall_s() - pace.head_start_s, 0
    while not stopped.is_set() and (pace.limit is None or sent < pace.limit):
        due = MOST_PER_SLICE
        if pace.rate > 0:
            due = int((wall_s() - started_s) * pace.speed * pace.rate) - sent
        due = min(due, MOST_PER_SLICE, sys.maxsize if pace.limit is None else pace.limit - sent)
        if due > 0:
            send(shoppers.click(due))
            sent += due
        if pace.rate > 0 and due < MOST_PER_SLICE:
            stopped.wait(SLICE_S)
    return sent
