"""Claims about the histories: what is read is what was appended, all or nothing, also after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state.errors import CorruptStore
from state.features.spec import EVENT, Events
from state.history.actions import ACTIONS, numbered
from state.history.actions import OTHER as UNKNOWN
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import DATA
from state.positions import Source
from tests.disks import crash

MAP = 64 << 20
SOURCE = Source("ab" * 16, 0)
OTHER = Source("ab" * 16, 1)


def events(count: int, first: int = 0, at_ms: int = 0) -> Events:
    made = np.zeros(count, EVENT)
    made["offset"] = np.arange(first, first + count)
    made["at_ms"] = at_ms + made["offset"]
    return made


def appends(*parts: tuple[int, Events]) -> Appends:
    users = np.repeat([user for user, _ in parts], [len(part) for _, part in parts]).astype(np.uint64)
    return Appends.of(users, np.concatenate([part for _, part in parts]))


def store_at(path: Path, history: int = 32, map_bytes: int = MAP, boot_id: str = "boot-1") -> HistoryStore:
    return HistoryStore(path, history=history, map_bytes=map_bytes, boot_id=boot_id)


def test_equal_histories_have_equal_digests_whatever_the_commits(tmp_path: Path) -> None:
    digests = set()
    for name, cuts in (("one", [100]), ("some", [3, 40, 100]), ("each", list(range(1, 101)))):
        store = store_at(tmp_path / name)
        first = 0
        for cut in cuts:
            store.commit(appends((5, events(cut - first, first))))
            first = cut
        digests.add(store.digest())
        store.close()
    assert len(digests) == 1


def test_another_length_of_history_takes_what_is_there(tmp_path: Path) -> None:
    """A longer one goes on from it; a shorter one reads its last events, and gains as if it had always been short."""
    store = store_at(tmp_path / "store", history=32)
    store.commit(appends((1, events(100)), (2, events(5))))
    store.close()
    store = store_at(tmp_path / "store", history=64)
    # As far as whole chunks go, somewhat more than the former N.
    assert store.read(1)["offset"].tolist() == list(range(64, 100))
    store.commit(appends((1, events(20, 100))))
    assert store.read(1)["offset"].tolist() == list(range(64, 120))
    store.close()
    store = store_at(tmp_path / "store", history=16)
    assert (store.read(1)["offset"].tolist(), len(store.read(2))) == (list(range(104, 120)), 5)
    store.commit(appends((1, events(9, 120)), (2, events(15, 5))))
    assert store.read(1)["offset"].tolist() == list(range(113, 129))
    assert store.read(2)["offset"].tolist() == list(range(4, 20))
    store.close()


def test_actions_keep_their_names_whatever_the_settings_call_them(tmp_path: Path) -> None:
    def read(actions: tuple[str, ...], gains: list[int], before: tuple[str, ...] | None = None) -> list[int]:
        store = store_at(tmp_path / "store", history=32)
        store.numbering, extra = numbered(store.extra(ACTIONS), actions, before)
        store.commit(Appends.none(), (), extra)
        gained = events(len(gains))
        gained["action"] = gains
        store.commit(appends((1, gained)))
        found: list[int] = store.read(1)["action"].tolist()
        store.close()
        return found

    assert read(("view", "cart"), [0, 1, 1]) == [0, 1, 1]
    # Another order, and one more.
    assert read(("cart", "wish", "view"), [1, 2]) == [2, 0, 0, 1, 2]
    # One less: it counts among all actions.
    assert read(("view", "wish"), [1]) == [0, UNKNOWN, UNKNOWN, 1, 0, 1]
    # Back again nothing was lost.
    assert read(("view", "cart"), []) == [0, 1, 1, UNKNOWN, 0, UNKNOWN]


def test_sweeping_removes_only_leading_old_events_and_whole_users(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store", history=64)
    late = events(16, 16)
    late["at_ms"][3] = 10_000
    store.commit(appends((1, np.concatenate([events(16), late, events(8, 32)])), (2, events(5)), (3, events(40, 9000))))
    found = store.ends(0, 2)
    assert (found.users, found.following, found.newest["offset"].tolist()) == ([1, 2], 3, [39, 4])
    assert store.ends(3, 2)[0] == [3]

    def old(events: Events) -> Any:
        return events["at_ms"] <= 100

    assert store.sweep([1, 2], old) == (16 + 5, 1, 0)
    before = (tmp_path / "store" / DATA).read_bytes()
    assert store.sweep([1, 3], old) == (0, 0, 0)
    # Nothing was old, and so nothing is written.
    assert (tmp_path / "store" / DATA).read_bytes() == before
    assert store.read(1)["offset"].tolist() == list(range(16, 40))
    assert (len(store.read(2)), len(store.read(3)), store.users()) == (0, 40, 2)
    # The last N are still counted from the first event ever appended.
    store.commit(appends((1, events(50, 40)), (2, events(1, 7))))
    assert store.read(1)["offset"].tolist() == list(range(26, 90))
    assert (store.read(2)["offset"].tolist(), store.users()) == ([7], 3)
    store.close()


@pytest.mark.parametrize(
    ("clean", "boot", "trusted"), [(b"1", b"before", True), (b"0", b"boot-1", True), (b"0", b"before", False)]
)
def test_the_mark_that_0_1_0_kept_among_the_values_counts_once(
    tmp_path: Path, clean: bytes, boot: bytes, trusted: bool
) -> None:
    store = store_at(tmp_path / "store")
    store.commit(appends((5, events(3))))
    with store._write() as transaction:
        transaction.put(b"clean", clean, db=store._meta)
        transaction.put(b"boot", boot, db=store._meta)
    store.close()
    (tmp_path / "store" / "mark.json").unlink()
    if not trusted:
        with pytest.raises(CorruptStore, match="open when the machine went down"):
            store_at(tmp_path / "store")
        return
    again = store_at(tmp_path / "store")
    assert (len(again.read(5)), again.closed_in_order()) == (3, False)
    crash(again)
    # It was taken over: a kill is a kill, and a power cut is one.
    crash(store_at(tmp_path / "store"))
    with pytest.raises(CorruptStore):
        store_at(tmp_path / "store", boot_id="boot-2")
