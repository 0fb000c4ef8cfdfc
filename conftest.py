"""Speeds up collection, in which each test process imports the whole product."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from _pytest.doctest import DoctestModule

from state.process.environment import freeze_objects


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects tests without garbage collection, because almost all objects created now are kept.

    While tests run, collections ignore these objects too: to visit them takes half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        freeze_objects()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Collects doctests only from files that have examples, because collecting them imports the file."""
    found = yield
    return [one for one in found if not isinstance(one, DoctestModule) or b">>>" in file_path.read_bytes()]
