"""What tests of commands share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.operate import control
from state.registry.control import start
from state.registry.registry import Registry
from tests.deploy.operating import NOW_MS, Operator, draft


@pytest.fixture
def undisturbed_signals() -> Iterator[None]:
    """Puts back the signal handlers that `main` sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator of a registry with versions 1 to 5 and nothing else running."""
    monkeypatch.setattr(control, "log_end", lambda settings: 64)
    registry = Registry(tmp_path / "registry")
    registry.propose(start(actor="trainer", reason="first start", now_ms=NOW_MS - 3_600_000))
    for number in range(1, 6):
        registry.publish(draft(number, number - 1 or None), {"serving.safetensors": b"rows"})
    return Operator(tmp_path)
