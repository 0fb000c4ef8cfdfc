"""The supervisor starts, restarts and ends processes, and keeps their logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry

from deploy import supervisor as supervising
from deploy.supervisor import LogFile, LogPump, ProcessPlan, Supervisor, last_line
from state.config.loading import load
from state.errors import ProcessFailed
from state.metrics import SupervisorMetrics
from tests.disks import small_disk

DEADLINE_S = 120.0
FOREVER = "import signal, threading; threading.Event().wait()"


def python(name: str, code: str, **more: Any) -> ProcessPlan:
    return ProcessPlan(name, (sys.executable, "-c", code), **more)


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
    made = Supervisor(tmp_path / "logs", os.environ, lines.append, SupervisorMetrics(CollectorRegistry()))
    yield made
    made.stop_all(hurry=lambda: True)


def test_a_killed_process_is_said_and_started_again(supervisor: Supervisor, lines: list[str]) -> None:
    supervisor.start(python("stream", f"print('reading', flush=True); {FOREVER}"))
    first = supervisor.pid("stream")
    assert first is not None
    until(lambda: last_line(supervisor.log_path("stream")) == "reading")
    os.kill(first, signal.SIGKILL)

    def again() -> bool:
        supervisor.poll()
        return supervisor.pid("stream") not in (None, first)

    until(again)
    assert lines == ["stream died (SIGKILL): reading; starting it again in 0.25 s"]


WAITS = "trainer ERROR UnusableRegistry: the registry cannot be read (registry: Permission denied)"


@pytest.mark.parametrize(
    ("last_words", "waits"),
    [("no space left", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]), (WAITS, [0.25, 0.5, 1.0, 2.0, 4.0, 4.0])],
)
def test_a_process_that_keeps_dying_is_started_ever_more_slowly_and_ends_nothing(
    tmp_path: Path, lines: list[str], last_words: str, waits: list[float]
) -> None:
    now, collected = [0.0], CollectorRegistry()
    supervisor = Supervisor(tmp_path, os.environ, lines.append, SupervisorMetrics(collected), lambda: now[0])
    supervisor.start(python("worker", f"print('answering', flush=True); {FOREVER}"))
    supervisor.start(python("trainer", f"raise SystemExit({last_words!r})"))
    healthy = supervisor.pid("worker")
    for number, wait_s in enumerate(waits, 1):
        until(lambda: supervisor.pid("trainer") is None)
        supervisor.poll()
        assert collected.get_sample_value("springtide_up_deaths_in_a_row", {"part": "trainer"}) == number
        # It is not started a moment before its time.
        now[0] += wait_s - 0.01
        supervisor.poll()
        assert collected.get_sample_value("springtide_up_starts_total", {"part": "trainer"}) == number
        now[0] += 0.02
        supervisor.poll()
        assert collected.get_sample_value("springtide_up_starts_total", {"part": "trainer"}) == number + 1
    assert lines[0] == f"trainer died (exit 1): {last_words}; starting it again in 0.25 s"
    assert lines[-1].endswith(f"starting it again in {waits[-1]:g} s, after {len(waits)} deaths in a row")
    assert supervisor.pid("worker") == healthy
    supervisor.stop_all(hurry=lambda: True)


def test_a_healthy_life_is_told_and_begins_the_waits_anew(tmp_path: Path, lines: list[str]) -> None:
    now, collected = [0.0], CollectorRegistry()
    supervisor = Supervisor(tmp_path, os.environ, lines.append, SupervisorMetrics(collected), lambda: now[0])
    supervisor.start(python("stream", FOREVER))
    for _ in range(3):
        pid = supervisor.pid("stream")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: supervisor.pid("stream") is None)
        supervisor.poll()
        now[0] += 5.0
        supervisor.poll()
    assert "after 3 deaths in a row" in lines[-1]
    now[0] += 60.0
    supervisor.poll()
    assert lines[-1] == "stream has run for 60 s again"
    assert collected.get_sample_value("springtide_up_deaths_in_a_row", {"part": "stream"}) == 0
    assert collected.get_sample_value("springtide_up_deaths_total", {"part": "stream"}) == 3
    supervisor.stop_all(hurry=lambda: True)


def test_wrong_use_at_the_very_first_start_is_given_up_at_once(supervisor: Supervisor) -> None:
    supervisor.start(python("stream", "print('kafka.port is no number'); raise SystemExit(2)"))

    def given_up() -> bool:
        try:
            supervisor.poll()
        except ProcessFailed as error:
            assert "kafka.port is no number" in error.what and "stream.log" in error.do
            return True
        return False

    until(given_up)


def test_wrong_use_of_one_part_does_not_end_a_loop_that_ran(tmp_path: Path, lines: list[str]) -> None:
    collected = CollectorRegistry()
    supervisor = Supervisor(tmp_path, os.environ, lines.append, SupervisorMetrics(collected))
    assert collected.get_sample_value("springtide_up_settled") == 0
    supervisor.settled = True
    assert collected.get_sample_value("springtide_up_settled") == 1
    supervisor.start(python("stream", "raise SystemExit(2)"))

    def polled() -> bool:
        supervisor.poll()
        return bool(lines)

    until(polled)
    assert lines[0].startswith("stream died (exit 2)")


def test_an_error_with_a_remedy_gets_it_before_the_next_start(
    supervisor: Supervisor, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How far a remedy is, is told where it takes long.
    monkeypatch.setattr(supervising, "PROGRESS_S", 600.0)
    made = tmp_path / "histories"
    sick = "print('stream ERROR CorruptStore: pages may be missing'); raise SystemExit(1)"
    stream = f"import pathlib\nif not pathlib.Path({str(made)!r}).exists():\n  {sick}\n{FOREVER}"
    # The remedy itself fails once.
    tried = tmp_path / "tried"
    cure = (
        f"import pathlib\ntried = pathlib.Path({str(tried)!r})\nif not tried.exists():\n  tried.touch()\n"
        f"  raise SystemExit('no broker')\npathlib.Path({str(made)!r}).touch()\nprint('500 rows')"
    )
    rebuild = python("rebuild", cure, lasting=False)
    supervisor.start(python("stream", stream, remedies={"CorruptStore": rebuild}))

    def healed() -> bool:
        supervisor.poll()
        return made.exists() and supervisor.pid("stream") is not None

    until(healed)
    assert [line.partition(";")[0] for line in lines] == [
        "stream died (exit 1): stream ERROR CorruptStore: pages may be missing",
        "stream needs rebuild first",
        "rebuild died (exit 1): no broker",
        "rebuild: 500 rows",
    ]
    assert "rebuild" not in supervisor.names()


def test_a_program_that_does_not_end_is_killed_after_its_deadline(supervisor: Supervisor, lines: list[str]) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {FOREVER}"
    supervisor.start(python("applier", stubborn, stop_s=0.2))
    pid = supervisor.pid("applier")
    until(lambda: last_line(supervisor.log_path("applier")) == "deaf")
    supervisor.stop("applier")
    assert not psutil.pid_exists(pid or 0)
    assert "applier did not end" in lines[0]


@pytest.mark.parametrize(("own", "arenas"), [({}, "2"), ({"MALLOC_ARENA_MAX": "7"}, "7")])
def test_processes_are_told_how_to_keep_memory_unless_the_caller_says_otherwise(
    own: dict[str, str], arenas: str, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    settings = load(["--paths.state", str(tmp_path)], env={})
    made = Supervisor.of(settings, lines.append, SupervisorMetrics(CollectorRegistry()))
    made.start(python("stream", f"import os; print(os.environ['MALLOC_ARENA_MAX'], flush=True); {FOREVER}"))
    until(lambda: last_line(made.log_path("stream")) == arenas)
    made.stop_all(hurry=lambda: True)


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys, time
from deploy.supervisor import ProcessPlan, Supervisor
from prometheus_client import CollectorRegistry
from state.metrics import SupervisorMetrics
supervisor = Supervisor(pathlib.Path({str(tmp_path)!r}), os.environ, print, SupervisorMetrics(CollectorRegistry()))
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
            return bool(psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    until(gone)


def test_a_process_whose_log_cannot_be_made_is_started_once_there_is_room(tmp_path: Path, lines: list[str]) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        now = [0.0]
        metrics = SupervisorMetrics(CollectorRegistry())
        supervisor = Supervisor(disk.path / "logs", os.environ, lines.append, metrics, lambda: now[0])
        disk.remount("nr_inodes=2")
        supervisor.start(python("stream", FOREVER))
        assert supervisor.pid("stream") is None
        assert lines == [
            f"stream was not started: {supervisor.log_path('stream')}: No space left on device; starting it again in 0.25 s"
        ]
        disk.remount("nr_inodes=1000")
        now[0] += 0.3
        supervisor.poll()
        assert supervisor.pid("stream") is not None
        supervisor.stop_all(hurry=lambda: True)


def test_one_that_is_wanted_now_and_then_starts_with_its_work_and_ends_with_it(
    supervisor: Supervisor, lines: list[str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    code = f"import pathlib; pathlib.Path({str(work)!r}).unlink()"
    supervisor.start(python("trials", code, wanted=work.exists))
    supervisor.poll()
    assert supervisor._children["trials"].starts == 0
    for times in (1, 2):
        work.touch()

        def is_done(times: int = times) -> bool:
            supervisor.poll()
            return not work.exists() and supervisor.pid("trials") is None

        until(is_done)
        assert supervisor._children["trials"].starts == times
    supervisor.poll()
    assert supervisor._children["trials"].starts == 2 and lines == []


def lines_of(folder: Path, name: str) -> list[str]:
    """All lines of a log, the oldest file first; each file ends a line."""
    files = sorted(folder.glob(f"{name}.log*"), key=lambda one: -int(one.suffix[1:]) if one.suffix != ".log" else 0)
    texts = [one.read_text() for one in files]
    assert all(text.endswith("\n") for text in texts[:-1])
    return "".join(texts).splitlines()


@pytest.mark.parametrize("size", [1, 7, 50, 400])
def test_files_take_turns_between_lines_however_they_come(tmp_path: Path, size: int) -> None:
    log = LogFile(tmp_path / "one.log", 300)
    whole = "".join(f"line {number:05d}\n" for number in range(200)).encode()
    for at in range(0, len(whole), size):
        log.add(whole[at : at + size])
    found = lines_of(tmp_path, "one")
    assert found == whole.decode().splitlines()[-len(found) :]
    sizes = [one.stat().st_size for one in tmp_path.iterdir()]
    assert len(sizes) == 2, "the newest and one older"
    assert max(sizes) <= 300 + max(size, len("line 00000\n"))


def test_what_children_say_at_once_is_in_their_logs_once_they_ended(tmp_path: Path) -> None:
    pump = LogPump(150_000)
    code = "import os, sys\nfor n in range(20000): os.write(1 + n % 2, f'{sys.argv[1]} {n}\\n'.encode())"
    children = []
    for name in ("left", "right"):
        writes = pump.open(tmp_path / f"{name}.log")
        children.append(subprocess.Popen([sys.executable, "-c", code, name], stdout=writes, stderr=writes))
        os.close(writes)
    assert [child.wait(60) for child in children] == [0, 0]
    pump.catch_up()
    for name in ("left", "right"):
        assert lines_of(tmp_path, name) == [f"{name} {number}" for number in range(20_000)]
        assert len(list(tmp_path.glob(f"{name}.log*"))) == 2
    assert [one.name for one in threading.enumerate()].count("logs") >= 1


def test_a_full_disk_holds_no_child_up_and_is_told_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    log = LogFile(path, 1000)
    log.add(b"before\n")
    path.rename(tmp_path / "aside")
    path.mkdir()
    log.add(b"lost\nlost\n")
    path.rmdir()
    (tmp_path / "aside").rename(path)
    log.add(b"after\n")
    assert path.read_text() == "before\n(3 lines could not be written here)\nafter\n"
