"""The learner: weights are a function of base, log range and mask, and each version is what the trainer was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from state import probe
from state.errors import GapError, UnknownTopic
from state.features.mask import Mask
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control, Decision, follow, pin, release, roll_back
from state.registry.registry import MOST_BETWEEN, SERVING, Registry
from state.registry.tensor_files import unpack
from state.rows.tables import tables_in
from tests.streaming.streams import until
from tests.trainer.clicks import SALT, SPEC, START_MS, TOPIC, microbatch
from tests.trainer.logs import (
    append,
    bits_of,
    fresh,
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
from trainer.versions import checkpoint, content

RECORDS = [microbatch(number) for number in range(24)]
POISON = Mask(
    offsets=((Source(TOPIC, 0).topic, 0, 200, 330),), times=((START_MS + 20 * 150_000, START_MS + 21 * 150_000),)
)


def who(reason: str = "test") -> Decision:
    return {"actor": "ann", "reason": reason, "now_ms": 5}


def state(running: Learner) -> tuple[str, int, Mapping[Source, int]]:
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

    for change in (partial(pin, version=1, **who()), partial(follow, **who())):
        registry.change(change)
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


FEW = ("--registry.durable_s", "40")
"""Seconds of the clock of these tests, which goes on at each look: some ten versions."""


def recorded(running: Learner, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The digest of the trainer at each version, filled in while the learner publishes."""
    digests: dict[int, str] = {}
    publish = running.publish

    def publish_and_note(last: bool = False) -> None:
        now = bits_of(running)
        publish(last)
        settle(running)
        digests[running.place.parent] = now

    monkeypatch.setattr(running, "publish", publish_and_note)
    return digests


def answers_at(registry: Registry, parts: list[tuple[int, Any]]) -> dict[str, Any]:
    """What a host holds after `parts`: rows by table and id, dense weights and popular categories."""
    rows: dict[str, Any] = {}
    for version, kind in parts:
        tensors = unpack(registry.read(registry.manifest(version, kind), SERVING))
        for table in tables_in(tensors):
            for key in tensors[f"{table}.removed"].tolist():
                rows.pop(f"{table} {key}", None)
            for key, row in zip(tensors[f"{table}.ids"].tolist(), tensors[f"{table}.rows"], strict=True):
                rows[f"{table} {key}"] = row.tobytes()
        whole = [name for name in tensors if name.startswith("dense.") or name == "popular"]
        rows |= {name: tensors[name].tobytes() for name in whole}
    return rows


