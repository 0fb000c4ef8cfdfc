"""What tests of commands share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.operate import log_view
from state.registry.control import start
from state.registry.registry import Registry
from tests.deploy.operating import NOW_MS, Operator, draft, files, users_of, written
from tests.memory_log import MemoryLog


@pytest.fixture
def undisturbed_signals() -> Iterator[None]:
    """Puts back the signal handlers that `main` sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> MemoryLog:
    """The log that the operator's versions were learned from."""
    made = written()
    monkeypatch.setattr(log_view, "open_log", lambda settings: made)
    return made


@pytest.fixture(scope="session")
def five_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with versions 1 to 5, which tests copy."""
    registry = Registry(tmp_path_factory.mktemp("versions") / "registry")
    registry.propose(start(actor="trainer", reason="first start", now_ms=NOW_MS - 3_600_000))
    for number in range(1, 6):
        known = {user for one in range(5 * number) for user in users_of(one)}
        registry.publish(draft(number, number - 1 or None), files(known))
    return registry.path


@pytest.fixture
def operator(tmp_path: Path, log: MemoryLog, five_versions: Path) -> Operator:
    """An operator of a registry with versions 1 to 5 and nothing else running."""
    shutil.copytree(five_versions, tmp_path / "registry", symlinks=True)
    return Operator(tmp_path)
