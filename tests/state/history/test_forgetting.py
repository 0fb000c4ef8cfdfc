"""What histories forget of an erased user: events and rows that wait up to the place, in the account and in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from state.accounts import StreamAccount
from state.disk.lmdb_store import PAGES_MS
from state.features.erased import Erased, MaskedUsers
from state.features.spec import EVENT, Events
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.history.waiting import WIDTHS, RowFormat, key_of
from state.positions import Range, Source

SOURCE = Source("0000002a" + "0" * 24, 1)
USER, OTHER = 0x1122334455667788, 0x99AABBCCDDEEFF00


def events(*offsets: int) -> Events:
    made = np.zeros(len(offsets), EVENT)
    made["topic"], made["partition"], made["offset"] = SOURCE.topic, 1, offsets
    return made


def filled(path: Path) -> HistoryStore:
    """Forty events of each of two users, and an impression of each that waits."""
    store = HistoryStore(path, history=32, map_bytes=64 << 20)
    users = np.array([USER, OTHER] * 40, np.uint64)
    form = RowFormat({"user": (), "at_ms": ()})
    rows = form.pack({"user": np.array([USER, OTHER], np.uint64), "at_ms": np.zeros(2, np.int64)})
    keys = [key_of(SOURCE, 80), key_of(SOURCE, 81)]
    store.commit(
        Appends.of(users, events(*range(80))),
        [Range(SOURCE, 0, 82, rows=80, opened=2)],
        {WIDTHS: form.to_json()},
        dict(zip(keys, rows, strict=True)),
    )
    return store


def erased(until: int) -> Erased:
    return Erased.NOBODY.and_also(MaskedUsers.of([USER]), [(SOURCE.topic, 1, until)], 2, 3)


def test_events_and_waiting_rows_go_and_the_account_says_so(tmp_path: Path) -> None:
    store = filled(tmp_path)
    other = store.read(OTHER).tobytes()
    assert store.forget(erased(100)).through == 1
    assert (len(store.read(USER)), store.users(), store.waiting_rows()) == (0, 1, 1)
    assert store.read(OTHER).tobytes() == other
    account = StreamAccount.of(store.counts()[SOURCE])
    assert (account.waiting, store.counts()[SOURCE]["dropped"]) == (1, 1)
    digest = store.digest()
    assert store.forget(erased(100)).through == 1 and store.digest() == digest, "once"


def test_what_came_after_the_place_is_a_new_users_history(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.commit(Appends.of(np.array([USER], np.uint64), events(90)), [Range(SOURCE, 82, 91, rows=1, absent=8)])
    store.forget(erased(85))
    assert store.read(USER)["offset"].tolist() == [90]
    store.commit(
        Appends.of(np.array([USER] * 40, np.uint64), events(*range(91, 131))), [Range(SOURCE, 91, 131, rows=40)]
    )
    assert store.read(USER)["offset"].tolist() == list(range(99, 131))


def test_a_store_that_went_back_forgets_the_impressions_that_wait_again(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (value,) = store.waiting_values([key_of(SOURCE, 80)])
    store.forget(erased(100))
    store.commit(Appends.none(), [Range(SOURCE, 82, 83, absent=1)], waiting={key_of(SOURCE, 80): value})
    store.forget(erased(100))
    assert [key for key, _ in store.waiting()] == [key_of(SOURCE, 81)]


def test_the_file_has_no_byte_of_the_pseudonym_once_it_was_written_anew_and_not_too_often(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.sync()
    forms = [USER.to_bytes(8, "big"), USER.to_bytes(8, "little")]

    def has() -> bool:
        data = (tmp_path / "data.mdb").read_bytes()
        return any(form in data for form in forms)

    store.forget(erased(100))
    assert has() and store.forgotten.due_ms() == PAGES_MS
    assert store.compact_if_due(PAGES_MS).pages == 1
    assert not has() and (store.users(), len(store.read(OTHER))) == (1, 32)
    store.forget(erased(100).and_also(MaskedUsers.of([OTHER]), [(SOURCE.topic, 1, 100)], 4, 5))
    assert store.compact_if_due(PAGES_MS + 1).pages == 1
    assert store.compact_if_due(2 * PAGES_MS).pages == 2
    store.close()
