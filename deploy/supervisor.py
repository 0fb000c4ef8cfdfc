"""Supervises processes: starts them, restarts them, writes their logs, and stops them in order."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from state.config.settings import Settings
from state.errors import (
    ProcessFailed,
    StoreFull,
    UnreachableBroker,
    UnusableDisk,
    UnusablePlace,
    UnusableRegistry,
    reason_of,
)
from state.metrics import SupervisorMetrics
from state.process.part import die_with
from state.process.user_code import for_children
from state.storage import LOGS, kept_bytes

WAITS_FOR_OTHERS = (UnreachableBroker, StoreFull, UnusableDisk, UnusablePlace, UnusableRegistry)
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
LONGEST_WAIT_FOR_OTHERS_S = 4.0
HEALTHY_S = 60.0
TAIL_BYTES = 8192
LONGEST_QUOTE = 300


def end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ends a child and waits for it: SIGTERM, then SIGKILL after the timeout. The child may have ended before."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended; a zombie, which its parent has not waited for, counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def how(status: int) -> str:
    """Describes an exit status.

    >>> how(1), how(-9)
    ('exit 1', 'SIGKILL')
    """
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name


def last_line(log: Path) -> str:
    """Returns the last nonempty line of a log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines: Sequence[str] = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        lines = ()
    return shortened(as_text(next((line.strip() for line in reversed(lines) if line.strip()), "no output")))


def as_text(line: str) -> str:
    """Returns a log line as plain text, also if `logs.format` is json.

    >>> as_text('{"time": "2026-07-03T10:00:00.000Z", "part": "stream", "level": "ERROR", "message": "LockHeld: ..."}')
    'stream ERROR LockHeld: ...'
    >>> as_text("Killed"), as_text("{no json")
    ('Killed', '{no json')
    """
    try:
        entry = json.loads(line)
        return f"{entry['part']} {entry['level']} {entry['message']}"
    except (ValueError, TypeError, KeyError):
        return line


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """Cuts a text to a length that a terminal can show.

    >>> shortened("one two three", 7)
    'one two...'
    """
    return text if len(text) <= most else f"{text[:most].rstrip()}..."


@dataclass(frozen=True)
class Backoff:
    """Consecutive deaths of a process without a healthy run between them.

    Attributes:
        waits_for_others: Whether the process died because a broker, a disk or a store was unavailable. It should run soon
            after that is available again, so its waits are shorter.
    """

    deaths: int = 0
    waits_for_others: bool = False

    def after(self, lived_s: float, last_line: str = "") -> Backoff:
        """Returns the backoff after one more death; after a healthy run it counts as the first.

        Args:
            lived_s: How long the process ran.
            last_line: The last line of its log, which names the class of the error.

        >>> Backoff(3).after(1.0).deaths, Backoff(3).after(60.0).deaths
        (4, 1)
        >>> Backoff().after(1.0, "trainer ERROR UnusableRegistry: registry: Permission denied").waits_for_others
        True
        """
        others = any(f" {error.__name__}: " in last_line for error in WAITS_FOR_OTHERS)
        return Backoff(1 if lived_s >= HEALTHY_S else self.deaths + 1, others)

    @property
    def wait_s(self) -> float:
        """How long to wait before the next start; 0 if there was no death.

        >>> [Backoff(deaths).wait_s for deaths in (0, 1, 2, 3, 7, 8, 99)]
        [0.0, 0.25, 0.5, 1.0, 16.0, 30.0, 30.0]
        >>> Backoff(99, waits_for_others=True).wait_s
        4.0
        """
        if not self.deaths:
            return 0.0
        # The exponent is capped, so that the power cannot overflow after many deaths.
        longest_s = LONGEST_WAIT_FOR_OTHERS_S if self.waits_for_others else LONGEST_WAIT_S
        return min(longest_s, FIRST_WAIT_S * 2.0 ** min(self.deaths - 1, 16))

    def as_text(self) -> str:
        """Describes when the next start is and how often the process died.

        >>> Backoff(1).as_text(), Backoff(3).as_text()
        ('starting it again in 0.25 s', 'starting it again in 1 s, after 3 deaths in a row')
        """
        often = f", after {self.deaths} deaths in a row" if self.deaths > 1 else ""
        return f"starting it again in {self.wait_s:g} s{often}"


