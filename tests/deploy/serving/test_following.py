"""Versions: the row store converges to control, whatever happened in between, and keeps what labels name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace as changed
from prometheus_client import CollectorRegistry
from safetensors.numpy import save

from deploy.serving.answers.tensor_model import labels_of
from deploy.serving.following.versions import VersionFollower
from deploy.serving.host_files import CONTROL_NOTE, MASK_NOTE
from state.config.sections import Paths, ServingSettings
from state.config.settings import Settings
from state.features.spec import FeatureSpec, Mask
from state.layout import PROGRAMS, ROWS
from state.metrics import ApplierMetrics
from state.positions import Source
from state.registry.control import Decision, follow, label, pin, roll_back, start
from state.registry.manifest import Draft, LogRange, Manifest
from state.registry.registry import SERVING, Registry
from state.rows.store import RowStore

MAP = 1 << 27
SOURCE = Source("ab" * 16, 3)
BY: Decision = {"actor": "ann", "reason": "a test", "now_ms": 1}


@dataclass
class Clock:
    """A wall clock that tests move."""

    now_ms: int = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


@dataclass
class World:
    """A registry with a trainer's and an operator's hands, and a host's applier."""

    path: Path
    clock: Clock
    registry: Registry
    state: dict[int, dict[int, float]] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    recent: set[int] = field(default_factory=set)
    program: str = ""

    def __post_init__(self) -> None:
        self.program = self.registry.specs.add_program(b"a program")
        self.registry.propose(start(**BY))
        self.rows = RowStore(self.path / ROWS, MAP)
        self.restart()

    def restart(self) -> None:
        """The applier begins again on the same stores."""
        self.metrics = ApplierMetrics(CollectorRegistry())
        settings = Settings(
            paths=Paths(state=str(self.path.parent), registry=str(self.registry.path)),
            serving=ServingSettings(keep_s=10.0),
        )
        self.follower = VersionFollower(self.rows, settings, self.metrics, self.clock)

    def publish(self, changes: dict[int, float], parent: int | None = None, removed: tuple[int, ...] = ()) -> Manifest:
        """A version of control's epoch; the first one is a base."""
        control = self.registry.control()
        assert control is not None
        if parent is None:
            parent = self.registry.newest(control.epoch) or control.base
        draft = Draft(
            "base" if parent is None else "delta", control.epoch, parent, LogRange(), ((SOURCE, 1),), 1, 1, 5, 4,
            FeatureSpec().digest, self.program, "salt",
        )  # fmt: skip
        made = self.registry.publish(draft, {SERVING: save(tensors(changes, removed))})
        before = {} if parent is None else self.state[parent]
        self.epochs[made.version] = control.epoch
        self.state[made.version] = {i: v for i, v in before.items() if i not in removed} | changes
        return made

    def publish_recent(self, changes: dict[int, float], removed: tuple[int, ...] = (), durable: bool = False) -> int:
        """A version over the one before it of either lifetime; with `durable` also one over the last durable one."""
        control = self.registry.control()
        assert control is not None
        last, before = self.registry.newest(control.epoch) or control.base, self.registry.latest(control.epoch)
        assert last is not None
        parent = last if before is None else before.version
        draft = Draft(
            "recent", control.epoch, parent, LogRange(), ((SOURCE, 1),), 1, 1, 5, 4, FeatureSpec().digest, self.program,
            "salt",
        )  # fmt: skip
        made = self.registry.publish(draft, {SERVING: save(tensors(changes, removed))})
        now = {i: v for i, v in self.state[parent].items() if i not in removed} | changes
        self.state[made.version], self.epochs[made.version] = now, control.epoch
        if durable:
            was = self.state[last]
            files = {SERVING: save(tensors(now, tuple(i for i in was if i not in now)))}
            self.registry.publish(replace(draft, kind="delta", parent=last), files, made)
        else:
            self.recent.add(made.version)
        return made.version

    def lose_recent(self, count: int) -> None:
        """The oldest recent versions go."""
        for version in self.registry.recents()[:count]:
            self.registry.remove("recent", version)

    def compact(self, version: int) -> None:
        """A base beside the delta."""
        self.registry.add_base(self.registry.manifest(version), {SERVING: save(tensors(self.state[version]))})

    def settle(self) -> None:
        """Rounds until nothing is left to do."""
        while self.follower.step():
            pass
        self.follower.step()

    def served(self) -> tuple[int, dict[int, float]] | None:
        """The version that answers use, and its rows."""
        with self.rows.reader() as reader:
            served = reader.served()
            if served is None:
                return None
            values, known = reader.get("user", range(10), served)
            return served.version, {i: float(values[i][0]) for i in range(10) if known[i]}


