"""Recent and durable versions of a learner: each is what the trainer was, and what was not durable is learned again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state import probe
from state.registry.registry import MOST_BETWEEN, SERVING, Registry
from state.registry.tensor_files import unpack
from state.rows.tables import tables_in
from tests.trainer.clicks import SPEC, microbatch
from tests.trainer.logs import append, bits_of, fresh, kill, learner, publish_all, run_to_end, settle, started, written
from trainer.learner import Learner
from trainer.versions import checkpoint, content

RECORDS = [microbatch(number) for number in range(24)]
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
