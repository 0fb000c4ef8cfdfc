"""What tests of distributed jobs share: an end of what steps opened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streaming.distributed.worker import close_workers


@pytest.fixture(autouse=True)
def workers() -> Iterator[None]:
    """What a test's steps opened in this process ends with it."""
    yield
    close_workers()
