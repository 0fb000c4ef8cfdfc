"""Recent versions: they are followed and never gone back to, cost no sync, and their numbers never come twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from state.errors import CorruptVersion, UnknownVersion
from state.process import killpoints
from state.registry.manifest import LogRange, Manifest
from state.registry.registry import MOST_BETWEEN, SERVING, Registry
from tests.state.registry.test_registry import draft, started


def publish_recent(registry: Registry, parent: int, durable: int | None = None, epoch: int = 1) -> Manifest:
    """A version over `parent`; with `durable` it is one too, over that one."""
    made = replace(draft(parent, epoch), kind="recent")
    recent = registry.publish(made, {SERVING: b"since %d" % parent})
    if durable is None:
        return recent
    since = replace(made, kind="delta", parent=durable, log=LogRange("microbatches", "cd" * 16, 0, 1, 9))
    return registry.publish(since, {SERVING: b"since %d" % durable}, recent)


def test_a_durable_version_has_the_recent_ones_before_it_as_ancestors(tmp_path: Path) -> None:
    registry = started(tmp_path, 1)
    for parent in (1, 2, 3):
        publish_recent(registry, parent)
    kept = publish_recent(registry, 4, durable=1)
    assert (kept.version, kept.kind, kept.parent, kept.visible, kept.durable) == (5, "delta", 1, ((1, 5),), True)
    beside = Registry(tmp_path).manifest(5, "recent")
    assert (beside.parent, beside.visible, beside.durable) == (4, ((1, 5),), False)
    assert (kept.log.first, beside.log.first) == (1, 4)
    assert registry.versions() == [1, 5]
    assert registry.recents() == (2, 3, 4, 5)
    assert [part.version for part in registry.chain(5).deltas] == [5]
    assert (registry.read(kept, SERVING), registry.read(beside, SERVING)) == (b"since 1", b"since 4")


def test_what_a_killed_trainer_had_not_made_durable_is_no_ancestor(tmp_path: Path) -> None:
    registry = started(tmp_path, 1)
    kept = publish_recent(registry, 1, durable=1).version
    for parent in (kept, kept + 1):
        publish_recent(registry, parent)
    after = Registry(tmp_path)
    assert after.sweep_recent() == 3
    first = publish_recent(after, kept, durable=kept)
    assert (first.version, first.visible) == (kept + 3, ((kept + 3, kept + 3), (1, kept)))
    assert publish_recent(after, first.version).visible == ((kept + 3, kept + 4), (1, kept))


def test_the_newest_version_may_be_recent_or_durable(tmp_path: Path) -> None:
    registry, other = started(tmp_path, 1), Registry(tmp_path)
    for parent, durable in ((1, None), (2, 1), (3, None)):
        made = publish_recent(registry, parent, durable)
        newest = other.latest(1)
        assert newest is not None and newest.version == made.version
    assert (other.newest(1), other.latest(2)) == (3, None)
    registry.remove("recent", 4)
    newest = other.latest(1)
    assert newest is not None and (newest.version, newest.kind) == (3, "delta"), "one that is gone is no error"


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_a_recent_version_that_a_power_cut_damaged_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    registry = started(tmp_path, 1)
    publish_recent(registry, 1)
    damage(registry.folder("recent", 2) / "manifest.json")
    other = Registry(tmp_path)
    newest = other.latest(1)
    assert newest is not None and newest.version == 1
    with pytest.raises(CorruptVersion):
        other.manifest(2, "recent")
    assert other.newest_good(1) == 1


def test_nobody_goes_back_to_a_recent_version(tmp_path: Path) -> None:
    registry = started(tmp_path, 1)
    for parent, durable in ((1, 1), (2, None), (3, None), (4, 2)):
        publish_recent(registry, parent, durable)
    for look in (registry.chain, registry.manifest):
        with pytest.raises(UnknownVersion, match=r"version 3 is recent: .*use 2 or 5"):
            look(3)
    assert registry.either(3).kind == "recent"


def test_a_recent_version_is_never_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = started(tmp_path, 1)
    synced: list[int] = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *given: synced.append(1))
    publish_recent(registry, 1)
    registry.remove("recent", 2)
    assert not synced
    publish_recent(registry, 1, durable=1)
    assert synced


def test_numbers_go_on_after_any_end(tmp_path: Path) -> None:
    """Where the machine was started again, beyond any that may have lain in `recent/` then."""
    registry = started(tmp_path, 1)
    registry.sweep_recent("first boot")
    publish_recent(registry, publish_recent(registry, 1).version)
    for _ in range(3):
        killed = Registry(tmp_path)
        killed.sweep_recent("first boot")
        assert (killed.recents(), killed.next_number()) == ((), 4)
    cut = Registry(tmp_path)
    for name in list((tmp_path / "recent").iterdir()):
        name.unlink()
    for _ in range(2):
        cut.sweep_recent("second boot")
        assert Registry(tmp_path).next_number() == 2 + MOST_BETWEEN
    assert publish_recent(Registry(tmp_path), 1, durable=1).version == 2 + MOST_BETWEEN


@pytest.mark.parametrize("point", ["recent.numbered", "recent.written", "recent.renamed"])
def test_a_kill_at_any_step_uses_no_number_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    class Killed(BaseException):
        pass

    def strike() -> None:
        raise Killed

    registry = started(tmp_path, 1)
    used = publish_recent(registry, 1).version
    monkeypatch.setattr(killpoints, "armed", killpoints.parse(point, strike))
    with pytest.raises(Killed):
        registry.sweep_recent()
        publish_recent(registry, 1)
    monkeypatch.setattr(killpoints, "armed", killpoints.parse("", strike))
    seen = {used, *Registry(tmp_path).recents()}
    again = Registry(tmp_path)
    again.sweep_recent()
    assert again.recents() == ()
    assert publish_recent(again, 1).version == max(seen) + 1
    again.directory.sweep()
    assert sorted(path.name for path in (tmp_path / "tmp").iterdir()) == []


def test_a_merged_delta_takes_the_place_of_those_that_it_was_made_of(tmp_path: Path) -> None:
    """A reader in the middle of the chain loses a file and finds the merged one when it looks again."""
    registry = started(tmp_path, 6)
    reader = Registry(tmp_path)
    before = reader.chain(5)
    for parent, version in ((1, 4), (1, 3), (4, 6)):
        of = registry.manifest(version, "delta")
        registry.add(replace(of, kind="merged", parent=parent), {})
    for gone in (2, 3, 4, 5, 6):
        if gone != 5:
            registry.remove("delta", gone)
    registry.remove("merged", 3, 1)
    with pytest.raises(UnknownVersion, match="use 1 or 4"):
        reader.read(before.deltas[0], SERVING)
    assert [(part.version, part.kind, part.parent) for part in reader.chain(6).deltas] == [
        (4, "merged", 1),
        (6, "merged", 4),
    ]
    assert [part.version for part in reader.chain(5).deltas] == [4, 5]
    assert reader.versions() == [1, 4, 5, 6]
    assert registry.newest_good(1) is not None
