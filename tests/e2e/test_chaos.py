"""Killed at random and at each step, the loop loses nothing, doubles nothing, and goes on answering; `make chaos` is the long version."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.chaos import POINTS, WEIGHTS, Chaos, Findings, Violence
from tests.e2e.running import ROOT

KILLS = 8
SEQUENCES = ("stream.", "back.", "enter.", "caught.", "loop.", "publish.", "apply.", "follow.", "control.", "rollback.")
# Only where a version that is pinned to has to be rebuilt, or follows by itself, or users are masked or erased: tests of
# their own.
RARE = {"apply.served", "caught.followed", "control.shared", "control.users", "follow.forgotten", "stream.forgotten"}


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


def test_the_same_seed_kills_the_same() -> None:
    def plan(seed: int) -> list[object]:
        violence = Violence(seed)
        return [
            (violence.victim(WEIGHTS, WEIGHTS), violence.arm("stream"), violence.wait_s(), violence.away_s())
            for _ in range(50)
        ]

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)


def test_a_kill_point_stays_in_the_plan_until_it_has_struck() -> None:
    violence = Violence(5)
    armed: Counter[str] = Counter()
    while violence.left:
        for part in POINTS:
            at = violence.arm(part)
            armed[at.partition(":")[0]] += 1
            if at and armed[at.partition(":")[0]] > 1:
                violence.struck(part, at.partition(":")[0])
    assert all(armed[point] >= 2 for points in POINTS.values() for point in points)


def test_each_broken_promise_is_a_problem() -> None:
    findings = Findings(1)
    findings.doubled = -1
    findings.differs = {"serving's rows": ["item.rows"], "stream's histories": []}
    findings.answers.failed["503 no version"] = 2
    findings.ends["stream", "UnreachableBroker"] = 1
    findings.ends["trainer", "GapError"] = 1
    assert findings.problems() == [
        "serving's rows: item.rows",
        "-1 rows learned twice (negative: never)",
        "2 questions failed: 503 no version",
        "trainer ended by itself 1 times: GapError",
    ]
