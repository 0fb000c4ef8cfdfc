"""Labels on a serving host: what they stand for, that their versions stay, and that one that is gone comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.serving.answers.tensor_model import labels_of
from state.registry.control import label
from state.registry.registry import Registry
from tests.deploy.serving.test_following import BY, Clock, World, check


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "serving", Clock(), Registry(tmp_path / "registry"))
    yield made
    made.rows.close()


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
