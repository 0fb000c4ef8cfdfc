"""What tests of the stream share: compiled kernels."""

from __future__ import annotations

import pytest

from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from streaming.profile import Profiler


@pytest.fixture(scope="session", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiles the kernels once, so that each process only loads them."""
    store = HistoryStore(tmp_path_factory.mktemp("kernels"), map_bytes=1 << 24)
    Profiler(store, FeatureSpec(), cache_users=1)
    store.close()
