"""What tests of the stream share: a broker of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Broker]:
    """A broker that may die."""
    broker = Broker(tmp_path / "kafka", free_port(), heap_mb=256).start()
    yield broker
    broker.stop()
