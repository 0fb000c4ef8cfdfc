"""The learner: whatever happens to it, the weights are a function of base, log range and mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from state.errors import GapError, UnknownTopic
from state.features.mask import Mask
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control, follow, pin, release, roll_back
from state.registry.registry import Registry
from tests.trainer.clicks import SALT, SPEC, START_MS, TOPIC, microbatch
from tests.trainer.logs import (
    append,
    bits_of,
    kill,
    learner,
    publish_all,
    run_to_end,
    settle,
    started,
    trainer_of,
    with_weight,
    without,
    written,
)
from trainer.engine import guard
from trainer.learner import Learner

RECORDS = [microbatch(number) for number in range(24)]
POISON = Mask(
    offsets=((Source(TOPIC, 0).topic, 0, 200, 330),), times=((START_MS + 20 * 150_000, START_MS + 21 * 150_000),)
)


def who(reason: str = "test") -> dict[str, Any]:
    return {"actor": "ann", "reason": reason, "now_ms": 5}


def state(running: Learner) -> tuple[str, int, dict[Source, int]]:
    return bits_of(running), running.place.next, running.place.marks


def rolled_back(to: int, mask: Mask) -> Callable[[Control], Control]:
    return lambda control: roll_back(control, to, mask, actor="ann", reason="poison", now_ms=5)


def test_after_a_rollback_the_bits_are_those_of_the_filtered_log(tmp_path: Path) -> None:
    registry, log = started(tmp_path / "ours"), written(RECORDS[:8])
    ours = learner(registry, log)
    to = publish_all(ours)
    append(log, RECORDS[8:])
    run_to_end(ours)
    settle(ours)
    poisoned = state(ours)
    registry.change(rolled_back(to, POISON))
    run_to_end(ours)
    assert ours.place.epoch == 2
    assert ours.place.masked > 100

    other = started(tmp_path / "theirs")
    log = written([*RECORDS[:8], *(without(value, POISON) for value in RECORDS[8:])])
    theirs = learner(other, log)
    run_to_end(theirs)
    assert state(ours) == state(theirs)
    assert state(ours) != poisoned
    ours.close()
    newest = registry.manifest(registry.newest(2) or 0)
    assert newest.log.next in (ours.place.next - 1, ours.place.next), "a marker follows the last record"
    assert newest.visible == ((_first_of(registry, 2), newest.version), (1, to))
    assert newest.mask_generation == 2


def _first_of(registry: Registry, epoch: int) -> int:
    return min(version for version in registry.versions() if registry.manifest(version).epoch == epoch)


def test_a_version_says_what_it_was_trained_on(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:3]), "--trainer.publish_s", "3600")
    run_to_end(running)
    running.close()
    made = registry.manifest(registry.newest(1) or 0)
    assert (made.log.first, made.log.next, made.steps, made.rows) == (0, 6, 3, 120)
    assert made.marks == {Source(TOPIC, 0): 60, Source(TOPIC, 1): 60}
    assert (made.salt, made.spec) == (SALT, SPEC.digest)
    assert made.environment["threads"] == "any"
    assert made.metrics["account.rows"] == made.metrics["account.trained"] == 120
    assert made.metrics["log_loss"] > 0


def test_a_rollback_between_two_records_leaves_the_rest_of_the_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS))
    strike = killpoints.parse("loop.stepped:5", lambda: print(Registry(tmp_path).change(rolled_back(1, POISON))))
    monkeypatch.setattr(killpoints, "armed", strike)
    run_to_end(running)
    assert running.place.epoch == 2
    log = written([without(value, POISON) for value in RECORDS])
    theirs = learner(started(tmp_path / "theirs"), log)
    run_to_end(theirs)
    assert state(running) == state(theirs)
    running.close()
    epochs = [registry.manifest(version).epoch for version in registry.versions()]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("command", ["release", "resume"])
def test_a_held_trainer_says_what_to_do_and_is_not_held_again_once_it_is_released(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    command: Literal["release", "resume"],
) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 3)
    registry = started(tmp_path)
    bad = [with_weight(value, np.inf) for value in RECORDS[4:8]]
    log = written([*RECORDS[:4], *bad, *RECORDS[8:12]])
    running = learner(registry, log)
    run_to_end(running)
    # A version that passed may still be on its way.
    settle(running)
    held = running.control.held
    assert held is not None and trainer_of(running).guard.held
    assert (held.rule, held.first, held.next, held.signal) == ("steps", 8, 13, 3.0)
    assert {(one.first, one.next) for one in held.clicks} == {(80, 140)}, "the clicks of the skipped records"
    assert "springtide status" in caplog.text and running._metrics.held_rule.labels("steps")._value.get() == 1
    before, at = registry.versions(), running.place.next
    for _ in range(5):
        assert running.tick(0.0) == 0
    assert running.place.next == at == 13
    running.close()
    assert registry.versions() == before, "no version has a trainer that is held"
    running = learner(registry, log)
    assert running.tick(0.0) == 0, "a restart does not let it go"

    for change in (pin, follow):
        version = (1,) if change is pin else ()
        registry.change(lambda control, change=change, version=version: change(control, *version, **who()))
        assert running.tick(0.0) == 0, "neither says anything about training"
    registry.change(lambda control: release(control, actor="ann", reason="fine", now_ms=6, action=command))
    running.tick(0.0)
    run_to_end(running)
    assert running.place.next == 24 and running.control.held is None
    assert trainer_of(running).counters.skipped == 160

    # Killed before any of it was kept: the same records come again, and are not held again.
    kill(running)
    for number in {*registry.versions()} - {*before}:
        registry.remove("delta", number)
    for number in registry.recents():
        registry.remove("recent", number)
    again = learner(Registry(tmp_path), log)
    assert again.place.next < 13, "before the place where training was held"
    for _ in range(100):
        again.tick(0.0)
    assert again.place.next == 24 and again.control.held is None
    assert trainer_of(again).counters == trainer_of(running).counters
    again.close()


def test_a_log_made_anew_or_cut_off_is_not_read_on(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:4]))
    run_to_end(running)
    running.close()
    with pytest.raises(UnknownTopic, match="created again"):
        learner(registry, written(RECORDS, topic_id="ef" * 16))
    with pytest.raises(GapError):
        learner(registry, written(RECORDS, begin=20))
