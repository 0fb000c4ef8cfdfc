"""The year: town and chain day after day, sizes and quality as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from deploy.serving.following import clicks as following
from state.config.loading import load
from state.config.settings import Settings
from tests.bench.year import sizes
from tests.bench.year.chain import Chain
from tests.bench.year.town import DAY_MS, HOUR_MS, Plan, Town
from trainer.compactor import LOAD_BYTES
from trainer.measures.evaluation import Evaluation, area_under_curve

START_MS = 1_700_006_400_000
"""A midnight."""


@dataclass(frozen=True)
class Horizons:
    """After which time what is forgotten, and when that can be seen.

    Attributes:
        rows_d: Days without a sighting after which a row goes.
        window_d: Of the longest window.
        late_d: How late a click may come.
        topics_d: How long topics keep their records.
        round_h: Hours of clicks that are taken together, a version each time.
        max_rows: Cap of tables.
        looked_at_d: Days whose mean is compared.
        popular_d: After how many days a category is no longer counted among the popular ones, whose counts are halved
            each day; 0: not looked at.
        load_bytes: Of deltas that may be read to load a version, for which bases stay longer than they are offered.
    """

    rows_d: int
    window_d: int
    late_d: int
    topics_d: int
    round_h: int
    max_rows: int
    looked_at_d: int
    popular_d: int = 0
    load_bytes: int = LOAD_BYTES

    @property
    def longest_d(self) -> int:
        """After how many days the last of what is old must have gone; it goes two days late at most."""
        return max(self.rows_d, self.window_d + self.late_d, self.topics_d, self.popular_d) + 2


@dataclass
class Year:
    """What was measured.

    Attributes:
        days: Sizes at the end of each day, by name.
        sums: Progressive sums of all days so far, at the end of each day: `Evaluation.state()` since the beginning.
    """

    days: list[dict[str, float]] = field(default_factory=list)
    sums: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)

    def quality(self, first: int, last: int) -> dict[str, float]:
        """Top-1 and top-5 of known users and AUC of days from `first` up to `last`, scored before learning."""
        after = self.sums[last - 1]
        before = self.sums[first - 1] if first else {name: np.zeros_like(sums) for name, sums in after.items()}
        rows, _, top1, top5 = (after["sums"] - before["sums"])[0, 2].tolist()
        area = area_under_curve(*(after["bins"] - before["bins"])[0])
        return {"top1": top1 / rows, "top5": top5 / rows, "auc": float("nan") if area is None else area, "rows": rows}


def settings_of(state: Path, horizons: Horizons) -> Settings:
    """Those of a small model that forgets early, in a directory of its own."""
    day_s, h = 86_400, horizons
    flags: dict[str, object] = {
        "paths.state": state,
        "model.dim": 16, "model.hidden": "64,32", "trainer.device": "cpu",
        "trainer.max_rows": h.max_rows, "trainer.expire_s": h.rows_d * day_s,
        "trainer.publish_s": 3600,
        "features.windows_s": f"3600,{day_s},{h.window_d * day_s}", "features.history": 64,
        "features.recent_categories": 8,
        "events.label": "liked", "events.max_age_s": h.late_d * day_s,
        "kafka.retention_h": h.topics_d * 24, "registry.delta_keep_s": day_s, "registry.base_keep_d": h.topics_d,
        "serving.keep_s": day_s, "stream.metrics_port": 0,
        "stream.cache_users": 1000,
        # The flood is to be lived through, and is what the guard is there to hold.
        "guard.mode": "off",
    }  # fmt: skip
    return load([word for name, value in flags.items() for word in (f"--{name}", str(value))], {}, "/dev/null")


def live(
    plan: Plan, horizons: Horizons, state: Path, say: Callable[[int, dict[str, float]], None] = lambda *_: None
) -> Year:
    """Lives through the plan.

    Args:
        plan: The town's.
        horizons: After which time what is forgotten.
        state: An empty directory.
        say: Told of each day and its sizes.
    """
    found, town = Year(), Town(plan, START_MS)
    rounds = 24 // horizons.round_h
    kept = mock.patch.object(following, "ITEMS_KEEP_D", horizons.rows_d)
    with kept, Chain(settings_of(state, horizons), START_MS, horizons.load_bytes) as chain:
        for day in range(plan.days):
            flood = town.flood(day) if day == plan.flood_day else []
            for number in range(rounds):
                until_ms = START_MS + day * DAY_MS + (number + 1) * horizons.round_h * HOUR_MS
                share = plan.clicks * (number + 1) // rounds - plan.clicks * number // rounds
                clicks = town.clicks(day, share)
                clicks += [one for one in flood if until_ms - horizons.round_h * HOUR_MS <= one[0] < until_ms]
                chain.take(sorted(clicks, key=lambda click: click[0]), until_ms)
            chain.end_day()
            found.days.append(sizes.of(chain))
            found.sums.append(_since_the_beginning(chain.trainer.measures.evaluation))
            say(day, found.days[-1])
    return found


def flat(year: Year, plan: Plan, horizons: Horizons) -> dict[str, float]:
    """By name how much larger everything is in the last days than after its horizon; see `sizes.growth`.

    What has a high-water mark is compared with the days after the flood, all else with the last ones before it: lists
    fill, and versions grow with them, for some days after rows have reached their horizon.
    """
    longest, days = horizons.longest_d, horizons.looked_at_d
    before = _between(max(longest, plan.flood_day - days), plan.flood_day, days)
    after = _between(plan.flood_day + longest, plan.days - days, days)
    last = slice(plan.days - days, plan.days)
    grown = sizes.growth(year.days, before, last)
    grown |= {name: ratio for name, ratio in sizes.growth(year.days, after, last).items() if sizes.only_grows(name)}
    return {name: ratio for name, ratio in grown.items() if horizons.popular_d or name != sizes.POPULAR}


def _between(first: int, end: int, most: int) -> slice:
    if first >= end:
        raise ValueError(f"day {end} is not behind the horizon, day {first}")
    return slice(first, min(end, first + most))


def _since_the_beginning(evaluation: Evaluation) -> dict[str, npt.NDArray[Any]]:
    held = evaluation.state()
    return {"sums": held["sums"][:1], "bins": held["bins"][:1]}


def longer(plan: Plan, days: int) -> Plan:
    """The same plan for another number of days, its flood and seasons at the same share of them."""
    share = days / plan.days
    return replace(
        plan, days=days, flood_day=round(plan.flood_day * share), season_days=max(1, round(plan.season_days * share))
    )
