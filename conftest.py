"""Speeds up collection, in which each test process imports the whole product."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _pytest.doctest import DoctestModule

from state.process.environment import freeze_objects

ROOT = Path(__file__).parent
LAWS = ROOT / "tests" / "laws"
"""Its files are compiled by the collection of all tests, and by nothing else."""


@contextmanager
def compiled_once(config: pytest.Config) -> Iterator[None]:
    """On a new machine one test process collects first, and compiles all that the others would compile too."""
    if not hasattr(config, "workerinput") or any(LAWS.glob("__pycache__/*.pyc")):
        yield
        return
    folder = os.open(LAWS, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Those that waited collect at the same time.
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collects tests without garbage collection, because almost all objects created now are kept.

    While tests run, collections ignore these objects too: to visit them takes half a second.
    """
    gc.disable()
    try:
        with compiled_once(session.config):
            return (yield)
    finally:
        freeze_objects()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Collects doctests only from files that have examples, because collecting them imports the file."""
    found = yield
    return [one for one in found if not isinstance(one, DoctestModule) or b">>>" in file_path.read_bytes()]
