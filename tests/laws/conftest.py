"""Laws run without garbage collection, which would visit the two million nodes of all sources again and again."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.laws import sources


def pytest_runtest_setup() -> None:
    """Turns garbage collection off; this hook is called for laws only."""
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Drops the nodes and collects garbage again after the last law."""
    if nextitem is None or nextitem.path.parent != Path(__file__).parent:
        sources.tree.cache_clear()
        sources.nodes.cache_clear()
        gc.enable()
