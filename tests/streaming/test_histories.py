"""The store of a stream keeps to its salt, and goes on with other features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from state.errors import SaltMismatch, SpecMismatch
from state.features.spec import FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.registry.registry import Registry
from state.registry.specs import SpecActions
from streaming.histories import check_identity

SPEC = FeatureSpec()
KNOWN = SpecActions(Path("nowhere"), SPEC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore(tmp_path, map_bytes=1 << 24)
    yield opened
    opened.close()


def test_a_store_accepts_what_it_was_filled_with(store: HistoryStore) -> None:
    for _ in range(2):
        check_identity(store, SPEC, "salt", KNOWN)


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