def tensors(changes: Mapping[int, float], removed: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "user.ids": np.array(list(changes), np.uint64),
        "user.rows": np.array([[value] * 2 for value in changes.values()], np.float32).reshape(-1, 2),
        "user.removed": np.array(removed, np.uint64),
        "dense.w": np.array([1.0], np.float32),
        "popular": np.array([1], np.uint64),
    }


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "serving", Clock(), Registry(tmp_path / "registry"))
    yield made
    made.rows.close()


def check(world: World, version: int) -> None:
    assert world.served() == (version, world.state[version])


def test_where_recent_versions_went_unseen_durable_ones_lead_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An applier that was away longer than they stay reads nothing twice and says nothing."""
    world.publish({1: 1.0})
    for number in (1, 2, 3):
        world.publish_recent({number: 1.0 + number})
    world.settle()
    check(world, 4)
    for number in range(4, 13):
        world.publish_recent({number % 8: 1.0 + number}, (number % 5,), durable=number % 4 == 0)
    newest = world.publish_recent({0: 9.0})
    world.lose_recent(len(world.registry.recents()) - 2)
    with caplog.at_level(logging.WARNING):
        world.settle()
    check(world, newest)
    assert not caplog.records
    assert world.metrics.applied_versions._value.get() == 4 + 4, "three durable ones and the newest"


def test_where_nothing_recent_leads_on_the_last_durable_version_answers(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where files of recent ones were damaged by a power cut; nothing is said and nothing counted as corrupt."""
    world.publish({1: 1.0})
    world.settle()
    durable = world.publish_recent({2: 2.0}, durable=True)
    world.publish_recent({3: 3.0})
    cut = world.publish_recent({4: 4.0})
    world.publish_recent({5: 5.0})
    (world.registry.folder("recent", cut) / SERVING).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        world.settle()
    check(world, cut - 1)
    world.lose_recent(3)
    world.restart()
    world.settle()
    check(world, cut - 1)
    newer = world.publish_recent({6: 6.0}, durable=True)
    world.settle()
    check(world, newer)
    assert durable < cut
    assert not caplog.records and world.metrics.corrupt_versions._value.get() == 0


def test_recent_versions_go_after_a_moment_and_durable_ones_once_they_are_old(world: World) -> None:
    """Base, pinned and served ones stay; what the follower remembers of versions is what is stored."""
    world.follower._keep_ms = 60_000
    base = world.publish({1: 1.0}).version
    pinned = world.publish({2: 2.0}).version
    world.settle()
    for number in range(100):
        world.clock.now_ms += 1000
        world.publish_recent({number % 10: float(number)}, durable=number % 10 == 9)
        world.settle()
        world.follower.sweep()
        if number == 5:
            world.registry.change(lambda control: pin(control, pinned, **BY))
            world.settle()
            world.registry.change(lambda control: follow(control, **BY))
            world.settle()
            world.registry.change(lambda control: changed(control, base=base, generation=control.generation + 1))
        world.lose_recent(max(0, len(world.registry.recents()) - 15))
    with world.rows.reader() as reader:
        ages = {one.version: world.clock.now_ms - one.applied_at_ms for one in reader.versions()}
    durable = {*world.registry.versions()}
    assert base in ages and pinned not in ages
    ages.pop(base)
    assert max(age for version, age in ages.items() if version in durable) in range(50_000, 71_000)
    assert max(age for version, age in ages.items() if version not in durable) <= 20_000
    assert {*world.follower._present} == {base, *ages}
    newest = max(ages)
    check(world, newest)
    world.follower.sweep()
    assert world.rows.entries() == len({row for version in (base, *ages) for row in world.state[version].items()})


def test_mask_and_pin_of_a_rollback_come_together(world: World) -> None:
    good = world.publish({1: 1.0}).version
    world.publish({1: 666.0})
    world.settle()
    mask = Mask(2, times=((5, 9),))
    world.registry.change(lambda control: roll_back(control, good, mask, **BY))
    world.follower.step()
    check(world, good)
    with world.rows.reader() as reader:
        assert json.loads(reader.note(CONTROL_NOTE) or b"")["generation"] == 2
        assert Mask.from_bytes(reader.note(MASK_NOTE) or b"").times == ((5, 9),)


def test_a_pin_to_a_swept_version_is_rebuilt_while_answers_go_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    versions = [world.publish({1: 0.0, 9: 9.0}).version]
    for number in range(1, 6):
        versions.append(world.publish({1: float(number)}, removed=(9,) if number == 3 else ()).version)
        world.settle()
        world.clock.now_ms += 8_000
    world.clock.now_ms += 20_000
    world.follower.sweep()
    with world.rows.reader() as reader:
        assert reader.version(versions[1]) is None
    world.registry.change(lambda control: pin(control, versions[1], **BY))
    seen = set()
    with caplog.at_level(logging.INFO):
        more = True
        while more:
            more = world.follower.step()
            now = world.served()
            assert now is not None and now[1] == world.state[now[0]]
            seen.add(now[0])
    check(world, versions[1])
    assert seen <= {versions[-1], versions[1]}
    assert "is rebuilt from the registry" in caplog.text
    world.registry.change(lambda control: follow(control, **BY))
    world.settle()
    check(world, versions[-1])


