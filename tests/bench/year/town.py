"""A town whose shoppers, items and categories are never the same for long, and its clicks, day after day.

Shoppers, items and categories are slots of a `ShopperCrowd`; who or what is in a slot changes:

- each day some shoppers leave for good, and new ones come; likewise items and categories;
- at the beginning of a season a quarter of the categories, and all their items, make room for the season's own;
- on one day a flood of ids that nobody saw before, and nobody sees again, clicks once each.

Some clicks have a label: whether the category is one of the shopper's two strongest favourites, one in ten told wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from deploy.replaying.shoppers import FAVOURITES, Population, ShopperCrowd

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
ACTIONS = ("view", "cart", "favorite", "purchase")
LABELLED, MISTAKEN = 0.5, 0.1


@dataclass(frozen=True)
class Plan:
    """How large the town is and what happens in it.

    Attributes:
        days: Days replayed.
        season_days: Of a season.
        clicks: A day.
        users, items, categories: At a time.
        turnover: Share of the users, and of the items, that are others the next day.
        new_categories: A day.
        flood_day: On which the flood comes.
        flood: Its clicks, each of a new user, item and category of its own.
        seed: Of all chance.
    """

    days: int
    season_days: int
    clicks: int
    users: int
    items: int
    categories: int
    turnover: float
    new_categories: int
    flood_day: int
    flood: int
    seed: int = 7


class Town:
    """The town; what it does follows from the plan and the order of calls.

    Args:
        plan: How large it is.
        start_ms: When its first day begins.
    """

    def __init__(self, plan: Plan, start_ms: int) -> None:
        self._plan, self._start_ms = plan, start_ms
        self._chance = np.random.default_rng(plan.seed)
        population = Population(plan.users, plan.categories, plan.items, drift_s=10 * 86_400.0)
        self._crowd = ShopperCrowd(population, plan.clicks / 86_400, plan.seed, start_ms, ACTIONS)
        # Tastes are as they become by and by, so that the town is as hard to know at first as at last.
        tastes = self._chance.integers(0, plan.categories, (plan.users, FAVOURITES)).tolist()
        self._crowd._favourites[:] = tastes
        self._crowd._session[:] = [favourites[0] for favourites in tastes]
        self._each = plan.items // plan.categories
        slots = {"shopper": plan.users, "item": plan.categories * self._each, "category": plan.categories}
        self._who = {kind: np.zeros(count, np.int64) for kind, count in slots.items()}
        self._day = -1

    def clicks(self, day: int, n: int) -> list[tuple[int, bytes, bytes]]:
        """The next clicks, all of one day: time in ms, key and value."""
        if day > self._day:
            self._day = day
            self._dawn(day)
        made = self._crowd.click(n)
        chance = self._chance.random((n, 2))
        favourites = self._crowd._favourites
        found = []
        for row in range(n):
            shopper, category = (int(text.rpartition("-")[2]) for text in (made.users[row], made.categories[row]))
            click: dict[str, Any] = {
                "user": self._named("shopper", shopper),
                "item": self._named("item", category * self._each + int(made.items[row].rpartition("-")[2])),
                "category": self._named("category", category),
                "action": made.actions[row],
                "time": int(made.at_ms[row]),
            }
            if chance[row, 0] < LABELLED:
                click["liked"] = (category in favourites[shopper][:2]) != bool(chance[row, 1] < MISTAKEN)
            found.append(_record(click))
        return found

    def flood(self, day: int) -> list[tuple[int, bytes, bytes]]:
        """The clicks of the flood, spread over its day."""
        step_ms = DAY_MS / self._plan.flood
        return [
            _record(
                {
                    "user": f"bot-{number}",
                    "item": f"fake-{number}",
                    "category": f"nonsense-{number // 4}",
                    "action": "view",
                    "time": self._start_ms + day * DAY_MS + int(number * step_ms),
                    "liked": bool(number % 2),
                }
            )
            for number in range(self._plan.flood)
        ]

    def _named(self, kind: str, slot: int) -> str:
        return f"{kind}-{slot}.{self._who[kind][slot]}"

    def _dawn(self, day: int) -> None:
        """Who is another than yesterday."""
        if day == 0:
            return
        for kind, share in (("shopper", self._plan.turnover), ("item", self._plan.turnover)):
            who = self._who[kind]
            who[self._chance.random(who.size) < share] += 1
        changed = self._chance.integers(0, self._plan.categories, self._plan.new_categories)
        if day % self._plan.season_days == 0:
            quarter = day // self._plan.season_days % 4
            changed = np.concatenate([changed, np.arange(quarter, self._plan.categories, 4)])
        self._who["category"][np.unique(changed)] += 1


def _record(click: dict[str, Any]) -> tuple[int, bytes, bytes]:
    return click["time"], click["user"].encode(), orjson.dumps(click)
