"""The registry under kills at any step of any change: a version is whole or absent, and what was once there stays as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.process import killpoints
from state.registry.control import Control, roll_back, start
from state.registry.manifest import Draft, LogRange, Manifest
from state.registry.registry import SERVING, TRAINING, Registry
from tests.disks import folder_in_memory
from tests.state.registry.test_registry import SOURCE, WHO
from tests.state.registry.test_registry import draft as some_draft

PUBLISH = ("publish.file", "publish.written", "publish.checked", "publish.renamed", "publish.synced")
CONTROL = ("control.users", "control.written", "control.linked")
_remove = shutil.rmtree

# An operation and where it dies: (kill point or nothing, how often it is passed first).
steps = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from(("", "", *PUBLISH)), st.integers(1, 2)),
    st.tuples(st.just("roll back"), st.sampled_from(("", *CONTROL)), st.integers(0, 30)),
    st.tuples(st.just("compact"), st.sampled_from(("", *PUBLISH)), st.integers(0, 30)),
    st.tuples(st.just("restart"), st.just(""), st.just(0)),
)


class Killed(BaseException):
    """The process is dead: nothing of it runs any more, not even its own clean-up."""


def dies(point: str, count: int, change: Callable[[], object]) -> bool:
    """Makes a change in a process that dies at a kill point; whether it did."""
    dead = []

    def strike() -> None:
        dead.append(True)
        raise Killed

    def remove(path: Path, ignore_errors: bool = False) -> None:
        if not dead:
            _remove(path, ignore_errors)

    armed = killpoints.parse(f"{point}:{count}" if point else "", strike)
    with mock.patch.object(killpoints, "armed", armed), mock.patch.object(shutil, "rmtree", remove):
        try:
            change()
        except Killed:
            return True
    return False


def draft(registry: Registry, control: Control) -> Draft:
    """The next version as a trainer that has just started would make it."""
    newest = registry.newest(control.epoch)
    parent = control.base if newest is None else newest
    offset = 0 if parent is None else registry.manifest(parent).log.next
    return replace(
        some_draft(parent, control.epoch),
        log=LogRange("microbatches", "cd" * 16, 0, offset, offset + 1),
        sources=((SOURCE, 10 * (offset + 1)),),
    )


def files(number: int) -> dict[str, bytes]:
    return {SERVING: b"rows %d" % number, TRAINING: b"slots %d" % number}


@settings(max_examples=25, deadline=None)
@given(plan=st.lists(steps, min_size=1, max_size=12))
def test_a_version_is_whole_or_absent_and_never_changes(plan: list[tuple[str, str, int]]) -> None:
    with folder_in_memory() as path:
        registry = Registry(path)
        registry.propose(start(**WHO))
        seen: dict[tuple[str, int], Manifest] = {}
        generations: list[Control] = []
        for number, (what, point, count) in enumerate(plan):
            control = registry.control()
            assert control is not None
            versions = registry.versions()
            if what == "publish":
                dead = dies(point, count, partial(registry.publish, draft(registry, control), files(number)))
                # It was there from the rename on, and not a moment earlier.
                assert (len(Registry(path).versions()) > len(versions)) == (
                    not dead or point in ("publish.renamed", "publish.synced")
                )
            elif what == "roll back" and versions:
                mask = Mask(users=MaskedUsers.of([number]))
                change = partial(roll_back, to=versions[count % len(versions)], mask=mask, **WHO)
                dead = dies(point, 1, partial(registry.change, change))
                after = Registry(path).control()
                assert after == (control if dead and point != "control.linked" else change(control))
            elif what == "compact" and versions:
                of = registry.manifest(versions[count % len(versions)])
                dead = dies(point, 1, partial(registry.add_base, of, files(number)))
            else:
                dead = False
            if dead or what == "restart":
                registry = Registry(path)
            check(registry, seen, generations)


def check(registry: Registry, seen: dict[tuple[str, int], Manifest], generations: list[Control]) -> None:
    now = {("delta", version): registry.manifest(version, "delta") for version in registry.deltas()}
    now |= {("base", version): registry.manifest(version, "base") for version in registry.bases()}
    assert {key: now.get(key) for key in seen} == seen, "a version that was there changed or went"
    new = {
        version
        for kind, version in now.keys() - seen.keys()
        if (("delta", version) not in seen and ("base", version) not in seen)
    }
    known = {version for _, version in seen}
    assert all(version > max(known, default=0) for version in new), "a number was used again"
    seen |= now
    for made in now.values():
        registry.verify(made)
    for version in registry.versions():
        base, deltas = registry.chain(version)
        # Each delta goes on in the log exactly where its parent ended.
        for parent, delta in zip([base, *deltas], deltas, strict=False):
            assert (delta.parent, delta.log.first) == (parent.version, parent.log.next)
    held = registry.controls()
    assert held[: len(generations)] == generations, "history changed"
    assert [control.generation for control in held] == list(range(1, len(held) + 1))
    generations[:] = held
    control = held[-1]
    assert registry.newest_good(control.epoch) == registry.newest(control.epoch)
