"""Laws run without garbage collection, which would visit the two million nodes of all sources again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.laws import sources


@pytest.fixture(scope="package", autouse=True)
def without_collections() -> Iterator[None]:
    """Collects no garbage until the last law; then drops the nodes."""
    gc.disable()
    yield
    sources.tree.cache_clear()
    sources.nodes.cache_clear()
    gc.enable()
