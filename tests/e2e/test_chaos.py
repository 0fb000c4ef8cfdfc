"""The plan of `make chaos`, what it notices, and a short run of it in `make nightly`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state.attributes.values import AttributeTable
from state.config.loading import load
from state.config.sources import fields_of
from state.events.identity import Salt, user_id
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from state.positions import Source
from tests.e2e.chaos import POINTS, Chaos
from tests.e2e.crowd import Knowledge, values_of
from tests.e2e.evidence import (
    Joined,
    LogContent,
    LogDifference,
    attributes_differ,
    compare_logs,
    doubled,
)
from tests.e2e.running import ROOT
from tests.trainer.clicks import microbatch

KILLS = 8
SEQUENCES = (
    "stream.", "back.", "enter.", "caught.", "loop.", "publish.", "apply.", "follow.", "control.", "rollback.",
    "snapshot.",
)  # fmt: skip
# Only where a version that is pinned to has to be rebuilt, or follows by itself, users are masked or erased, or histories
# are loaded from a snapshot: tests of their own.
RARE = {"apply.served", "caught.followed", "control.shared", "control.users", "follow.forgotten", "stream.forgotten"}
RARE |= {"snapshot.cleared", "snapshot.share", "snapshot.loaded", "snapshot.unnamed"}


@pytest.mark.nightly
def test_some_kills_harm_nothing(tmp_path: Path) -> None:
    # Rollbacks under kills have short tests of their own: `test_rollback_steps.py`.
    findings = Chaos(tmp_path, seed=11, kills=KILLS, rounds=1, thorough=False, say=print, rollbacks=0).run()
    print("\n".join(findings.lines()))
    assert findings.problems() == []
    # It was no picnic, and the proofs had something to prove.
    assert findings.killed >= KILLS
    assert len({part for part, _ in findings.kills}) >= 3
    assert findings.rows > 500
    assert findings.versions >= 3
    assert findings.answers.given > 100
    assert len(findings.differs) >= 7


def test_each_kill_point_of_stream_trainer_and_applier_is_in_the_plan() -> None:
    packages = ("state", "streaming", "trainer", "deploy")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    found = {
        name
        for path in sources
        for reached in re.findall(r"killpoints\.reach\((.*)\)", path.read_text("utf-8"))
        for name in re.findall(r'"([a-z.]+)"', reached)
    }
    sequences = {name for name in found if name.startswith(SEQUENCES)}
    assert sequences - RARE == {point for points in POINTS.values() for point in points}


ROWS = 40


def batches(count: int = 4) -> list[MicroBatch]:
    return [decode(microbatch(number)) for number in range(count)]


def log_of(records: list[MicroBatch]) -> LogContent:
    made = LogContent()
    for number, record in enumerate(records):
        made.add(2 * number, record)
    return made


def without_row(batch: MicroBatch, row: int) -> MicroBatch:
    """As a stream would that counts a row and does not write it."""
    keep = np.arange(len(batch)) != row
    parts = list(batch.header.ranges)
    place = int(batch.source[row])
    parts[place] = replace(parts[place], rows=parts[place].rows - 1, dead=1)
    return decode(encode(replace(batch.header, ranges=tuple(parts)), batch.take(keep).columns))


def changed(batch: MicroBatch, name: str) -> MicroBatch:
    """With another value in one row of a column."""
    column = batch.columns[name].copy()
    column[3] += 1
    return decode(encode(batch.header, batch.columns | {name: column}))


@pytest.mark.parametrize(
    ("records", "difference"),
    [
        ([*batches(3), *batches(4)[1:]], LogDifference(0, 0, 0)),
        ([without_row(batches()[0], 7), *batches()[1:]], LogDifference(lost=1, invented=0, changed=0)),
        *(
            ([changed(batches()[0], name), *batches()[1:]], LogDifference(lost=0, invented=0, changed=1))
            for name in ("user", "at_ms", "features", "recent_categories", "category_windows")
        ),
    ],
    ids=["written again", "a lost row", "user", "at_ms", "features", "recent_categories", "category_windows"],
)
def test_a_row_that_is_lost_or_changed_is_noticed_and_one_that_is_written_again_is_none(
    records: list[MicroBatch], difference: LogDifference
) -> None:
    assert compare_logs(log_of(records), log_of(batches())) == difference
    turned = replace(difference, lost=difference.invented, invented=difference.lost)
    assert compare_logs(log_of(batches()), log_of(records)) == turned


def test_a_log_says_what_came_again_what_then_differed_and_where_it_has_a_hole() -> None:
    first, *rest = batches()
    again = log_of([first, *rest[:2], *rest])
    assert (len(again.rows), again.again, again.differing, again.gaps) == (4 * ROWS, 2 * ROWS, 0, 0)
    assert again.seen == 2 * 5 + 1, "the last record that brought a row"
    assert log_of([first, changed(first, "features"), *rest]).differing == 1
    assert log_of([first, *rest[1:]]).gaps == ROWS
    assert [doubled(trained, log_of(batches())) for trained in (4 * ROWS, 4 * ROWS + 1, 4 * ROWS - 1)] == [0, 1, -1]


SOURCE, SALT = Source("ab" * 16, 0), Salt(b"salt of a test, long enough")
USERS = AttributeTable("user", fields_of(["user_change", "user_tier"]))


def joined(*rows: tuple[int, int, str, int]) -> LogContent:
    """A log of rows: offset, how long it waited, the user, the number of the change it was joined with; 0 for none."""
    log = LogContent()
    for offset, waited, user, number in rows:
        texts = [str(value) for value in values_of("user", number).values()]
        ids = USERS.ids(texts) if number else USERS.unknown.tolist()
        log.joined[SOURCE, offset, waited] = Joined(0, user_id(SALT, user), 1, {"user": tuple(ids)})
    return log


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, 0, "ada", 0), (1, 0, "ada", 1), (2, 0, "bob", 2), (3, 0, "ada", 3), (4, 3, "ada", 1)], ""),
        ([(0, 0, "ada", 3), (1, 0, "ada", 1)], "older than an event before"),
        ([(0, 0, "ada", 0), (1, 0, "ada", 1), (2, 1, "ada", 0)], "older than when it began to wait"),
        ([(0, 0, "eve", 2)], "a stranger's"),
        ([(0, 0, "ada", 4)], "a stranger's"),
    ],
)
def test_attributes_that_an_event_cannot_have_had_are_noticed(rows: list[Any], problem: str) -> None:
    knowledge = Knowledge(load([], {}), 1)
    knowledge.changes = {"user": 3}
    knowledge.newest = {("user", "ada"): 3, ("user", "bob"): 2}
    found = attributes_differ(joined(*rows), {"user": USERS}, knowledge, SALT)
    assert [one.rpartition(": ")[2] for one in found] == ([problem] if problem else [])
