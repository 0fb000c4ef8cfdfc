"""Twenty days of the bench of a year: shoppers, items and categories come and go, a flood passes, and everything stays flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.year import sizes
from tests.bench.year.run import Horizons, Year, flat, live
from tests.bench.year.town import Plan

PLAN = Plan(
    days=20,
    season_days=7,
    clicks=480,
    users=200,
    items=240,
    categories=24,
    turnover=0.05,
    new_categories=1,
    flood_day=10,
    flood=1500,
)
HORIZONS = Horizons(
    rows_d=4,
    window_d=3,
    late_d=1,
    topics_d=4,
    round_h=8,
    max_rows=720,
    looked_at_d=3,
    load_bytes=1000,
)
MOST_GROWTH = 1.1
"""The bench holds a year to 5 %; some hundred users are not so even."""


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Year:
    return live(PLAN, HORIZONS, tmp_path_factory.mktemp("year") / "state")


@pytest.mark.nightly
def test_every_table_store_topic_and_the_process_are_flat_after_their_horizon(year: Year) -> None:
    grown = flat(year, PLAN, HORIZONS)
    assert len(grown) > 35 and {"table.cross.rows", "serving.histories.meta", "process.resident"} < grown.keys()
    assert {name: ratio for name, ratio in grown.items() if ratio > MOST_GROWTH} == {}


@pytest.mark.nightly
def test_the_flood_reaches_the_caps_and_leaves_nothing_behind(year: Year) -> None:
    for name, most in (("user", HORIZONS.max_rows), ("item", HORIZONS.max_rows), ("cross", 4 * HORIZONS.max_rows)):
        rows = [day[f"table.{name}.rows"] for day in year.days]
        assert max(rows[: PLAN.flood_day]) < 0.7 * most
        assert 0.85 * most < max(rows) <= most
        assert rows[-1] < 0.7 * most
    for name in ("stream.histories.chunks", "serving.histories.chunks", "serving.histories.meta"):
        held = [day[name] for day in year.days]
        assert max(held) > 3 * held[PLAN.flood_day - 1] and held[-1] < 1.2 * held[PLAN.flood_day - 1]


@pytest.mark.nightly
def test_answers_at_the_end_are_as_good_as_before(year: Year) -> None:
    # Each of the last two weeks begins with new categories, and the last but one has the flood.
    first, before, last = (year.quality(begin, begin + 6) for begin in (0, 7, 14))
    assert last["auc"] > first["auc"] and last["top5"] > before["top5"] - 0.02 and last["top5"] > 0.8


def test_what_grows_by_a_little_each_day_is_not_flat(tmp_path: Path) -> None:
    days = [{"leak": 100.0 + day, "even": 100.0 + day % 2} for day in range(40)]
    grown = sizes.growth(days, slice(4, 14), slice(30, 40))
    assert grown["leak"] > 1.2 and grown["even"] == 1.0
