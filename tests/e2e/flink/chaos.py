"""Kills every part of a Flink cluster and rescales its job, then proves that no row was lost and no state doubled.

    python -m tests.e2e.chaos --flink [--seed 7] [--rounds 2]

1. A cluster of two TaskManagers with a slot each, and a job of parallelism 1.
2. In each round kill -9, in an order of chance, of a Python worker, of the pool
   that starts them, of a TaskManager and of the JobManager, whose job is then
   resumed from its newest checkpoint. After each, rows must come again.
3. A savepoint, and the job goes on at parallelism 2; then again at 1.
4. The job ends by a savepoint, and the cluster.
5. No row is missing, and the count that each row carries is the one of a state
   that nothing was lost from and nothing counted in twice.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.flink.cluster import url
from deploy.flink.ending import end_jobs
from deploy.flink.rest import JobManager
from tests.e2e.flink.cluster import LocalFlink
from tests.e2e.flink.counting import faults, written
from tests.e2e.running import until

RATE = 200.0
VICTIMS = ("worker", "workers", "task-manager", "job-manager")
BACK_S = 180.0

Say = Callable[[str], None]


@dataclass
class FlinkFindings:
    """What a run found.

    Attributes:
        back_s: What happened -> seconds until rows came that had not come before.
        rows: Distinct rows written.
        again: Rows that came again.
        missing: Rows that never came, before the last one.
        wrong: Rows whose count is of another state.
    """

    back_s: dict[str, list[float]] = field(default_factory=dict)
    rows: int = 0
    again: int = 0
    missing: int = 0
    wrong: list[tuple[int, int]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """The promises that were broken."""
        found = [f"{self.missing} rows are missing"] if self.missing else []
        return found + [f"row {number} says {counted}" for number, counted in self.wrong[:10]]

    def lines(self) -> list[str]:
        """The figures, then what is wrong."""
        back = (
            f"{what}: rows again after {', '.join(f'{s:.0f}' for s in took)} s" for what, took in self.back_s.items()
        )
        return [*back, f"{self.rows} rows, {self.again} came again, {self.missing} missing, {len(self.wrong)} wrong"]


class FlinkChaos:
    """One run.

    Args:
        directory: All state of it.
        seed: Of the order of the kills.
        rounds: How often each part is killed.
        say: Takes progress.
    """

    def __init__(self, directory: Path, seed: int, rounds: int, say: Say) -> None:
        self._chance, self._rounds, self._say = random.Random(seed), rounds, say
        self._flink = LocalFlink(directory, {"flink.task_managers": 2, "flink.slots": 1})
        self._manager = JobManager(url(self._flink.settings))
        self._rows = directory / "rows"
        self._rows.mkdir()
        self._begun_s = 0.0
        self._job: subprocess.Popen[bytes] | None = None
        self.findings = FlinkFindings()

    def run(self) -> FlinkFindings:
        """All five steps; whatever happens, nothing of it runs afterwards."""
        try:
            # 1.
            self._flink.start()
            self._begun_s = time.time()
            self._submit(1)
            self._await_rows("the first rows")
            # 2.
            for _ in range(self._rounds):
                for victim in self._chance.sample(VICTIMS, len(VICTIMS)):
                    self._kill(victim)
            # 3.
            for parallelism in (2, 1):
                self._rescale(parallelism)
            # 4.
            self._say("the end, by savepoint")
            done = self._flink.springtide("down")
            assert done.returncode == 0, done.stderr
        finally:
            self._flink.close()
        # 5.
        listed = list(written(self._rows))
        findings = self.findings
        findings.missing, findings.again, findings.wrong = faults(listed)
        findings.rows = len({number for number, _ in listed})
        return findings

    def _submit(self, parallelism: int, *more: str) -> None:
        self._job = self._flink.submit(self._rows, RATE, self._begun_s, parallelism, more)

    def _kill(self, victim: str) -> None:
        until(self._settled, self._trouble, BACK_S)
        pids = self._flink.pids(victim)
        assert pids, f"no {victim} runs"
        self._say(f"kill -9 of {victim}")
        os.kill(self._chance.choice(pids), signal.SIGKILL)
        begun_s, reached = time.monotonic(), self._reached()
        if victim == "job-manager":
            self._resume_from_checkpoint()
        self._await_rows(f"kill -9 of {victim}", begun_s, reached)

    def _resume_from_checkpoint(self) -> None:
        """A JobManager that died has forgotten its job: the operator hands it in again, at its newest checkpoint."""

        def is_back() -> str | None:
            state = self._flink.status()
            found = state["job_manager"]
            whole = found is not None and found["task_managers"] == 2 and not found["jobs"]
            return state["resumable"].get("checkpoint") if whole else None

        path = until(is_back, self._trouble, BACK_S)
        self._end_client()
        self._submit(1, f"--savepoint_path={path}")

    def _rescale(self, parallelism: int) -> None:
        until(self._settled, self._trouble, BACK_S)
        self._say(f"a savepoint, and on at parallelism {parallelism}")
        begun_s, said = time.monotonic(), list[str]()
        end_jobs(self._manager, said.append)
        (path,) = re.findall(r"--savepoint_path (\S+)", "\n".join(said))
        self._end_client()
        reached = self._reached()
        self._submit(parallelism, f"--savepoint_path={path}")
        self._await_rows(f"rescaling to {parallelism}", begun_s, reached)

    def _settled(self) -> dict[str, Any] | None:
        """The job, once all of its tasks run and it has a checkpoint since it last began."""
        found = self._flink.status()
        jobs = [job for job in (found["job_manager"] or {"jobs": ()})["jobs"] if job["state"] == "RUNNING"]
        whole = not found["wrong"] and jobs and jobs[0]["running"] == jobs[0]["tasks"] and jobs[0]["checkpoint"]
        return jobs[0] if whole else None

    def _await_rows(self, what: str, begun_s: float | None = None, reached: int = -1) -> None:
        """Waits for rows that had not come before, some of them."""
        begun_s = time.monotonic() if begun_s is None else begun_s
        until(lambda: self._reached() > reached + RATE, self._trouble, BACK_S)
        took_s = time.monotonic() - begun_s
        self.findings.back_s.setdefault(what, []).append(took_s)
        self._say(f"{what}: rows come again after {took_s:.1f} s")

    def _reached(self) -> int:
        return max((number for number, _ in written(self._rows)), default=-1)

    def _end_client(self) -> None:
        """The process that handed the job in ends with it, or with the JobManager that forgot it."""
        assert self._job is not None
        self._job.kill()
        self._job.wait()

    def _trouble(self) -> str:
        log = self._rows.with_suffix(".log")
        return f"{log.read_text()[-3000:] if log.exists() else ''}\n{self._flink.said()}\n{self._flink.logs()}"
