"""One run of the local cluster, from its configuration to the last stop.

1. Writes the configuration. 2. Starts JobManager, workers, TaskManagers and job
server at once. 3. Waits until all of them can be used. 4. Keeps them alive until
it is asked to stop: jobs end by savepoint then, and after them the processes,
the latest first.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

import deploy
from deploy.children.last_words import last_line
from deploy.children.log_files import log_sizes
from deploy.children.supervisor import MALLOC, Supervisor
from deploy.flink import jars
from deploy.flink.configuration import (
    ARTIFACTS,
    CHECKPOINTS,
    CONFIGURATION,
    HOST,
    LOGS,
    SAVEPOINTS,
    TEMPORARY,
    configuration,
)
from deploy.flink.emptied import empty
from deploy.flink.ending import end_jobs
from deploy.flink.process_plan import JOB_MANAGER, JOB_SERVER, TASK_MANAGER, WORKERS, process_plans
from deploy.kafka.configuration import free_port, listens
from state.config.settings import Settings
from state.errors import FlinkFailed, reason_of
from state.flink.rest import JobManager, url
from state.metrics import SupervisorMetrics

START_S = 180.0
LOOK_S = 0.1
REMIND_S = 30.0


class Cluster:
    """The local cluster; who runs it holds the lock of its directory.

    Args:
        settings: Of the cluster, and of the stream whose workers run in it.
        say: Takes a line for the operator.
        stop: Whether the operator asked to stop.
        hurry: Whether the operator asked again.
        clock: Monotonic seconds.
        sleep: Waits a number of seconds, or until a signal.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        stop: Callable[[], bool],
        hurry: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._say = settings, say
        self._stop, self._hurry = stop, hurry
        self._clock, self._sleep = clock, sleep
        self.directory = settings.flink_dir.absolute()
        self._manager = JobManager(url(settings))

    def run(self, jar: Path) -> int:
        """Goes up, watches, and stops when asked to; returns the exit code.

        Args:
            jar: What all of Java runs from.

        Raises:
            SpringtideError: It cannot be started; nothing of it runs then.
        """
        begin = self._clock()
        # 1.
        self._prepare()
        supervisor = self._supervisor()
        try:
            # 2.
            for plan in process_plans(self._settings.flink, self.directory, jar, jars.java()):
                supervisor.start(plan)
            # 3.
            if self._is_up(supervisor):
                supervisor.settled = True
                self._say_what_runs(self._clock() - begin)
            # 4.
            while not self._stop():
                supervisor.look()
                self._sleep(LOOK_S)
        finally:
            self._come_down(supervisor)
        return 0

    def _prepare(self) -> None:
        try:
            # Each process empties its own place; those of more TaskManagers than there are now would stay.
            for name in (TEMPORARY, ARTIFACTS):
                empty(self.directory / name)
            for name in (CONFIGURATION, CHECKPOINTS, SAVEPOINTS):
                (self.directory / name).mkdir(exist_ok=True)
            text = configuration(self._settings.flink, self.directory, free_port())
            (self.directory / CONFIGURATION / "config.yaml").write_text(text, encoding="utf-8")
        except OSError as problem:
            raise FlinkFailed(
                f"Flink was not started ({reason_of(problem)})",
                f"free some space, or correct the access rights of {self.directory}",
            ) from problem

    def _supervisor(self) -> Supervisor:
        """Keeps the processes alive; workers find the settings in their environment, and the release and its Python first."""
        environment = {**MALLOC, **os.environ}
        environment = {name: value for name, value in environment.items() if not name.startswith("SPRINGTIDE_")}
        environment |= self._settings.environment() | {"PYTHONUNBUFFERED": "1"}
        release = str(Path(deploy.__path__[0]).parent)
        for name, first in (("PYTHONPATH", release), ("PATH", str(Path(sys.executable).parent))):
            environment[name] = os.pathsep.join(filter(None, [first, environment.get(name)]))
        metrics, sizes = SupervisorMetrics(CollectorRegistry()), log_sizes(self._settings)
        return Supervisor(self.directory / LOGS, environment, self._say, metrics, self._clock, *sizes)

    def _is_up(self, supervisor: Supervisor) -> bool:
        """Returns True once a job can be handed in, False where the operator stops it before.

        Raises:
            FlinkFailed: That takes too long.
        """
        deadline, remind = self._clock() + START_S, self._clock() + REMIND_S
        while missing := self._missing():
            if self._stop():
                return False
            supervisor.look()
            if self._clock() >= deadline:
                log = supervisor.log_path(missing)
                raise FlinkFailed(f"{missing} did not come up in {START_S:.0f} s", f"see {log}: {last_line(log)}")
            if self._clock() >= remind:
                remind = self._clock() + REMIND_S
                self._say(f"still waiting for {missing}; see {supervisor.logs}")
            self._sleep(LOOK_S)
        return True

    def _missing(self) -> str:
        """The first process that cannot be used yet; empty where all can."""
        settings = self._settings.flink
        if not self._manager.answers():
            return JOB_MANAGER
        there = self._manager.overview().task_managers
        if there < settings.task_managers:
            return f"{TASK_MANAGER}-{there + 1}"
        if not listens(settings.worker_port):
            return WORKERS
        return "" if listens(settings.job_port) else JOB_SERVER

    def _say_what_runs(self, took_s: float) -> None:
        settings = self._settings.flink
        slots = settings.task_managers * settings.slots
        self._say(
            f"Flink runs after {took_s:.1f} s: JobManager on {self._manager.url}, {slots} slots, "
            f"job server on {HOST}:{settings.job_port}, Python workers on {HOST}:{settings.worker_port}"
        )
        self._say(f"state and logs are in {self.directory}; `springtide flink status` shows what runs")
        self._say("Ctrl-C, or `springtide flink down`, ends jobs by savepoint, then all of it")

    def _come_down(self, supervisor: Supervisor) -> None:
        begin = self._clock()
        # One that does not answer any more has no savepoint to give.
        with contextlib.suppress(FlinkFailed):
            end_jobs(self._manager, self._say, hurry=self._hurry, clock=self._clock, sleep=self._sleep)
        supervisor.stop_all(self._hurry)
        self._say(f"Flink stopped after {self._clock() - begin:.1f} s")