LOG_BYTES = 10_000_000
READ_BYTES = 1 << 16
LOG_POLL_S = 0.5
MOST_READS = 64  # in a row, of a child that does not stop
CHILDREN = 16  # that the share of the logs is meant for


def log_bytes(settings: Settings) -> int:
    """Returns the maximum size of one log file, so that all logs and the older file of each fit their storage share.

    >>> from state.config.sections import StorageSettings
    >>> log_bytes(Settings()), log_bytes(Settings(storage=StorageSettings(budget_gb=0.5)))
    (10000000, 625000)
    """
    return min(LOG_BYTES, kept_bytes(settings, LOGS) // (2 * CHILDREN))


class LogFile:
    """The log of one child, and one older file.

    Args:
        most_bytes: Maximum size of one file. A file can be somewhat larger, because data is split only at a line end.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._lost = 0

    def add(self, output: bytes) -> None:
        """Appends a child's output, and rotates the file at a line end if it is full."""
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            if size + len(output) > self._most_bytes and size:
                # The rest of an unfinished line stays in the same file.
                begun = output.find(b"\n") + 1 if not self._ends_a_line() else 0
                self._append(output[:begun])
                output = output[begun:]
                if begun or self._ends_a_line():
                    self._path.replace(self._path.with_suffix(".log.1"))
            self._append(output)
        except OSError:
            self._lost += output.count(b"\n") + 1

    def _append(self, output: bytes) -> None:
        if not output:
            return
        note = f"({self._lost} lines could not be written here)\n".encode() if self._lost else b""
        with self._path.open("ab") as file:
            file.write(note + output)
        self._lost = 0

    def _ends_a_line(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


class LogPump:
    """Reads the pipes of all children into their logs, of at most `most_bytes` each."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def open(self, path: Path) -> int:
        """Returns a descriptor for a child to write its log `path` to; close it once the child has inherited it."""
        # A log that cannot be created prevents the start, instead of failing later.
        path.open("ab").close()
        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        with self._lock:
            self._selector.register(reads, selectors.EVENT_READ, LogFile(path, self._most_bytes))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
                self._thread.start()
        return writes

    def catch_up(self) -> None:
        """Reads everything that the children have written so far; any thread may call it."""
        with self._lock:
            for _ in range(MOST_READS):
                ready = self._selector.select(0)
                if not sum(self._read(key) for key, _ in ready):
                    break

    def _run(self) -> None:
        while True:
            ready = self._selector.select(LOG_POLL_S)
            if ready:
                self.catch_up()

    def _read(self, key: selectors.SelectorKey) -> bool:
        try:
            output = os.read(key.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if output:
            log: LogFile = key.data
            log.add(output)
            return True
        # All writers have closed the pipe.
        self._selector.unregister(key.fd)
        os.close(key.fd)
        return False


WRONG_USE = 2
PROGRESS_S = 5.0
MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
"""Settings of glibc's allocator, unless the caller's environment overrides them: few arenas, large blocks separate.
By default glibc raises these thresholds with the size of freed blocks. The memory of a trainer that copies its tables
then grows for hours."""


@dataclass(frozen=True)
class ProcessPlan:
    """One process of the loop; its log has its name.

    Attributes:
        stop_s: How long it may take to end after SIGTERM.
        lasting: Whether it runs forever; other processes end with status 0 when their work is done.
        remedies: By class of an error in its last log line, the process that must finish before it starts again.
        wanted: For a process that runs only occasionally: returns whether there is work. It starts then, and ends with
            status 0 when the work is done.
    """

    name: str
    command: tuple[str, ...]
    stop_s: float = 10.0
    lasting: bool = True
    remedies: Mapping[str, ProcessPlan] = field(default_factory=dict)
    wanted: Callable[[], bool] | None = None


def environment_of(settings: Settings) -> dict[str, str]:
    """Returns the environment of processes with these settings, and with those of the allocator."""
    environment = {**MALLOC, **os.environ}
    environment = {name: value for name, value in environment.items() if not name.startswith("SPRINGTIDE_")}
    return environment | settings.environment() | {"PYTHONUNBUFFERED": "1"}


@dataclass
class _Child:
    plan: ProcessPlan
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float | None = None
    remedy: ProcessPlan | None = None
    starts: int = 0
    backoff: Backoff = field(default_factory=Backoff)
    done: bool = False
    reported: str = ""
    report_at: float = 0.0


class Supervisor:
    """Supervises the processes of one loop.

    Args:
        logs: Directory of the logs; `<name>.log` receives a process's stdout and stderr.
        most_log_bytes: Maximum size of one log file.
    """

    def __init__(
        self,
        logs: Path,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        metrics: SupervisorMetrics,
        clock: Callable[[], float] = time.monotonic,
        most_log_bytes: int = LOG_BYTES,
    ) -> None:
        self.logs = logs
        self._settled = False
        self._environment = dict(environment)
        self._say = say
        self._metrics = metrics
        self._clock = clock
        self._children: dict[str, _Child] = {}
        self._pump = LogPump(most_log_bytes)
        logs.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(
        cls,
        settings: Settings,
        say: Callable[[str], None],
        metrics: SupervisorMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> Supervisor:
        """Creates a supervisor for these settings, which the processes receive in their environment."""
        environment = for_children(environment_of(settings))
        return cls(settings.logs_dir, environment, say, metrics, clock, log_bytes(settings))

    @property
    def settled(self) -> bool:
        """Whether the whole loop has run once; from then on no failure of one process ends this process."""
        return self._settled

    @settled.setter
    def settled(self, settled: bool) -> None:
        self._settled = settled
        self._metrics.settled.set(settled)

    def start(self, plan: ProcessPlan) -> None:
        """Starts a process; from now on `poll` restarts it after a death."""
        child = self._children[plan.name] = _Child(plan)
        if plan.wanted is None:
            self._launch(child)
        else:
            child.start_at = self._clock()

    def poll(self) -> None:
        """Detects deaths and starts the processes that are due; never blocks.

        Raises:
            ProcessFailed: A process reports wrong usage at its very first start, before the loop ran.
        """
        # The loop can add a remedy to the children.
        for child in list(self._children.values()):
            process = child.process
            if process is not None and process.poll() is not None:
                self._bury(child, process.returncode)
            elif process is not None:
                self._watch(child)
            if child.start_at is not None and self._clock() >= child.start_at and self._may_start(child):
                self._launch(child)

    def done(self, name: str) -> bool:
        """Returns whether a process that is not lasting has ended with status 0."""
        return self._children[name].done

    def pid(self, name: str) -> int | None:
        """Returns the process's id, or None while it does not run."""
        child = self._children.get(name)
        process = child.process if child else None
        return process.pid if process is not None and process.poll() is None else None

    def names(self) -> tuple[str, ...]:
        """Returns the names of all processes, in start order."""
        return tuple(self._children)

    def log_path(self, name: str) -> Path:
        """Returns the path of the process's log file."""
        return self.logs / f"{name}.log"

    def stop(self, name: str, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends a process: SIGTERM, then SIGKILL after its deadline or when `hurry` returns True."""
        child = self._children.pop(name, None)
        process = child.process if child else None
        if child is None or process is None:
            return
        if process.poll() is None:
            process.terminate()
        deadline = self._clock() + child.plan.stop_s
        while self._clock() < deadline and not hurry():
            try:
                process.wait(0.05)
                return
            except subprocess.TimeoutExpired:
                continue
        if process.poll() is None:
            self._say(f"{name} did not end in {child.plan.stop_s:.0f} s and was killed; see {self.log_path(name)}")
            process.kill()
        process.wait()

    def stop_all(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends all processes, the latest started first."""
        for name in reversed(self.names()):
            self.stop(name, hurry)

    def _launch(self, child: _Child) -> None:
        child.start_at, child.started_at = None, self._clock()
        child.starts += 1
        try:
            child.process = self._process(child.plan)
        except OSError as problem:
            # A full disk rejects a new log, and a machine short of resources a new process. Both can recover.
            self._fail(child, f"{child.plan.name} was not started: {reason_of(problem)}")
            return
        self._metrics.starts.labels(child.plan.name).inc()
        self._metrics.deaths_in_a_row.labels(child.plan.name).set(child.backoff.deaths)

    def _process(self, plan: ProcessPlan) -> subprocess.Popen[bytes]:
        log = self._pump.open(self.log_path(plan.name))
        try:
            return subprocess.Popen(
                plan.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # Ctrl-C in the terminal goes to the parent, which then stops the children in order.
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
        finally:
            os.close(log)

    def _last_line(self, name: str) -> str:
        self._pump.catch_up()
        return last_line(self.log_path(name))

    def _watch(self, child: _Child) -> None:
        name, now = child.plan.name, self._clock()
        if child.backoff.deaths and now - child.started_at >= HEALTHY_S:
            self._say(f"{name} has run for {HEALTHY_S:g} s again")
            child.backoff = Backoff()
            self._metrics.deaths_in_a_row.labels(name).set(0)
        if any(other.remedy is child.plan for other in self._children.values()) and now >= child.report_at:
            child.report_at, line = now + PROGRESS_S, self._last_line(name)
            if line != child.reported and child.reported:
                self._say(f"{name}: {line}")
            child.reported = line

    def _may_start(self, child: _Child) -> bool:
        return (child.plan.wanted is None or child.plan.wanted()) and self._is_cured(child)

    def _is_cured(self, child: _Child) -> bool:
        """Whether no remedy is pending; starts the remedy if there is one."""
        if child.remedy is None:
            return True
        cure = self._children.get(child.remedy.name)
        if cure is None:
            self._say(
                f"{child.plan.name} needs {child.remedy.name} first; it begins, log {self.log_path(child.remedy.name)}"
            )
            self.start(child.remedy)
            return False
        if not cure.done:
            return False
        self._say(f"{child.remedy.name}: {self._last_line(child.remedy.name)}")
        del self._children[child.remedy.name]
        child.remedy = None
        return True

    def _bury(self, child: _Child, status: int) -> None:
        child.process = None
        plan = child.plan
        if status == 0 and plan.wanted is not None:
            child.start_at = self._clock()
            return
        if status == 0 and not plan.lasting:
            child.done = True
            self._metrics.deaths_in_a_row.labels(plan.name).set(0)
            return
        last = self._last_line(plan.name)
        if status == WRONG_USE and child.starts == 1 and not self._settled:
            raise ProcessFailed(
                f"{plan.name} died ({how(status)}): {last}", f"the whole log is {self.log_path(plan.name)}"
            )
        child.remedy = next((cure for error, cure in plan.remedies.items() if f" {error}: " in last), None)
        self._fail(child, f"{plan.name} died ({how(status)}): {last}", last)

    def _fail(self, child: _Child, failure: str, last_line: str = "") -> None:
        name = child.plan.name
        child.backoff = child.backoff.after(self._clock() - child.started_at, last_line)
        child.start_at = self._clock() + child.backoff.wait_s
        self._metrics.deaths.labels(name).inc()
        self._metrics.deaths_in_a_row.labels(name).set(child.backoff.deaths)
        self._say(f"{failure}; {child.backoff.as_text()}")
