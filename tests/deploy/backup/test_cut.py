"""What a backup takes of a running system, and who may write one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.backup import making as cutting
from deploy.backup.location import REFRESH_S, STALE_S, Lease
from deploy.backup.making import Scope, chain_of, cut, make, newest_whole
from state.disk.files import HOST
from state.errors import BackupError, LockHeld
from state.features.mask import Mask
from state.file_store import DirectoryStore, open_store
from state.registry import manifest
from state.registry.control import pin, roll_back
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, Registry
from tests.deploy.backup.systems import NOW_MS, System
from tests.state.registry.hosts import CopyHost, Origin
from tests.state.registry.test_registry import WHO, draft, publish, started


def merged(registry: Registry, version: int, parent: int) -> Manifest:
    """A delta in one piece since an older version, as the compactor makes it."""
    of = registry.manifest(version, "delta")
    made = manifest.complete(
        draft(parent), version, registry.manifest(parent).visible, {SERVING: b"%d since %d" % (version, parent)}
    )
    found = replace(made, kind="merged", visible=of.visible)
    registry.add(found, {SERVING: b"%d since %d" % (version, parent)})
    return found


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], behind: str = "list_folders") -> None:
    """Does `act` once, behind the first look at the directories, or at the other files."""
    look, acted = getattr(cutting, behind), list[bool]()

    def looked(*arguments: Any) -> Any:
        found = look(*arguments)
        if not acted:
            acted.append(True)
            act()
        return found

    monkeypatch.setattr(cutting, behind, looked)


def folders(found: cutting.RegistryCut) -> set[str]:
    return set(found.parts)


def test_the_cut_is_what_there_is(tmp_path: Path) -> None:
    registry = started(tmp_path, 3)
    (tmp_path / "versions" / "000000000002.bad").mkdir()
    found = cut(registry)
    assert folders(found) == {"bases/000000000001", "versions/000000000002", "versions/000000000003"}
    assert found.files == ("control/00000001.json",)


@pytest.mark.parametrize("behind", ["list_folders", "list_files"])
def test_deltas_that_are_merged_meanwhile_are_taken_in_their_new_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    registry = started(tmp_path, 4)

    def compact() -> None:
        merged(registry, 4, 1)
        for version in (2, 3):
            registry.remove("delta", version)

    meanwhile(monkeypatch, compact, behind)
    found = cut(Registry(tmp_path))
    assert folders(found) == {
        "bases/000000000001",
        "merged/000000000004-000000000001",
        "versions/000000000004",
    }
    assert chain_of(found.parts, 4) == {"bases/000000000001", "merged/000000000004-000000000001"}


def test_a_rollback_meanwhile_is_in_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = started(tmp_path, 3)

    def turn() -> None:
        registry.change(lambda now: roll_back(now, 2, Mask.NONE, **WHO))
        publish(registry, 2, epoch=2)

    meanwhile(monkeypatch, turn)
    found = cut(Registry(tmp_path))
    assert (found.control.epoch, found.control.base) == (2, 2)
    assert found.files == ("control/00000001.json", "control/00000002.json")
    whole = newest_whole(found.parts, found.control)
    assert whole is not None and whole.version == 4


def test_control_behind_the_cut_is_not_in_it(tmp_path: Path) -> None:
    registry = started(tmp_path, 2)
    registry.change(lambda now: pin(now, 1, **WHO))
    assert cutting.list_files(tmp_path, 1) == ("control/00000001.json",)


def test_a_chain_leads_where_the_registry_leads(tmp_path: Path) -> None:
    registry = started(tmp_path, 6)
    for version, parent in ((4, 1), (4, 2), (6, 4)):
        merged(registry, version, parent)
    shutil.rmtree(registry.folder("delta", 3))
    registry = Registry(tmp_path)
    found = cut(registry)
    for version in (1, 2, 4, 5, 6):
        base, deltas = registry.chain(version)
        wanted = {registry.folder_of(one).relative_to(tmp_path).as_posix() for one in (base, *deltas)}
        assert chain_of(found.parts, version) == wanted
    assert chain_of(found.parts, 3) is None
    assert chain_of({name: one for name, one in found.parts.items() if one.kind != "base"}, 6) is None


def test_what_the_compactor_takes_away_while_it_is_copied_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(tmp_path / "here")
    opened = Path.open
    gone: list[str] = []

    def vanishing(path: Path, *arguments: Any, **named: Any) -> Any:
        if not gone and "versions" in path.parts:
            gone.append(path.as_posix())
            merged(system.registry, 2, 1)
            system.registry.remove("delta", 2)
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", vanishing)
    made = make(system.settings, open_store(str(tmp_path / "to")), Scope(), NOW_MS, lambda more: None)
    assert "versions/000000000002" in gone[0]
    paths = [one.path for one in made.files]
    assert "registry/merged/000000000002-000000000001/manifest.json" in paths
    assert not [one for one in paths if "versions/000000000002" in one]
    assert made.version == 4


def test_versions_that_a_copy_of_a_shared_registry_has_not_read_yet_are_fetched(tmp_path: Path) -> None:
    url = str(tmp_path / "shared")
    origin = Origin(tmp_path / "trainer", url)
    for parent in (None, 1, 2):
        origin.publish(parent)
    origin.send()
    host = CopyHost(tmp_path / "host", url, open_store(url))
    host.look()
    found = cut(host.registry)
    assert (found.parts, found.damaged) == (cut(origin.registry).parts, {})
    assert newest_whole(found.parts, found.control) == origin.registry.manifest(3)


def test_a_registry_without_control_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="no control yet"):
        cut(Registry(tmp_path))


DEAD = f"{HOST}@{2**22 + 1}@0.00"
ELSEWHERE = "another-host@7@0.00"


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def place(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def test_a_second_writer_is_refused_and_leaves_nothing(place: DirectoryStore) -> None:
    with Lease(place) as held:
        with pytest.raises(LockHeld, match=f"process .* on {HOST} writes there"), Lease(place):
            raise AssertionError("two at once")
        held.renew()
    assert place.names("") == []
    with Lease(place):
        pass


@pytest.mark.parametrize(("owner", "silent_s", "lives"), [
    (DEAD, 0.0, False), (ELSEWHERE, STALE_S - 1, True), (ELSEWHERE, STALE_S + 1, False),
])  # fmt: skip
def test_a_writer_counts_as_long_as_it_may_live(
    place: DirectoryStore, owner: str, silent_s: float, lives: bool
) -> None:
    clock = Clock()
    # Killed: its file stays.
    Lease(place, clock, owner).__enter__()
    clock.now_s += silent_s
    if lives:
        with pytest.raises(LockHeld), Lease(place, clock):
            pass
    else:
        with Lease(place, clock):
            pass


def test_a_writer_that_is_looked_after_stays_alive_and_one_that_slept_does_not_go_on(place: DirectoryStore) -> None:
    clock = Clock()
    with Lease(place, clock, ELSEWHERE) as slept:
        for _ in range(int(STALE_S / REFRESH_S) + 2):
            clock.now_s += REFRESH_S
            slept.refresh()
        with pytest.raises(LockHeld), Lease(place, clock):
            pass
        clock.now_s += STALE_S + 1
        with Lease(place, clock) as other:
            for renew in (slept.refresh, slept.renew):
                with pytest.raises(BackupError, match="taken over by another"):
                    renew()
            other.renew()