def test_a_corrupt_version_is_not_served_and_a_newer_base_goes_past_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The last good version answers; one line says why; the base after it ends that."""
    good = world.publish({1: 1.0}).version
    world.settle()
    bad = world.publish({2: 2.0})
    after = world.publish({3: 3.0}).version
    file = world.registry.folder("delta", bad.version) / SERVING
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            world.settle()
            world.clock.now_ms += 700
    check(world, good)
    assert len(caplog.records) == 1 and f"version {good} continues to answer" in caplog.text
    assert world.metrics.corrupt_versions._value.get() == 1
    world.compact(after)
    world.clock.now_ms += 2_000
    world.settle()
    check(world, after)


def test_a_wall_clock_set_back_delays_no_version(world: World) -> None:
    world.publish({1: 1.0})
    world.settle()
    bad = world.publish({2: 2.0})
    file = world.registry.folder("delta", bad.version) / SERVING
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    world.settle()
    file.write_bytes(data)
    world.clock.now_ms -= 3_600_000
    world.settle()
    check(world, bad.version)


def test_a_damaged_manifest_is_passed_over(world: World) -> None:
    good = world.publish({1: 1.0}).version
    bad = world.publish({2: 2.0}).version
    (world.registry.folder("delta", bad) / "manifest.json").write_bytes(b"{}")
    world.settle()
    check(world, good)


def test_a_missing_program_keeps_the_old_version(world: World) -> None:
    good = world.publish({1: 1.0}).version
    world.settle()
    world.program = "0" * 64
    world.publish({1: 2.0})
    world.settle()
    check(world, good)


def test_a_damaged_copy_of_a_program_is_copied_again(world: World) -> None:
    world.publish({1: 1.0})
    world.settle()
    copy = world.path / PROGRAMS / f"{world.program}.tflite"
    copy.write_bytes(b"a progrm")
    world.restart()
    world.publish({1: 2.0})
    world.settle()
    assert copy.read_bytes() == b"a program"


ACTIONS = ("publish", "remove", "compact", "pin", "roll back", "follow", "restart", "sweep", "expire")
OF_RECENT_ONES = ("recent", "recent", "recent", "both", "lose recent", "kill")
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("publish", *ACTIONS, *OF_RECENT_ONES)),
        st.integers(0, 20),
        st.integers(0, 9),
    ),
    max_size=25,
)


def led(world: World, epoch: int, before: int | None) -> tuple[int | None, int | None]:
    """The newest version of an epoch, and the one that recent ones lead to it from: the one of before, where they pass it."""
    newest = world.registry.latest(epoch)
    at = newest
    while at is not None and at.kind == "recent" and at.version not in world.registry.versions():
        assert newest is not None and at.parent is not None
        if at.version == before:
            return newest.version, before
        if at.parent not in world.registry.recents():
            return newest.version, at.parent
        at = world.registry.either(at.parent)
    return (None, None) if newest is None or at is None else (newest.version, at.version)


@given(operations=OPERATIONS)
@example(operations=[("recent", 0, 0), ("recent", 0, 0), ("lose recent", 0, 1), ("recent", 0, 0)])
def test_whatever_happens_the_wanted_version_is_served_whole(
    operations: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("world")
    world = World(path / "serving", Clock(), Registry(path / "registry"))
    world.publish({0: 0.5})
    for name, number, identity in operations:
        versions = world.registry.versions()
        version = versions[number % len(versions)]
        match name:
            case "publish":
                world.publish({identity: float(number)})
            case "remove":
                world.publish({}, removed=(identity,))
            case "compact":
                world.compact(version)
            case "pin":
                world.registry.change(partial(pin, version=version, **BY))
            case "roll back":
                world.registry.change(partial(roll_back, to=version, mask=Mask.NONE, **BY))
            case "follow":
                world.registry.change(lambda control: follow(control, **BY))
            case "restart":
                world.restart()
            case "recent":
                world.publish_recent({identity: float(number)}, (identity + 1,) if number % 3 == 0 else ())
            case "both":
                world.publish_recent({identity: float(number)}, durable=True)
            case "lose recent":
                world.lose_recent(identity)
            case "kill":
                world.registry.sweep_recent()
            case "expire":
                bases = world.registry.bases()
                for delta in world.registry.deltas():
                    if delta <= bases[-1] and delta not in bases:
                        world.registry.remove("delta", delta)
            case _:
                world.clock.now_ms += 3_000 * identity
                world.follower.sweep()
        before = world.served()
        world.settle()
        now = world.served()
        control = world.registry.control()
        assert control is not None and now is not None
        assert now[1] == world.state[now[0]]
        if control.serving.mode == "pin":
            wanted = control.serving.version
        else:
            wanted = world.registry.newest(control.epoch) or control.base
            newest, begin = led(world, control.epoch, None if before is None else before[0])
            if before is not None and newest is not None and begin == before[0] != wanted:
                assert now[0] == newest
                continue
            if newest is not None and begin in world.registry.versions():
                wanted = newest
            if before is not None and before[0] > (wanted or 0) and world.epochs[before[0]] == control.epoch:
                # A recent version answers on while its epoch has none that is newer.
                wanted = before[0]
        # A version that retention has taken from the registry may be unreachable: then the old one stays.
        reachable = True
        try:
            world.registry.chain(world.registry.newest(control.epoch) or 0 if wanted in world.recent else wanted or 0)
        except Exception:  # noqa: BLE001
            reachable = False
        assert now[0] == wanted or (not reachable and before is not None and now[0] == before[0])
    world.rows.close()


def follow_some(world: World) -> list[int]:
    """Six versions, each some seconds after the one before, of which each changes a row and the fourth removes one."""
    versions = [world.publish({1: 0.0, 9: 9.0}).version]
    world.settle()
    for number in range(1, 6):
        world.clock.now_ms += 8_000
        versions.append(world.publish({1: float(number)}, removed=(9,) if number == 3 else ()).version)
        world.settle()
    return versions


def labels(world: World) -> dict[str, int]:
    with world.rows.reader() as reader:
        return labels_of(reader)


def rows_of(world: World, version: int) -> dict[int, float] | None:
    """What a version that is here has; None where it is not."""
    with world.rows.reader() as reader:
        found = reader.version(version)
        if found is None:
            return None
        values, known = reader.get("user", range(10), found)
        return {i: float(values[i][0]) for i in range(10) if known[i]}


def sweep_all(world: World) -> None:
    world.clock.now_ms += 60_000
    world.follower.sweep()
    while world.rows.tidy():
        pass


def test_stable_and_previous_are_what_answers_and_what_did_where_nobody_says(world: World) -> None:
    assert labels(world) == {}
    versions = follow_some(world)
    assert labels(world) == {"stable": versions[-1], "previous": versions[-2]}
    sweep_all(world)
    assert rows_of(world, versions[-2]) == world.state[versions[-2]]
    world.registry.change(lambda control: label(control, "stable", versions[0], **BY))
    world.settle()
    assert labels(world) == {"stable": versions[0], "previous": versions[-2]}


def test_a_labelled_version_stays_until_the_label_is_taken_away(world: World) -> None:
    versions = follow_some(world)
    world.registry.change(lambda control: label(control, "canary", versions[4], **BY))
    world.settle()
    sweep_all(world)
    assert rows_of(world, versions[4]) == world.state[versions[4]]
    check(world, versions[-1])
    newest = world.publish({2: 2.0}).version
    world.settle()
    newer = world.publish({2: 3.0}).version
    world.settle()
    world.registry.change(lambda control: label(control, "canary", None, **BY))
    world.settle()
    sweep_all(world)
    assert rows_of(world, versions[4]) is None and labels(world) == {"stable": newer, "previous": newest}


def test_a_labelled_version_that_is_gone_is_brought_again_while_answers_go_on(world: World) -> None:
    """From the registry's chain into a lane of its own; what came of it stays right for both, also after the next version."""
    versions = follow_some(world)
    sweep_all(world)
    assert rows_of(world, versions[1]) is None
    world.registry.change(lambda control: label(control, "canary", versions[1], **BY))
    more = True
    while more:
        more = world.follower.step()
        check(world, versions[-1])
    world.follower.step()
    assert rows_of(world, versions[1]) == world.state[versions[1]]
    newest = world.publish({3: 3.0}).version
    world.settle()
    check(world, newest)
    sweep_all(world)
    assert rows_of(world, versions[1]) == world.state[versions[1]]
    check(world, newest)


def test_a_label_of_a_version_that_cannot_be_had_holds_up_nothing(world: World) -> None:
    """Others are brought, and newer versions followed; it is tried again, not at once."""
    versions = follow_some(world)
    sweep_all(world)
    world.registry.remove("delta", versions[1])
    world.registry.change(lambda control: label(control, "a", versions[1], **BY))
    world.registry.change(lambda control: label(control, "b", versions[0], **BY))
    world.settle()
    newest = world.publish({3: 3.0}).version
    world.settle()
    check(world, newest)
    assert rows_of(world, versions[0]) == world.state[versions[0]]
    assert rows_of(world, versions[1]) is None
