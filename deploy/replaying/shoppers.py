"""Synthetic shoppers whose taste drifts: what they click next, and nothing of Kafka.

Each shopper has a taste: a vector of weights over the categories, nearly all
of it on a few favourites, the strongest first.

1. A shopper shops in sessions: consecutive clicks stay near one category with
   probability `STAY`.
2. Otherwise the category is drawn from the shopper's taste, or, with
   probability `WANDER`, from what is popular with everybody (Zipf).
3. The taste drifts: its focus moves from one favourite to the next, once in
   `drift_s` on average, and a fifth of the moves jump to a new category.
4. Items belong to categories; within a category they are Zipf too.

Everything follows from the seed and the order of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from state.compiled import compiled
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
    """`[n]` float64: how often each of n actions happens.

    >>> action_shares(2).round(2).tolist(), len(action_shares(6))
    ([0.92, 0.08], 6)
    """
    shares = np.array((ACTION_SHARES + (ACTION_SHARES[-1] / 2,) * n)[:n])
    return np.asarray(shares / shares.sum())


@compiled(
    "i8[::1], i8[::1], f8[::1], i8[::1], i8[::1], bool[::1], i8[::1], f8[::1], i8[:, ::1], i8[::1], f8[::1], i8[::1]"
)
def walk(
    users: I64,
    at_ms: I64,
    chance: F64,
    wandering: I64,
    focus: I64,
    jumps: npt.NDArray[np.bool_],
    fresh: I64,
    waits_ms: F64,
    favourites: I64,
    session: I64,
    next_move_ms: F64,
    out: I64,
) -> None:
    """Chooses categories click after click: each depends on the shopper's last one.

    Args:
        users: `[n]` int64, who clicks.
        at_ms: `[n]` int64, when.
        chance: `[n]` float64 in [0, 1): stay, wander or follow the taste.
        wandering: `[n]` int64, the category if the shopper wanders.
        focus: `[n]` int64, which favourite it is if the shopper follows the taste.
        jumps: `[n]` bool, whether a move of the taste finds a new category.
        fresh: `[n]` int64, that new category.
        waits_ms: `[n]` float64, time until the taste's next move.
        favourites: `[users, FAVOURITES]` int64, the strongest first; changed.
        session: `[users]` int64, category of the last click; changed.
        next_move_ms: `[users]` float64, when each taste moves; changed.
        out: `[n]` int64, filled with the categories.
    """
    for row in range(len(users)):
        user = users[row]
        if at_ms[row] >= next_move_ms[user]:
            # The old focus becomes the weakest favourite, or is forgotten.
            old = favourites[user, 0]
            for rank in range(favourites.shape[1] - 1):
                favourites[user, rank] = favourites[user, rank + 1]
            favourites[user, -1] = old
            if jumps[row]:
                favourites[user, 0] = fresh[row]
            next_move_ms[user] = at_ms[row] + waits_ms[row]
            session[user] = favourites[user, 0]
        if chance[row] < STAY:
            out[row] = session[user]
        elif chance[row] < STAY + WANDER:
            out[row] = wandering[row]
        else:
            session[user] = favourites[user, focus[row]]
            out[row] = session[user]


def encode(clicks: Clicks, events: Events) -> tuple[list[bytes], list[bytes]]:
    """Keys and JSON values of clicks, with the field names of the settings.

    >>> clicks = Clicks(["ada"], ["i"], ["c"], ["view"], np.array([5]))
    >>> encode(clicks, Events())
    ([b'ada'], [b'{"user":"ada","item":"i","category":"c","action":"view","time":5}'])
    """
    names = (events.user, events.item, events.category, events.action, events.time)
    unit = 1 if events.time_unit in ("auto", "ms") else 1000
    times: list[object] = (clicks.at_ms // unit if unit > 1 else clicks.at_ms).tolist()
    if events.time_unit == "iso":
        times = [f"{time}Z" for time in clicks.at_ms.astype("datetime64[ms]").astype(str).tolist()]
    rows = zip(clicks.users, clicks.items, clicks.categories, clicks.actions, times, strict=True)
    values = [orjson.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return [user.encode() for user in clicks.users], values


class ShopperCrowd:
    """A crowd of shoppers with a clock of its own."""

    def __init__(
        self,
        users: int,
        categories: int,
        items: int,
        drift_s: float,
        rate: float,
        seed: int,
        start_ms: int,
        actions: Sequence[str],
    ) -> None:
        """Gives each shopper a taste.

        Args:
            users: How many shoppers.
            categories: How many categories.
            items: How many items, at least one per category.
            drift_s: Seconds after which a taste has moved on, on average.
            rate: Clicks per second of them all; sets their clock's pace.
            seed: Of every choice.
            start_ms: Their clock at the first click, Unix ms.
            actions: Names, the most frequent first.
        """
        self._random = np.random.default_rng(seed)
        self._start_ms = start_ms
        self._made = 0
        self._step_ms = 1000.0 / rate if rate > 0 else 1.0
        self._drift_ms = drift_s * 1000.0
        self._popular = np.cumsum(zipf(categories))
        # The popular categories are not the first by name.
        order = self._random.permutation(categories)
        self._favourites = order[self._draw(self._popular, users * FAVOURITES)].reshape(users, FAVOURITES)
        self._order = order
        self._session = self._favourites[:, 0].copy()
        self._next_move_ms = start_ms + self._random.exponential(self._drift_ms, users)
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
        wanted = settings.shoppers
        return cls(
            users=wanted.users,
            categories=wanted.categories,
            items=wanted.items,
            drift_s=wanted.drift_s,
            rate=rate,
            seed=wanted.seed if seed is None else seed,
            start_ms=start_ms,
            actions=settings.events.actions,
        )

    def click(self, n: int) -> Clicks:
        """The next n clicks; the clock goes on by n / rate seconds."""
        at_ms = self._start_ms + ((self._made + np.arange(1, n + 1)) * self._step_ms).astype(np.int64)
        self._made += n
        users = self._draw(self._activity, n)
        chance = self._random.random(n)
        wandering = self._order[self._draw(self._popular, n)]
        focus = self._draw(np.cumsum(FOCUS_WEIGHTS), n)
        jumps = self._random.random(n) < JUMP
        fresh = self._order[self._random.integers(0, len(self._order), n)]
        waits_ms = self._random.exponential(self._drift_ms, n)
        categories = np.empty(n, np.int64)
        walk(
            users,
            at_ms,
            chance,
            wandering,
            focus,
            jumps,
            fresh,
            waits_ms,
            self._favourites,
            self._session,
            self._next_move_ms,
            categories,
        )
        ranks = self._draw(self._item_ranks, n)
        actions = self._draw(self._shares, n)
        return Clicks(
            users=self._user_names[users].tolist(),
            items=self._item_names[categories * self._per_category + ranks].tolist(),
            categories=self._category_names[categories].tolist(),
            actions=self._actions[actions].tolist(),
            at_ms=at_ms,
        )

    def _draw(self, cumulative: F64, n: int) -> I64:
        """`[n]` ranks drawn from cumulative probabilities."""
        drawn = np.searchsorted(cumulative, self._random.random(n), side="right")
        return np.minimum(drawn, len(cumulative) - 1)
