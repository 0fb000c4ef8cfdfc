"""`verify` recomputes a version: equal over restarts, rollbacks and compaction; a flipped bit, another machine and a short log are said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from state import probe
from state.errors import GapError, LogError, UnknownVersion
from state.features.mask import Mask
from state.layout import CONTROL
from state.log import Log
from state.registry.control import Control, Decision, follow, pin, release, roll_back
from state.registry.registry import Registry
from tests.memory_log import MemoryLog, MemoryReader
from tests.trainer.clicks import SPEC, microbatch, small_settings
from tests.trainer.logs import (
    ABOUT,
    LOG,
    append,
    fresh,
    kill,
    learner,
    publish_all,
    run_to_end,
    started,
    trainer_of,
    with_weight,
    written,
)
from tests.trainer.test_learner import POISON
from trainer import compactor, verify
from trainer.engine import build, guard
from trainer.verify import Comparison
from trainer.versions import checkpoint, content

PINS: Decision = {"actor": "ann", "reason": "to and fro", "now_ms": 6}
RECORDS = [microbatch(number) for number in range(20)]


def started_with_spec(path: Path) -> Registry:
    registry = started(path)
    registry.specs.add_spec(SPEC.digest, ABOUT, lambda folder: (folder / "transform").mkdir())
    return registry


def asked(registry: Registry, log: Log, version: int, base: int | None = None) -> Comparison:
    return verify.verify(small_settings(), registry, version, base, fresh, log)


def names(registry: Registry) -> set[str]:
    return {str(path.relative_to(registry.path)) for path in registry.path.rglob("*")}


def rolled_back(to: int, mask: Mask) -> Callable[[Control], Control]:
    return lambda control: roll_back(control, to, mask, actor="ann", reason="poison", now_ms=5)


def test_every_version_is_recomputed_whatever_happened_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS[:6])
    running = learner(registry, log)
    run_to_end(running)
    # Killed, and rows written again by a stream that was killed too.
    kill(running)
    append(log, [RECORDS[5], *RECORDS[6:9]])
    monkeypatch.setattr(build, "CAPACITY", 1024)
    running = learner(registry, log)
    to = publish_all(running)
    compactor.compact(registry)
    append(log, RECORDS[9:14])
    late = publish_all(running)
    # Back to a version before the newest one, without the poison.
    registry.change(rolled_back(to, POISON))
    append(log, RECORDS[14:])
    run_to_end(running)
    running.close()
    newest = registry.newest(2) or 0
    # Of control only where epochs begin and end is read: years of pins cost nothing.
    for at in range(6):
        registry.change(partial(pin, version=to, **PINS) if at % 2 == 0 else partial(follow, **PINS))
    (registry.path / CONTROL / "00000006.json").write_text("nobody reads it")
    before = names(registry)

    for version, base, first in ((1, 0, 0), (to, 1, 0), (late, to, None), (newest, to, None)):
        found = asked(registry, log, version)
        assert (found.outcome, found.base) == ("equal", base), found.text()
        assert first is None or found.first == first
        chain = registry.chain(version)
        kept = content.merge(checkpoint.tensors_of(registry, part) for part in (chain.base, *chain.deltas))
        assert found.digest == content.digest(probe.without(kept))
    # From the very first base, over the rollback and its mask.
    found = asked(registry, log, newest, base=1)
    assert (found.outcome, found.base, found.next) == ("equal", 1, registry.manifest(newest).log.next)
    assert found.rows == 21 * 40
    assert names(registry) == before, "nothing is written"
    with pytest.raises(UnknownVersion, match="does not descend"):
        asked(registry, log, newest, base=late)
    with pytest.raises(UnknownVersion):
        asked(registry, log, newest + 1)


def test_a_released_trainer_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 3)
    registry = started_with_spec(tmp_path)
    bad = [with_weight(value, np.inf) for value in RECORDS[4:8]]
    log = written([*RECORDS[:4], *bad, *RECORDS[8:12]])
    running = learner(registry, log)
    run_to_end(running)
    assert trainer_of(running).guard.held
    running.close()
    held = registry.newest(1) or 0
    registry.change(lambda now: release(now, actor="ann", reason="fine", now_ms=6))
    running = learner(registry, log)
    while running.place.next < 24:
        running.tick(0.0)
    run_to_end(running)
    running.close()
    trainer = fresh()
    for version in (held, registry.newest(1) or 0):
        found = verify.verify(small_settings(), registry, version, 1, lambda: trainer, log)
        assert found.outcome == "equal", found.text()
    assert found.steps == 12


def trained(tmp_path: Path, records: int = 6) -> tuple[Registry, MemoryLog, int]:
    registry, log = started_with_spec(tmp_path), written(RECORDS[:records])
    running = learner(registry, log)
    run_to_end(running)
    running.close()
    return registry, log, registry.newest(1) or 0


def test_another_click_in_the_log_is_a_difference_with_its_place(tmp_path: Path) -> None:
    registry, _, newest = trained(tmp_path)
    found = asked(registry, written([*RECORDS[:2], with_weight(RECORDS[2], 0.5), *RECORDS[3:6]]), newest)
    assert found.outcome == "different"
    assert found.difference is not None
    assert found.difference.table in content.TABLES
    assert found.difference.id is not None
    assert f"id {found.difference.id:016x}" in found.text()
    assert json.loads(json.dumps(found.document()))["difference"]["position"] == found.difference.position


def test_a_version_after_a_change_of_the_environment_is_recomputed_from_the_last_one_before(tmp_path: Path) -> None:
    registry, log, former = started_with_spec(tmp_path), written(RECORDS[:4]), ("--model.learning_rate", "0.2")
    running = learner(registry, log, *former)
    run_to_end(running)
    running.close()
    last = registry.newest(1) or 0
    append(log, RECORDS[4:6])
    running = learner(registry, log)
    run_to_end(running)
    running.close()
    newest = registry.newest(1) or 0
    found = asked(registry, log, newest)
    assert (found.outcome, found.base) == ("equal", last), found.text()
    with pytest.raises(UnknownVersion, match=r"model\.learning_rate was 0\.2 and is"):
        asked(registry, log, newest, base=1)


def test_another_environment_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, log, newest = trained(tmp_path)
    now = checkpoint.environment(small_settings(), "/CPU:0")
    monkeypatch.setattr(checkpoint, "environment", lambda *_: now | {"numpy": "9.9", "instructions": "neon"})
    found = asked(registry, log, newest)
    assert found.outcome == "not comparable"
    assert "numpy was" in found.text()
    assert "instructions was" in found.text()
    assert found.document()["environment"][0].endswith("is neon")


def test_a_log_that_no_longer_reaches_back_is_reported(tmp_path: Path) -> None:
    registry, log, newest = trained(tmp_path)
    log.topics().delete_before(LOG, {0: 3})
    with pytest.raises(GapError, match="no longer reaches back"):
        asked(registry, log, newest)
    with pytest.raises(LogError, match="created again"):
        asked(registry, written(RECORDS[:6], topic_id="ef" * 16), newest)


def test_without_a_base_before_it_a_version_cannot_be_recomputed(tmp_path: Path) -> None:
    registry, log, newest = trained(tmp_path)
    compactor.compact(registry)
    registry.remove("base", 1)
    with pytest.raises(UnknownVersion, match="no base before it"):
        asked(registry, log, newest)


def test_an_empty_log_is_not_awaited_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, log, newest = trained(tmp_path)
    monkeypatch.setattr(MemoryReader, "poll", lambda *_: [])
    settings = small_settings()
    hasty = replace(settings, kafka=replace(settings.kafka, request_timeout_s=0.2))
    with pytest.raises(LogError, match=r"gave nothing for 0\.2 s at offset 0"):
        verify.verify(hasty, registry, newest, None, fresh, log)
