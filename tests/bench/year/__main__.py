"""A year in an hour: is everything flat after its horizon, and are answers at its end as good as in its first month?

    python -m tests.bench.year [--days 365]

Every day some shoppers, items and categories leave and others come; each season brings its own; in spring a flood of
ids comes that nobody sees again. Stream, trainer, registry and serving are the real ones, in one process, under a
clock that is set; logs are in memory. Horizons and caps are small, so that all of them are reached.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

from tests.bench.report import Figure, Stages, report
from tests.bench.year.run import Horizons, flat, live, longer
from tests.bench.year.town import Plan

PLAN = Plan(
    days=365,
    season_days=92,
    clicks=2000,
    users=800,
    items=1200,
    categories=60,
    turnover=0.03,
    new_categories=1,
    flood_day=120,
    flood=6000,
)
HORIZONS = Horizons(
    rows_d=14,
    window_d=7,
    late_d=1,
    topics_d=7,
    round_h=6,
    max_rows=2500,
    looked_at_d=28,
    popular_d=24,
)
MOST_GROWTH = 1.05
MONTH_D, WEEK_D = 30, 7


def main() -> None:
    """Lives through the year, prints and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=PLAN.days)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    plan, stages = longer(PLAN, asked.days), Stages("year")

    def say(day: int, held: dict[str, float]) -> None:
        rows = ", ".join(f"{held[f'table.{name}.rows']:.0f} {name}s" for name in ("user", "item", "cross"))
        stages.say("living", f"day {day + 1} of {plan.days}: {rows}, {held['process.resident'] / 1e6:.0f} MB")

    with tempfile.TemporaryDirectory() as folder:
        year = live(plan, HORIZONS, Path(folder) / "state", say)
    grown = flat(year, plan, HORIZONS)
    first, last = year.quality(0, MONTH_D), year.quality(plan.days - WEEK_D, plan.days)
    figures = {f"growth of {name}": Figure(ratio, "ratio", f"<= {MOST_GROWTH}") for name, ratio in grown.items()}
    for name in ("top1", "top5", "auc"):
        figures[f"first month's {name}"] = Figure(first[name], "")
        figures[f"last week's {name}"] = Figure(last[name], "", f">= {first[name]:.4f}")
    notes = {name: [day[name] for day in year.days[:: max(1, plan.days // 73)]] for name in year.days[-1]}
    report("year", figures, {"plan": vars(plan), "horizons": vars(HORIZONS), "every fifth day": notes})


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
