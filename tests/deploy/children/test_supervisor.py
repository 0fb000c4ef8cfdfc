"""The supervisor starts again what dies, gives up what keeps dying, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.children.last_words import last_line
from deploy.children.supervisor import MOST_QUICK_DEATHS, Deaths, ProcessPlan, Supervisor
from state.errors import ProcessFailed

DEADLINE_S = 20.0
FOREVER = "import signal, threading; threading.Event().wait()"


def python(name: str, code: str, **more: object) -> ProcessPlan:
    return ProcessPlan(name, (sys.executable, "-c", code), **more)  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    """Polls until `condition`, or fails."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, lines: list[str]) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "logs", os.environ, lines.append)
    yield made
    made.stop_all(hurry=lambda: True)


def test_a_killed_process_is_said_and_started_again(supervisor: Supervisor, lines: list[str]) -> None:
    supervisor.start(python("stream", f"print('reading', flush=True); {FOREVER}"))
    first = supervisor.pid("stream")
    assert first is not None
    until(lambda: last_line(supervisor.log_path("stream")) == "reading")
    os.kill(first, signal.SIGKILL)

    def again() -> bool:
        supervisor.look()
        return supervisor.pid("stream") not in (None, first)

    until(again)
    assert lines == ["stream died (SIGKILL): reading; starting it again in 0.25 s"]


def test_a_process_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path, lines: list[str]) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    supervisor = Supervisor(tmp_path, os.environ, lines.append, clock)
    supervisor.start(python("trainer", "raise SystemExit('no space left')"))

    def given_up() -> bool:
        try:
            supervisor.look()
        except ProcessFailed as error:
            assert "no space left" in str(error)
            assert "5 times in a row" in str(error)
            assert str(tmp_path / "trainer.log") in str(error)
            return True
        return False

    deadline = time.monotonic() + DEADLINE_S
    while not given_up():
        assert time.monotonic() < deadline
        pid = supervisor.pid("trainer")
        if pid is not None:
            psutil.Process(pid).wait(DEADLINE_S)
    assert len(lines) == MOST_QUICK_DEATHS - 1


def test_wrong_use_is_given_up_at_once(supervisor: Supervisor) -> None:
    supervisor.start(python("stream", "raise SystemExit(2)"))

    def given_up() -> bool:
        try:
            supervisor.look()
        except ProcessFailed:
            return True
        return False

    until(given_up)


def test_a_program_that_is_not_lasting_ends_well_and_is_not_started_again(
    supervisor: Supervisor, lines: list[str]
) -> None:
    supervisor.start(python("bootstrap", "pass", lasting=False))

    def done() -> bool:
        supervisor.look()
        return supervisor.done("bootstrap")

    until(done)
    supervisor.look()
    assert supervisor.pid("bootstrap") is None
    assert lines == []


def test_a_program_that_does_not_end_is_killed_after_its_deadline(supervisor: Supervisor, lines: list[str]) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {FOREVER}"
    supervisor.start(python("applier", stubborn, stop_s=0.2))
    pid = supervisor.pid("applier")
    until(lambda: last_line(supervisor.log_path("applier")) == "deaf")
    supervisor.stop("applier")
    assert not psutil.pid_exists(pid or 0)
    assert "applier did not end" in lines[0]


def test_a_stopped_program_is_not_started_again(supervisor: Supervisor, lines: list[str]) -> None:
    supervisor.start(python("stream", FOREVER))
    supervisor.stop("stream")
    supervisor.look()
    assert supervisor.pid("stream") is None
    assert lines == []


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys, time
from deploy.children.supervisor import ProcessPlan, Supervisor
supervisor = Supervisor(pathlib.Path({str(tmp_path)!r}), os.environ, print)
supervisor.start(ProcessPlan("child", (sys.executable, "-c", {FOREVER!r})))
print(supervisor.pid("child"), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()

    # A container's first process may leave the dead child unburied.
    def gone() -> bool:
        try:
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(gone)


def test_a_long_life_clears_the_quick_deaths() -> None:
    deaths = Deaths()
    for _ in range(MOST_QUICK_DEATHS - 1):
        deaths = deaths.after(0.5)
    assert not deaths.hopeless
    assert deaths.after(0.5).hopeless
    assert not deaths.after(3600.0).after(0.5).hopeless


def test_a_log_starts_anew_when_it_is_large(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.children.supervisor.LARGEST_LOG_BYTES", 10)
    log = supervisor.log_path("bootstrap")
    log.write_text("many lines of an earlier run\n")
    supervisor.start(python("bootstrap", "print('new')", lasting=False))
    until(lambda: (supervisor.look(), supervisor.done("bootstrap"))[1])
    assert log.read_text() == "new\n"
    assert "earlier" in (supervisor.logs / "bootstrap.log.1").read_text()
