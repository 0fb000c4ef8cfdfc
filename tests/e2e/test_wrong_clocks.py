"""One wrong clock harms nobody else: the same clicks with wrong and with right clocks leave the same for all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.wrong_clocks import (
    END_MS,
    HOUR_MS,
    PARTITIONS,
    SETTINGS,
    SPEC,
    TICKS,
    Loop,
    MadeClick,
    Seen,
    world,
)
from trainer.engine.step import Trainer

MINUTE_MS, DAY_MS = 60_000, 24 * HOUR_MS
YEARS_MS = 80 * 365 * DAY_MS
OFF_MS = (50 * MINUTE_MS, 3 * DAY_MS, YEARS_MS, -50 * MINUTE_MS, -3 * DAY_MS, -YEARS_MS)

# When the stream reads a click of a time: as it happens, after an outage, or years later from a file.
READ = {
    "live": lambda at_ms: at_ms + 50,
    "after an outage": lambda at_ms: END_MS + 30 * MINUTE_MS + (at_ms - END_MS) // 100,
    "from a late file": lambda at_ms: END_MS + 9 * 365 * DAY_MS + (at_ms - END_MS) // 100,
}

Ticks = list[list[MadeClick]]
Ran = Callable[[str, str], tuple[Ticks, Seen, Seen]]


@cache
def trainer() -> Trainer:
    """Tracing its graphs takes seconds."""
    return Trainer(SETTINGS, SPEC)


def here_and_there() -> Ticks:
    """One click in fifty has a wrong clock, each another one; its producer stamps it so or not at all."""
    ticks, number = world(1), 0
    for tick in range(4, TICKS, 4):
        for place in range(len(ticks[tick])):
            if place % 3 == 2 and (tick // 4 + place // 3) % 4 == 0:
                click = ticks[tick][place]
                action = ("view", "view", "impression", "click")[number % 4]
                shown = click.fields if action == "view" else {"item": "hot-1", "category": "hot"}
                ticks[tick][place] = replace(
                    click,
                    fields={**shown, "action": action},
                    off_ms=OFF_MS[number % 6],
                    stamped=("clock", "none")[number // 6 % 2],
                )
                number += 1
    assert 45 * number < sum(map(len, ticks)) < 55 * number
    return ticks


def a_thousand_of_one() -> Ticks:
    """For each wrong clock a thousand clicks in a row of one user."""
    ticks = world(2)
    for number, off_ms in enumerate(OFF_MS):
        tick = ticks[50 + 50 * number]
        # Impressions behind the clock are dropped; with a right one they would keep those behind them waiting.
        action = "impression" if off_ms > 0 and number % 2 else "view"
        shown = {"item": f"hot-{number}", "category": "hot", "action": action}
        click = MadeClick(number % 4, f"bot-{number}", shown, tick[0].at_ms, off_ms, ("clock", "none")[number // 2 % 2])
        tick += [click] * 1000
    return ticks


CLICKS: dict[str, Callable[[], Ticks]] = {"here and there": here_and_there, "a thousand of one": a_thousand_of_one}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Clicks, what a run leaves, and what one does with the same clicks under right clocks, without the refused ones."""

    @cache
    def both(clicks: str, read: str) -> tuple[Ticks, Seen, Seen]:
        path, ticks, now = tmp_path_factory.mktemp("runs"), CLICKS[clicks](), READ[read]
        if read == "from a late file":
            ticks = [[replace(click, stamped="none") for click in tick] for tick in ticks]
        wrong = [click.user for tick in ticks for click in tick if click.off_ms]
        found = Loop(path / "wrong", trainer(), now, {}, wrong).run(ticks)
        right = [[replace(click, off_ms=0) for click in tick] for tick in ticks]
        return ticks, found, Loop(path / "right", trainer(), now, found.refused, wrong).run(right)

    return both


@pytest.mark.parametrize(
    ("clicks", "read"),
    [
        pytest.param(
            clicks, read, marks=[pytest.mark.nightly] * ((clicks, read) != ("here and there", "after an outage"))
        )
        for clicks in CLICKS
        for read in READ
    ],
)
def test_wrong_clocks_leave_for_all_others_what_right_ones_do(ran: Ran, clicks: str, read: str) -> None:
    ticks, found, right = ran(clicks, read)
    assert set(found.refused.values()) <= {"implausible_time"} and not right.refused
    assert found.rows == right.rows
    assert found.waiting == right.waiting
    assert found.histories == right.histories
    assert found.trained == right.trained
    assert found.clocks == right.clocks
    # With right clocks every row's log time is its own.
    assert found.moved > 0 == right.moved
    # There was something to harm: rows wait, get their labels and expire, items leave the tables, histories are swept.
    kinds = {place[1] - place[2] for place in right.rows}
    items = [tables["item"].keys() for *_, tables in right.trained]
    assert all(right.waiting[30:]) and len(kinds) > 10 and items[0] - items[-1] and len(items[-1]) > 100
    assert found.swept > 0 and right.swept > 0
    assert right.clocks[-1] == right.trained[-1][0] == ticks[-1][0].at_ms


@pytest.mark.nightly
def test_a_late_file_among_live_clicks_harms_nobody_and_is_learned_from(tmp_path: Path) -> None:
    ticks, drawn, left_out = world(3), world(4), dict[tuple[int, int], str]()
    late, offsets = [], [0] * PARTITIONS
    for tick, clicks in enumerate(ticks):
        for click in clicks:
            offsets[click.partition] += 1
        for old in drawn[tick] * 10 if 150 <= tick < 170 else []:
            fields = {name: f"old-{value}" if name != "action" else value for name, value in old.fields.items()}
            late.append(replace(old, user=f"old-{old.user}", fields=fields, off_ms=-9 * 365 * DAY_MS, stamped="none"))
            left_out[old.partition, offsets[old.partition]] = "not there"
            offsets[old.partition] += 1
            clicks.append(late[-1])
    apart = {one for click in late for one in (click.user, *click.fields.values())}
    found = Loop(tmp_path / "with", trainer(), READ["live"], {}, apart).run(ticks)
    learned = trainer().counters.trained
    right = Loop(tmp_path / "without", trainer(), READ["live"], left_out, apart).run(ticks)
    assert found == right and not found.refused
    assert learned - trainer().counters.trained >= sum(click.fields["action"] == "view" for click in late) > 1000


def test_a_clock_that_is_off_is_named_and_a_right_one_is_not(ran: Ran) -> None:
    ticks, found, right = ran("here and there", "after an outage")
    offsets, wrong = [0] * PARTITIONS, {}
    for click in (click for tick in ticks for click in tick):
        wrong[click.partition, offsets[click.partition]] = click.off_ms
        offsets[click.partition] += 1
    named = {(one.partition, one.offset): one for one in found.off}
    assert all((one.direction == "ahead") == (wrong[place] > 0) and wrong[place] for place, one in named.items())
    # A click ahead of the crowd may be the first after a quiet time: the last ones are not judged yet.
    clicks = sum(one.clicks for one in found.off) + len(found.refused)
    assert 0.9 < clicks / sum(bool(off_ms) for off_ms in wrong.values()) <= 1.0
    assert right.off == []
