"""One writer at a place: two at once are refused, the dead are passed over, and who slept too long begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.backup.location import REFRESH_S, STALE_S, Lease
from state.disk.files import HOST
from state.errors import BackupError, LockHeld
from state.file_store import DirectoryStore

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
        with pytest.raises(LockHeld, match=f"of process .* on {HOST}"), Lease(place):
            raise AssertionError("two at once")
        held.require_held()
        assert len(place.names("locks")) == 1
    assert place.names("locks") == []
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
            assert len(place.names("locks")) == 1


def test_a_writer_that_is_looked_after_stays_alive_for_ever(place: DirectoryStore) -> None:
    clock = Clock()
    with Lease(place, clock, ELSEWHERE) as held:
        for _ in range(int(STALE_S / REFRESH_S) + 2):
            clock.now_s += REFRESH_S
            held.refresh()
        with pytest.raises(LockHeld), Lease(place, clock):
            pass


def test_a_writer_that_slept_while_another_came_does_not_go_on(place: DirectoryStore) -> None:
    clock = Clock()
    with Lease(place, clock, ELSEWHERE) as slept:
        clock.now_s += STALE_S + 1
        with Lease(place, clock):
            with pytest.raises(BackupError, match="taken over by another"):
                slept.refresh()
            with pytest.raises(BackupError, match="taken over by another"):
                slept.require_held()


def test_a_file_that_says_nothing_counts_as_a_writer(place: DirectoryStore) -> None:
    place.write("locks/torn.json", b'{"own')
    with pytest.raises(LockHeld, match=r"locks/torn\.json"), Lease(place):
        pass
