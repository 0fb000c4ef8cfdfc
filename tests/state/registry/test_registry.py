"""The registry: versions are complete or absent, corrupt ones are never loaded, and descent is right after rollbacks."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
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
from state.registry.control import Control, follow, pin, roll_back, start
from state.registry.manifest import Draft, LogRange, Manifest, sees
from state.registry.model_fit import require_same_salt
from state.registry.registry import SERVING, Registry
from tests.disks import folder_in_memory

WHO = {"actor": "ann", "reason": "because", "now_ms": 5}
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
                control = registry.change(lambda c, to=to: roll_back(c, to, Mask.NONE, **WHO))
        for version in parents:
            ancestors, at = set(), version
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

    for text in ("first", "second"):
        shutil.rmtree(registry.path / "specs" / "abc", ignore_errors=True)
        registry.specs.add_spec("abc", {}, lambda folder, text=text: (folder / "graph").write_text(text))
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
    alive.mkdir()
    dead = registry.path / "tmp" / f"base-7~{HOST}@{2**22 + 1}@0.00"
    dead.mkdir()
    assert registry.directory.sweep() == [dead.name]
    assert list(dead.parent.iterdir()) == [alive]


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