def test_each_version_is_what_the_trainer_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durable ones are restored bit for bit, with rows that expired and came back; recent ones lead to the same answers."""
    registry = started(tmp_path)
    flags = ("--trainer.expire_s", "600", "--trainer.admit_after", "2")
    running = learner(registry, written(RECORDS), *FEW, *flags)
    digests = recorded(running, monkeypatch)
    run_to_end(running)
    running.close()
    durable = registry.versions()
    recents = registry.recents()
    assert 3 <= len(durable) < len(recents) / 2
    assert [registry.manifest(version).parent for version in durable] == [None, *durable[:-1]]
    assert [registry.manifest(version, "recent").parent for version in recents] == [1, *recents[:-1]]
    assert registry.manifest(durable[-1]).visible == ((1, durable[-1]),)
    for version in durable[1:]:
        restored = fresh(*flags)
        checkpoint.restore(registry, version, restored, SPEC.digest)
        assert checkpoint.digest(restored) == digests[version]
        kept = [(1, "base"), *((one, "delta") for one in durable[1:] if one <= version)]
        followed = [(1, "base"), *((one, "recent") for one in recents if one <= version)]
        assert answers_at(registry, kept) == answers_at(registry, followed)
    removed = [content.decode([registry.read(version, SERVING)])["user.removed"] for version in durable[1:]]
    assert sum(map(len, removed)), "some rows expired"
    logs = [registry.manifest(version, "recent").log for version in recents]
    assert [one.first for one in logs[1:]] == [one.next for one in logs[:-1]]


def test_recent_versions_lost_in_a_crash_are_learned_again_under_new_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learner(started(tmp_path / "whole"), written(RECORDS))
    run_to_end(whole)
    expected = bits_of(whole)
    registry, log = started(tmp_path / "cut"), written(RECORDS[:13])
    running = learner(registry, log, "--registry.durable_s", "3600")
    recorded(running, monkeypatch)
    run_to_end(running)
    # Killed: no last version. The first of the epoch is all that is durable.
    kill(running)
    durable, lost = registry.versions()[-1], registry.recents()[-1]
    assert durable == 2 < lost
    append(log, RECORDS[13:])
    again = Registry(registry.path)
    again.sweep_recent()
    running = learner(again, log, "--registry.durable_s", "3600")
    assert running.place.parent == running.place.durable == durable
    run_to_end(running)
    assert bits_of(running) == expected
    running.close()
    first = min(version for version in again.versions() if version > durable)
    assert first == lost + 1, "numbers go on, and the first version after a start is durable"
    last = again.manifest(again.newest(1) or 0)
    assert last.visible == ((first, last.version), (1, durable))


def test_recent_versions_follow_while_a_durable_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, log = started(tmp_path), written(RECORDS[:4])
    running = learner(registry, log, "--registry.durable_s", "600")
    is_written, may_appear = threading.Event(), threading.Event()

    def hold() -> None:
        is_written.set()
        assert may_appear.wait(60)

    before = registry.newest(1)
    with monkeypatch.context() as held:
        held.setattr(killpoints, "armed", killpoints.Armed("publish.written", 1, hold))
        until(lambda: running.tick(0.0) >= 0 and is_written.is_set(), "a durable version is written")
        append(log, RECORDS[4:])
        until(lambda: running.tick(0.0) >= 0 and len(registry.recents()) > 3, "recent versions follow")
        assert registry.newest(1) == before
        # One that becomes due between the question and the publication is recent too.
        held.setattr(running._publications, "_saved_s", float("-inf"))
        until(lambda: running.tick(0.0) >= 0 and running._publisher.accepts, "the last recent version is written")
        running.publish()
        may_appear.set()
    newest = registry.recents()[-1]
    settle(running)
    durable = registry.newest(1)
    assert durable is not None and durable == running.place.durable < newest <= running.place.parent
    run_to_end(running)
    expected = bits_of(running)
    kill(running)
    registry.sweep_recent()
    again = learner(registry, log)
    assert again.place.parent == durable
    run_to_end(again)
    assert bits_of(again) == expected
    again.close()


def test_a_clean_stop_and_silence_leave_nothing_that_is_not_durable(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(RECORDS[:4])
    running = learner(registry, log, *FEW)
    run_to_end(running)
    assert running.place.unsaved
    for _ in range(60):
        running.tick(0.0)
        settle(running)
    assert not running.place.unsaved
    assert registry.newest(1) == running.place.parent
    count = len(registry.versions())
    for _ in range(60):
        running.tick(0.0)
    assert len(registry.versions()) == count, "nothing new, nothing published"
    append(log, RECORDS[4:6])
    run_to_end(running)
    assert running.place.unsaved
    running.close()
    assert registry.manifest(registry.newest(1) or 0).log.next == running.place.next


def test_one_recent_version_a_second_and_each_durable_one_carry_a_probe_and_item_lists(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS), "--registry.durable_s", "2", tick_s=0.02)
    run_to_end(running)
    running.close()
    recents, durable = registry.recents(), registry.versions()

    def full(version: int, kind: Any = None) -> bool:
        tensors = unpack(registry.read(registry.manifest(version, kind), SERVING))
        assert bool(probe.answers_in(tensors)) == ("clicked.ids" in tensors) == ("followed.ids" in tensors)
        return "clicked.ids" in tensors

    assert 2 <= sum(full(version, "recent") for version in recents) <= len(recents) / 3
    assert all(map(full, durable))


def test_recent_versions_go_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:12]), "--registry.durable_s", "3600", recent_s=25.0)
    made = recorded(running, monkeypatch)
    run_to_end(running)
    newest = running.place.parent
    assert newest in registry.recents()
    assert len(registry.recents()) < len(made) - 2
    deadline = time.monotonic() + 20.0
    while registry.recents() != (running.place.parent,) and time.monotonic() < deadline:
        running.tick(0.0)
    assert registry.recents() == (running.place.parent,), "the newest stays, however long there is no other"


def test_a_durable_version_comes_before_numbers_run_out(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:1]), "--registry.durable_s", "3600")
    durable = publish_all(running)
    assert durable == running.place.durable
    (registry.path / "recent" / f"{durable + MOST_BETWEEN - 2:012d}.last").write_bytes(b"")
    for kept in (durable, durable + MOST_BETWEEN):
        running.place = running.place.stepped()
        running.publish()
        settle(running)
        assert running.place.durable == registry.newest(1) == kept
    assert running.place.parent == kept
    running.close()


def test_rows_are_copied_for_a_durable_version_only(tmp_path: Path) -> None:
    registry = started(tmp_path)
    running = learner(registry, written(RECORDS[:6]), *FEW)
    run_to_end(running)
    running.close()
    recent = registry.manifest(registry.recents()[-1], "recent")
    durable = registry.manifest(registry.newest(1) or 0)
    assert list(recent.files) == [SERVING]
    assert set(recent.files) < set(durable.files)
    names = unpack(registry.read(recent, SERVING))
    assert not [
        name for name in names if name.startswith(("slots.", "state.")) or name.endswith((".accum", "_seen_ms"))
    ]
    assert np.isfinite(recent.metrics["log_loss"])
