"""A restored serving host begins with the histories of the backup, whatever Kafka still has."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from deploy.backup import serving_start
from deploy.serving.host_files import CLOCK_EXTRA, item_extra, item_value, name_extra
from state.events.identity import load_salt
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.snapshots import SHARED_EXTRAS
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.positions import Range, Source
from tests.deploy.backup.systems import NOW_MS, TOPIC, USERS, System, settings_of, springtide
from tests.deploy.serving.test_clicks import LOG, SOURCE, Following, append, record, written
from tests.deploy.serving.test_snapshots import new_host, taking

NOTED = {
    CLOCK_EXTRA: b'{"event_ms": 5, "accepted_ms": 7}',
    name_extra(7): "caf\u00e9".encode(),
    item_extra(9): item_value(7, b"i9"),
    f"seen:{item_extra(9)}": b"\0\0\0\1",
    "feed": b"\0" * 16,
    "clicked:0": b"one",
}
HOSTS_OWN = {"microbatches": b"{}", "caught_up": b"1"}


def histories(folder: Path) -> HistoryStore:
    return HistoryStore(folder / HISTORIES, 256, 1 << 28, readonly=True)


@pytest.mark.parametrize("words", [[], ["--kafka-lost"]])
def test_histories_and_what_was_noted_are_there_before_anything_is_read(tmp_path: Path, words: list[str]) -> None:
    system = System(tmp_path / "here")
    # The stream's own values, and one row that waits.
    system.commit(Appends.none(), (), {"clock:all": b"1", "spec": b"5" * 64})
    stream = HistoryStore(system.settings.stream_dir / HISTORIES, 256, 1 << 28)
    stream.commit(Appends.none(), waiting={b"a row": b"that waits"})
    stream.close()
    serving = HistoryStore(system.settings.serving_dir / HISTORIES, 256, 1 << 28)
    serving.commit(Appends.none(), (), NOTED | HOSTS_OWN)
    serving.close()
    springtide(system.settings, "backup", str(tmp_path / "backups"), "--with-salt")
    there = settings_of(tmp_path / "there")
    springtide(there, "restore", str(tmp_path / "backups"), *words)
    stream, serving = histories(there.stream_dir), histories(there.serving_dir)
    try:
        assert (serving.digest(), serving.users()) == (stream.digest(), USERS)
        assert serving.positions() == stream.positions() != {}
        assert (serving.waiting_rows(), stream.waiting_rows()) == (0, 1)
        found = dict(serving.extras("", "", 1000))
        shared = {name: found.pop(name) for name in SHARED_EXTRAS & found.keys()}
        assert shared == {name: stream.extra(name) for name in shared}
        assert found == NOTED | {"whole": b"0"}
    finally:
        stream.close()
        serving.close()
    assert sorted(one.name for one in there.serving_dir.iterdir()) == [HISTORIES]


def test_a_machine_that_did_not_serve_gets_none_but_where_nothing_else_has_the_clicks(tmp_path: Path) -> None:
    system, backups = System(tmp_path / "here"), str(tmp_path / "backups")
    springtide(system.settings, "backup", backups, "--with-salt", now_ms=NOW_MS + 100)
    springtide(there := settings_of(tmp_path / "there"), "restore", backups)
    assert not there.serving_dir.exists()
    springtide(again := settings_of(tmp_path / "again"), "restore", backups, "--kafka-lost")
    store = histories(again.serving_dir)
    try:
        # Some clicks have times after the backup: clocks that were ahead.
        assert json.loads(store.extra(CLOCK_EXTRA) or b"") == {"event_ms": NOW_MS + 100, "accepted_ms": NOW_MS + 100}
        assert store.users() == USERS
    finally:
        store.close()


def test_a_restored_machine_that_did_not_serve_reads_a_snapshot_and_the_rest(tmp_path: Path) -> None:
    """The snapshot is in the shared location of the registry, and the log has lost its beginning."""
    system = System(tmp_path / "here")
    flags = ("--paths.shared_registry", str(tmp_path / "shared"), "--kafka.microbatches_topic", LOG)
    salt = load_salt(system.settings.salt_path).fingerprint
    other = Following(tmp_path / "other", written(record(0, 500, salt)), own_salt=salt)
    with taking(settings_of(tmp_path / "elsewhere", *flags), other) as host:
        host.taken(1)
    springtide(system.settings, "backup", str(tmp_path / "backups"), "--with-salt")
    there = settings_of(tmp_path / "there", *flags)
    springtide(there, "restore", str(tmp_path / "backups"), *flags)
    append(other.log, record(500, 700, salt))
    other.drain()
    with other.log.topics() as topics:
        topics.delete_before(LOG, {0: 1})
    store, follower = new_host(there, tmp_path / "new", other)
    assert store.positions() == {SOURCE: 500}
    while follower.step(0.0):
        pass
    assert store.digest() == other.store.digest() and store.positions() == other.store.positions()


def test_a_backup_waits_for_clicks_that_serving_has_not_taken_yet(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path / HISTORIES, 256, 1 << 27)
    source, behind = Source(TOPIC, 0), np.zeros(1, EVENT)
    store.commit(Appends.of(np.ones(1, np.uint64), behind), [Range(source, 0, 1, rows=1)])
    waiting = threading.Thread(target=serving_start.await_clicks, args=(store, {str(source): 2, f"{'cd' * 16}:0": 9}))
    waiting.start()
    waiting.join(4 * serving_start.POLL_S)
    assert waiting.is_alive()
    store.commit(Appends.of(np.ones(1, np.uint64), behind), [Range(source, 1, 2, rows=1)])
    waiting.join(serving_start.WAIT_S / 2)
    assert not waiting.is_alive()
    store.close()
