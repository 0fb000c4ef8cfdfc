"""A rollout that runs while nobody judges it is told, by status and on /metrics; one that is judged, or need not be, is not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy.rollouts import telling
from deploy.rollouts.offered import RolloutCollector
from deploy.watch.scrape import Scrape, parsed
from state.config.sections import Paths
from state.config.settings import Settings
from state.process.wall_clock import wall_ms
from state.rollouts import rollout
from state.rollouts.evidence import Evidence
from state.rollouts.report import figures, report
from state.rollouts.rollouts import Rollouts

AGO_MS = 90_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings(), paths=Paths(state=str(tmp_path)))


def begun(settings: Settings, at_ms: int) -> tuple[Rollouts, dict[str, Any]]:
    """A rollout at 5 % of the users, and who decided so."""
    rollouts, who = Rollouts(settings.registry_dir), {"actor": rollout.GATE, "reason": "it answers", "now_ms": at_ms}
    rollouts.propose(rollout.start(None, "wider", (5.0, 100.0), 60.0, (0, 0), **who))
    rollouts.change(partial(rollout.begin, **who))
    return rollouts, who


def seen(settings: Settings) -> tuple[dict[str, Any] | None, Scrape]:
    """What `springtide status` and /metrics tell of the newest rollout."""
    registry = CollectorRegistry()
    registry.register(RolloutCollector(settings.registry_dir))
    return telling.look(settings), Scrape(parsed(generate_latest(registry).decode()))


def told(settings: Settings) -> tuple[str, float | None, float | None]:
    """The word of status, for how many seconds nobody judged it, and when somebody last did by /metrics."""
    state, metrics = seen(settings)
    assert state is not None
    judged_s = metrics.value("springtide_rollout_judged_timestamp_seconds", trial="wider")
    return telling.as_text(state)[0], state["unwatched_s"], judged_s


def test_one_that_nobody_judged_since_its_step_began_is_unwatched(settings: Settings) -> None:
    at_ms = wall_ms() - AGO_MS
    begun(settings, at_ms)
    word, unwatched_s, judged_s = told(settings)
    assert word == "UNWATCHED" and unwatched_s == pytest.approx(AGO_MS / 1000, abs=5.0)
    assert judged_s == at_ms / 1000


def test_one_that_is_judged_is_not_until_that_is_long_ago(settings: Settings) -> None:
    rollouts, _ = begun(settings, wall_ms() - 10 * AGO_MS)
    known = figures(report(Evidence("wider", settings.rollout.planned_answers), settings.rollout.equal_within))
    for ago_ms, word in ((0, "running"), (AGO_MS, "UNWATCHED")):
        newest, judged_ms = rollouts.newest(), wall_ms() - ago_ms
        assert newest is not None
        rollouts.keep_figures(newest, known, judged_ms)
        found = told(settings)
        assert found[0] == word and found[2] == judged_ms / 1000


def test_one_that_is_halted_needs_nobody(settings: Settings) -> None:
    rollouts, who = begun(settings, wall_ms() - AGO_MS)
    rollouts.change(partial(rollout.halt, **who))
    assert told(settings) == ("HALTED", None, None)
