"""Keeps the loop's processes alive: starts, restarts after a death, stops in order.

Every child ends with this process, however that ends: the kernel kills it when
the thread that started it is gone (Linux), so `start` and `look` are for the
main thread only.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.children.last_words import how, last_line
from deploy.children.parent_death import die_with
from state.errors import ProcessFailed

QUICK_S = 20.0
MOST_QUICK_DEATHS = 5
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 5.0
WRONG_USE = 2
LARGEST_LOG_BYTES = 20 * 2**20


@dataclass(frozen=True)
class ProcessPlan:
    """One process of the loop.

    Attributes:
        name: What it is called in messages and the name of its log.
        command: The program and its arguments.
        stop_s: How long it may take to end after SIGTERM.
        lasting: Whether it runs for ever; others end with status 0 when their work is done.
    """

    name: str
    command: tuple[str, ...]
    stop_s: float = 10.0
    lasting: bool = True


@dataclass(frozen=True)
class Deaths:
    """How a process died lately: quick deaths in a row."""

    quick: int = 0

    def after(self, lived_s: float) -> Deaths:
        """The count after a death; a long life clears it.

        >>> Deaths(3).after(1.0), Deaths(3).after(60.0)
        (Deaths(quick=4), Deaths(quick=0))
        """
        return Deaths(self.quick + 1 if lived_s < QUICK_S else 0)

    @property
    def hopeless(self) -> bool:
        """Whether another start is pointless."""
        return self.quick >= MOST_QUICK_DEATHS

    @property
    def wait_s(self) -> float:
        """How long to wait before the next start, doubled by each quick death.

        >>> [Deaths(quick).wait_s for quick in (0, 1, 2, 3, 9)]
        [0.25, 0.25, 0.5, 1.0, 5.0]
        """
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** max(0, self.quick - 1))


@dataclass
class _Child:
    plan: ProcessPlan
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float | None = None
    deaths: Deaths = Deaths()
    done: bool = False


class Supervisor:
    """The processes of one loop.

    Args:
        logs: Directory of the logs; `<name>.log` takes a process's stdout and stderr.
        environment: The processes' environment.
        say: Takes one line for the operator.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        logs: Path,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.logs = logs
        self._environment = dict(environment)
        self._say = say
        self._clock = clock
        self._children: dict[str, _Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, plan: ProcessPlan) -> None:
        """Starts a process; from now on `look` keeps it alive."""
        child = self._children[plan.name] = _Child(plan)
        self._launch(child)

    def look(self) -> None:
        """Takes notice of deaths and starts again what is due; never waits.

        Raises:
            ProcessFailed: A process died too often in a row, or says that it was used wrongly.
        """
        for child in self._children.values():
            process = child.process
            if process is not None and process.poll() is not None:
                self._bury(child, process.returncode)
            if child.start_at is not None and self._clock() >= child.start_at:
                self._launch(child)

    def done(self, name: str) -> bool:
        """Whether a process that is not lasting has ended well."""
        return self._children[name].done

    def pid(self, name: str) -> int | None:
        """The process's id, or None while it does not run."""
        child = self._children.get(name)
        process = child.process if child else None
        return process.pid if process is not None and process.poll() is None else None

    def names(self) -> tuple[str, ...]:
        """The names of all processes started, in order."""
        return tuple(self._children)

    def log_path(self, name: str) -> Path:
        """The process's log file."""
        return self.logs / f"{name}.log"

    def stop(self, name: str, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends a process: SIGTERM, and SIGKILL after its deadline or when `hurry` says so."""
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
        """Ends what still runs, the latest start first."""
        for name in reversed(self.names()):
            self.stop(name, hurry)

    def _launch(self, child: _Child) -> None:
        child.start_at = None
        child.started_at = self._clock()
        path = self.log_path(child.plan.name)
        if path.exists() and path.stat().st_size > LARGEST_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as log:
            child.process = subprocess.Popen(
                child.plan.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # Ctrl-C on the terminal is for the parent, which then stops in order.
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )

    def _bury(self, child: _Child, status: int) -> None:
        child.process = None
        plan = child.plan
        if status == 0 and not plan.lasting:
            child.done = True
            return
        last = last_line(self.log_path(plan.name))
        what = f"{plan.name} died ({how(status)}): {last}"
        child.deaths = child.deaths.after(self._clock() - child.started_at)
        if status == WRONG_USE or child.deaths.hopeless:
            why = "" if status == WRONG_USE else f" {child.deaths.quick} times in a row"
            raise ProcessFailed(
                f"{plan.name} died{why} ({how(status)}): {last}", f"the whole log is {self.log_path(plan.name)}"
            )
        child.start_at = self._clock() + child.deaths.wait_s
        self._say(f"{what}; starting it again in {child.deaths.wait_s:g} s")
