"""Kill points within the test process: a block ends where a process would be killed, and the test goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from state.process import killpoints


class Killed(BaseException):
    """In place of kill -9."""


@contextmanager
def armed(point: str) -> Iterator[None]:
    """Raises `Killed` where the block reaches a kill point, `name` or `name:count`."""

    def strike() -> None:
        raise Killed

    with mock.patch.object(killpoints, "armed", killpoints.parse(point, strike)):
        yield


@contextmanager
def killed_at(point: str) -> Iterator[None]:
    """Arms a kill point, which the block must reach and end at."""
    with armed(point), pytest.raises(Killed):
        yield
