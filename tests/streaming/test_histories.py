"""The store of a stream keeps to its salt and its feature spec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from state.errors import SaltMismatch, SpecMismatch
from state.history.store import HistoryStore
from streaming.histories import check_identity


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    opened = HistoryStore(tmp_path, map_bytes=1 << 24)
    yield opened
    opened.close()


def test_a_store_accepts_what_it_was_filled_with(store: HistoryStore) -> None:
    for _ in range(2):
        check_identity(store, "spec", "salt")


def test_another_salt_is_refused(store: HistoryStore) -> None:
    check_identity(store, "spec", "salt")
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        check_identity(store, "spec", "pepper")


def test_another_spec_is_refused(store: HistoryStore) -> None:
    check_identity(store, "spec", "salt")
    with pytest.raises(SpecMismatch, match=r"put .* back"):
        check_identity(store, "other", "salt")
