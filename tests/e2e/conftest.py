"""One running loop for all end-to-end tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.running import Loop


@pytest.fixture
def loop(one_loop: Loop) -> Loop:
    """The loop, running; it is started again where a test failed and left it stopped."""
    if not one_loop.running:
        one_loop.start()
    return one_loop


@pytest.fixture(scope="session")
def one_loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A running loop; a test leaves it running and following."""
    made = Loop(tmp_path_factory.mktemp("e2e"))
    made.start()
    yield made
    left = made.processes()
    made.stop(signal.SIGTERM)
    for process in psutil.wait_procs(left, timeout=10)[1]:
        process.kill()
