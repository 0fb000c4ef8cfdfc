"""The registry: durable and recent versions, control, programs and specs, and what damage does to them."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.disk.files import HOST
from state.errors import ControlConflict, CorruptVersion, SaltMismatch, SpecMismatch, UnknownVersion, WrongEpoch
from state.events.identity import Salt
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control, Decision, follow, pin, roll_back, start
from state.registry.manifest import Draft, LogRange, Manifest, sees
from state.registry.model_fit import require_same_salt
from state.registry.registry import MOST_BETWEEN, SERVING, Registry
from tests.disks import folder_in_memory
from tests.kills import killed_at

WHO: Decision = {"actor": "ann", "reason": "because", "now_ms": 5}
SOURCE = Source("ab" * 16, 1)
GOLDEN = Path(__file__).parents[2] / "golden" / "registry-v1"


def draft(parent: int | None, epoch: int = 1) -> Draft:
    return Draft(
        kind="base" if parent is None else "delta",
        epoch=epoch,
        parent=parent,
        log=LogRange("microbatches", "cd" * 16, 0, 4, 9),
        sources=((SOURCE, 7),),
        steps=3,
        rows=12,
        created_at_ms=1000,
        event_time_ms=900,
        spec="spec",
        program="program",
        salt="salt",
        metrics={"log_loss": 0.5, "auc": float("nan")},
        environment={"tensorflow": "2.21.0"},
    )


def publish(registry: Registry, parent: int | None, epoch: int = 1) -> Manifest:
    return registry.publish(draft(parent, epoch), {SERVING: b"rows of %d" % (parent or 0)})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path)
    made.propose(start(**WHO))
    return made


def started(path: Path, versions: int) -> Registry:
    registry = Registry(path)
    registry.propose(start(**WHO))
    for parent in range(versions):
        publish(registry, parent or None)
    return registry


def test_a_published_version_is_read_back_by_another_process(registry: Registry) -> None:
    first = publish(registry, None)
    second = publish(registry, 1)
    other = Registry(registry.path)
    assert other.versions() == [1, 2]
    assert other.manifest(2) == second
    assert other.read(2, SERVING) == b"rows of 1"
    assert other.chain(2) == (first, [second])
    assert (second.marks, second.metrics) == ({SOURCE: 7}, {"log_loss": 0.5})


def test_a_version_of_another_epoch_is_refused(registry: Registry) -> None:
    publish(registry, None)
    publish(registry, 1)
    registry.propose(roll_back(registry.control() or start(**WHO), 1, Mask.NONE, **WHO))
    with pytest.raises(WrongEpoch, match="control is at epoch 2"):
        publish(registry, 2, epoch=1)
    assert registry.versions() == [1, 2]
    assert not list((registry.path / "tmp").iterdir())


def test_a_rollback_while_a_version_is_written_refuses_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, None)
    operator = Registry(registry.path)
    monkeypatch.setattr(
        killpoints,
        "armed",
        killpoints.parse(
            "publish.written", lambda: print(operator.change(lambda c: roll_back(c, 1, Mask.NONE, **WHO)))
        ),
    )
    with pytest.raises(WrongEpoch):
        publish(registry, 1)
    assert registry.versions() == [1]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]]
)
@pytest.mark.parametrize("name", [SERVING, "manifest.json"])
def test_a_corrupt_version_is_never_loaded_and_is_set_aside_aloud(
    registry: Registry, damage: Callable[[bytes], bytes], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for parent in (None, 1, 2):
        publish(registry, parent)
    path = registry.folder("delta", 3) / name
    path.write_bytes(damage(path.read_bytes()))
    other = Registry(registry.path)
    with pytest.raises(CorruptVersion, match=name):
        other.read(3, SERVING)
    with caplog.at_level(logging.ERROR):
        assert other.newest_good(1) == 2
    assert name in caplog.text and ".bad" in caplog.text
    assert other.versions() == [1, 2]
    assert publish(other, 2).version == 4, "a number is never used twice"


def test_versions_that_only_a_corrupt_one_led_to_are_set_aside_too(registry: Registry) -> None:
    for parent in (None, 1, 2, 3):
        publish(registry, parent)
    (registry.folder("delta", 2) / SERVING).write_bytes(b"spoiled")
    assert Registry(registry.path).newest_good(1) == 1
    assert registry.versions() == [1]


def test_a_corrupt_base_falls_back_to_the_one_before(registry: Registry) -> None:
    for parent in (None, 1, 2):
        publish(registry, parent)
    registry.add_base(registry.manifest(2), {SERVING: b"all"})
    assert [part.version for part in registry.chain(3).deltas] == [3]
    (registry.folder("base", 2) / SERVING).write_bytes(b"spoiled")
    assert registry.newest_good(1) == 3
    assert [part.version for part in registry.chain(3).deltas] == [2, 3]


def test_a_base_stays_readable_as_its_version_when_the_delta_is_removed(registry: Registry) -> None:
    for parent in (None, 1, 2):
        publish(registry, parent)
    registry.add_base(registry.manifest(2), {SERVING: b"all"})
    registry.remove("delta", 2)
    assert registry.versions() == [1, 2, 3]
    assert registry.read(2, SERVING) == b"all"
    assert registry.manifest(2).visible == ((1, 2),)
    with pytest.raises(UnknownVersion, match="use 3"):
        registry.manifest(9)


@given(st.lists(st.one_of(st.just(0), st.integers(1, 30)), min_size=1, max_size=30))
def test_visible_intervals_are_the_ancestors_after_any_rollbacks(plan: list[int]) -> None:
    """0 publishes the next version; another number rolls back to one of those there are."""
    with folder_in_memory() as folder:
        registry = Registry(folder)
        control = registry.propose(start(**WHO))
        parents: dict[int, int | None] = {}
        head: int | None = None
        for number in plan:
            if number == 0 or head is None:
                made = publish(registry, head, control.epoch)
                parents[made.version] = head
                head = made.version
            else:
                head = sorted(parents)[number % len(parents)]
                to = head
                control = registry.change(partial(roll_back, to=to, mask=Mask.NONE, **WHO))
        for version in parents:
            ancestors = set[int]()
            at: int | None = version
            while at is not None:
                ancestors.add(at)
                at = parents[at]
            line = registry.manifest(version).visible
            assert {other for other in parents if sees(line, other)} == ancestors
            assert list(line) == sorted(line, reverse=True)
            base, deltas = registry.chain(version)
            assert {base.version, *(part.version for part in deltas)} == ancestors


def test_proposals_are_exclusive(registry: Registry) -> None:
    control = registry.control()
    assert control is not None
    mine, other = pin(control, 3, **WHO), pin(control, 4, **WHO)
    assert registry.propose(mine) == mine
    with pytest.raises(ControlConflict, match="springtide history"):
        registry.propose(other)
    assert registry.propose(mine) == mine, "again, as after a crash"
    assert registry.controls() == [control, mine]
    assert registry.controls(last=1) == [mine]


def test_a_change_is_repeated_on_the_newest_generation(registry: Registry) -> None:
    other = Registry(registry.path)
    seen: list[int] = []

    def transition(control: Control) -> Control:
        seen.append(control.generation)
        if len(seen) == 1:
            other.change(lambda c: pin(c, 4, **WHO))
        return pin(control, 3, **WHO)

    assert registry.change(transition).serving.version == 3
    assert seen == [1, 2]
    assert registry.change(lambda c: pin(c, 3, **WHO)).generation == 3
    assert registry.change(lambda c: follow(c, **WHO)).generation == 4


def test_a_damaged_control_stops_its_reader(registry: Registry) -> None:
    path = next((registry.path / "control").iterdir())
    path.write_bytes(path.read_bytes().replace(b"because", b"becausf"))
    with pytest.raises(CorruptVersion, match=path.name):
        Registry(registry.path).control()


def test_a_program_and_a_spec_are_checked_when_read(registry: Registry) -> None:
    digest = registry.specs.add_program(b"program")
    assert registry.specs.add_program(b"program") == digest
    assert registry.specs.program(digest) == b"program"
    (registry.path / "programs" / f"{digest}.tflite").write_bytes(b"other")
    with pytest.raises(CorruptVersion, match="digest"):
        registry.specs.program(digest)

    def fill(folder: Path) -> None:
        (folder / "transform").mkdir()
        (folder / "transform" / "graph").write_bytes(b"graph")

    with pytest.raises(SpecMismatch, match="springtide bootstrap"):
        registry.specs.spec("abc")
    assert registry.specs.add_spec("abc", {"salt": "s"}, fill)
    assert not registry.specs.add_spec("abc", {"salt": "t"}, fill)
    assert registry.specs.spec("abc")["salt"] == "s"
    assert (registry.specs.transform("abc") / "graph").read_bytes() == b"graph"
    (registry.path / "specs" / "abc" / "transform" / "graph").write_bytes(b"grapf")
    with pytest.raises(CorruptVersion, match="graph"):
        registry.specs.transform("abc")


def test_what_was_prepared_is_read_in_its_environment_alone_and_undamaged(registry: Registry) -> None:
    environment = {"tensorflow": "2.21.0", "machine": "x86_64"}

    def read(**changes: str) -> bytes | None:
        data = registry.specs.prepared("abc", environment | changes)
        return None if data is None else bytes(data)

    def write_graph(folder: Path, text: str) -> None:
        (folder / "graph").write_text(text)

    for text in ("first", "second"):
        shutil.rmtree(registry.path / "specs" / "abc", ignore_errors=True)
        registry.specs.add_spec("abc", {}, partial(write_graph, text=text))
        assert read() is None, "there is none, or it is of another bootstrap"
        registry.specs.keep_prepared("abc", environment, text.encode())
        assert read() == text.encode() and read(tensorflow="2.22.0") is None
    path = registry.path / "prepared" / "abc"
    for damaged in (path.read_bytes()[:-1] + b"?", b"", b"short"):
        path.write_bytes(damaged)
        assert read() is None
    path.unlink()
    assert read() is None


def test_a_sweep_removes_the_files_of_the_dead_alone(registry: Registry) -> None:
    alive = registry.directory.temporary("version")
    # Release 0.1.0 wrote the time at which the process started.
    former = registry.path / "tmp" / f"base-6~{HOST}@{os.getpid()}@1700000000.25"
    for folder in (alive, former):
        folder.mkdir()
    dead = registry.path / "tmp" / f"base-7~{HOST}@{2**22 + 1}@0.00"
    dead.mkdir()
    assert registry.directory.sweep() == [dead.name]
    assert sorted(dead.parent.iterdir()) == sorted([alive, former])


def test_the_registry_of_release_1_is_still_read(tmp_path: Path) -> None:
    registry = Registry(shutil.copytree(GOLDEN, tmp_path / "registry"))
    assert registry.versions() == [1, 2]
    base, deltas = registry.chain(2)
    assert replace(base, files={}).marks == {SOURCE: 7}
    assert registry.read(deltas[0], SERVING) == b"rows of 1"
    control = registry.control()
    assert control is not None
    assert (control.action, control.mask.users) == ("rollback", MaskedUsers.of([2**64 - 1]))


def test_another_salt_than_that_of_the_registry_is_refused(tmp_path: Path) -> None:
    registry, ours, other = Registry(tmp_path), Salt(b"ours" * 8), Salt(b"other" * 8)
    require_same_salt(registry, ours)
    registry.specs.add_spec("abc", {"salt": ours.fingerprint}, lambda folder: (folder / "transform").mkdir())
    require_same_salt(registry, ours)
    with pytest.raises(SaltMismatch, match=f"{ours.fingerprint}.*{other.fingerprint}"):
        require_same_salt(registry, other)


if __name__ == "__main__" and "--golden" in sys.argv:
    golden = started(GOLDEN, 2)
    golden.change(lambda c: roll_back(c, 1, Mask(users=MaskedUsers.of([2**64 - 1]), times=((1, 2),)), **WHO))


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
def test_a_kill_at_any_step_uses_no_number_twice(tmp_path: Path, point: str) -> None:
    registry = started(tmp_path, 1)
    used = publish_recent(registry, 1).version
    with killed_at(point):
        registry.sweep_recent()
        publish_recent(registry, 1)
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
