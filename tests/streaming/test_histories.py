"""The store of a stream keeps its salt, continues with other features, and is lost if its memory went down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from state.config.sections import StorageSettings
from state.config.settings import Settings
from state.disk.memory_place import MEMORY
from state.errors import SaltMismatch, SpecMismatch
from state.features.spec import FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore, open_history_store
from state.layout import HISTORIES, MARK
from state.registry.registry import Registry
from state.registry.specs import SpecActions
from state.storage.shares import STREAM
from streaming import histories
from streaming.histories import check_identity
from streaming.rebuild import main
from tests.disks import forget_memory

SPEC = FeatureSpec()
KNOWN = SpecActions(Path("nowhere"), SPEC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore(tmp_path, map_bytes=1 << 24)
    yield opened
    opened.close()


def test_another_salt_is_refused(store: HistoryStore) -> None:
    check_identity(store, SPEC, "salt", KNOWN)
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        check_identity(store, SPEC, "pepper", KNOWN)


def test_other_features_take_the_store_over_with_the_names_of_its_actions(store: HistoryStore) -> None:
    check_identity(store, SPEC, "salt", KNOWN)
    other = FeatureSpec(actions=("cart", "view"), windows_s=(60,))
    check_identity(store, other, "salt", SpecActions(Path("nowhere"), other))
    assert store.extra("spec") == other.digest.encode()
    assert store.extra("actions") == b'["view", "favorite", "cart", "purchase"]'


def test_actions_of_a_store_of_0_1_0_are_those_of_the_spec_that_the_registry_knows(
    store: HistoryStore, tmp_path: Path
) -> None:
    store.commit(Appends.none(), (), {"spec": SPEC.digest.encode(), "salt": b"salt"})
    other = FeatureSpec(actions=("cart", "view"))
    with pytest.raises(SpecMismatch, match=r"start the stream once with the former events\.actions"):
        check_identity(store, other, "salt", SpecActions(tmp_path / "nowhere", other))
    registry = Registry(tmp_path / "registry")
    registry.specs.add_spec(SPEC.digest, {"spec": SPEC.to_json()}, lambda folder: None)
    check_identity(store, other, "salt", SpecActions(registry.path, other))
    assert store.extra("actions") == b'["view", "favorite", "cart", "purchase"]'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    plain = Settings()
    return replace(plain, paths=replace(plain.paths, state=str(tmp_path)), storage=StorageSettings(memory_dir=""))


def test_what_is_not_there_yet_or_was_closed_in_order_or_killed_is_not_lost(settings: Settings) -> None:
    folder = settings.stream_dir
    assert not histories.is_lost(folder)
    store = open_history_store(settings, STREAM, folder)
    assert not histories.is_lost(folder), "kill -9 under this start of the machine loses nothing"
    store.close()
    assert not histories.is_lost(folder)


def test_what_was_open_under_another_start_of_the_machine_is_lost(settings: Settings) -> None:
    folder = settings.stream_dir
    open_history_store(settings, STREAM, folder).close()
    (folder / HISTORIES / MARK).write_text(json.dumps({"clean": False, "boot_id": "another"}))
    assert histories.is_lost(folder)


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason=f"{MEMORY} cannot be written here")
def test_what_lay_in_memory_that_is_gone_is_lost(settings: Settings) -> None:
    settings = replace(settings, storage=StorageSettings(memory_dir=MEMORY))
    folder = settings.stream_dir
    store = open_history_store(settings, STREAM, folder)
    if not store.in_memory:
        pytest.skip(f"{MEMORY} has no room here")
    assert not histories.is_lost(folder)
    (folder / HISTORIES).readlink().joinpath("data.mdb").unlink()
    forget_memory(settings.state_dir)
    assert histories.is_lost(folder)


def test_nothing_is_rebuilt_where_nothing_is_lost_and_no_kafka_is_asked(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "127.0.0.1:1"
    words = ["--state", str(settings.state_dir), "--bootstrap-servers", nobody, "--storage.memory_dir="]
    assert main(["--if-lost", *words]) == 0
    assert "nothing is rebuilt" in capsys.readouterr().out
    open_history_store(settings, STREAM, settings.stream_dir).close()
    (settings.stream_dir / HISTORIES / MARK).write_text(json.dumps({"clean": False, "boot_id": "another"}))
    assert main(["--if-lost", *words, "--kafka.request_timeout_s", "0.2"]) == 1, (
        "now it is, and there is no salt either"
    )
