"""A job on a Flink cluster, as reported by its JobManager: how it ended, and which errors no restart can fix.

Beam's job server reports a job that was stopped with a savepoint as failed. It reports nothing while a job restarts
repeatedly from its checkpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress

from apache_beam.options.pipeline_options import FlinkRunnerOptions, GoogleCloudOptions, PipelineOptions

from state import errors
from state.config.settings import Settings
from state.errors import FlinkFailed, GapError, LineTurned, SaltMismatch, SettingsError
from state.flink import JobManager, url

UNMENDED = (GapError, LineTurned, SaltMismatch, SettingsError)
"""Errors that only a new job can fix: one with other settings or consent, or from an older checkpoint."""
OF_CLUSTER = "[auto]"
TRIES, LOOK_S = 6, 0.25
OURS = re.compile(r"state\.errors\.(\w+): (.+?)(?: \[while running .*)?$", re.MULTILINE)


class FlinkJob:
    """A submitted job.

    Args:
        manager: Of the cluster.
        name: Of the job; unique.
    """

    def __init__(self, manager: JobManager, name: str) -> None:
        self._manager, self._name = manager, name
        self._id: str | None = None

    @classmethod
    def of(cls, options: PipelineOptions, settings: Settings, local: bool) -> FlinkJob | None:
        """The job of the given options; None if the address of its JobManager is unknown.

        Args:
            options: Of the job, including its name.
            settings: Of the local cluster.
            local: Whether the job is submitted to the local cluster.
        """
        master = options.view_as(FlinkRunnerOptions).flink_master
        name = options.view_as(GoogleCloudOptions).job_name
        if master != OF_CLUSTER:
            return cls(JobManager(master if "://" in master else f"http://{master}"), name)
        return cls(JobManager(url(settings)), name) if local else None

    def unmended(self) -> str:
        """The `UNMENDED` error that its tasks failed with last; empty if there is none, or Flink does not answer."""
        with suppress(FlinkFailed):
            if job := self._known():
                return unmended(self._manager.failure(job))
        return ""

    def ended_by(self, sleep: Callable[[float], None] = time.sleep) -> str | None:
        """The savepoint that it was stopped with; empty if it was cancelled without one, None if it ended otherwise.

        Args:
            sleep: Waits; needed because the JobManager's answers are half a second old.
        """
        found = None
        with suppress(FlinkFailed):
            job = self._known()
            if job is None:
                return None
            for _ in range(TRIES):
                state, savepoint = self._manager.state(job), self._manager.last_savepoint(job)
                if state == "CANCELED":
                    found = savepoint
                if found or state in ("FINISHED", "FAILED"):
                    break
                sleep(LOOK_S)
        return found

    def cancel(self) -> None:
        """Requests cancellation at the newest checkpoint.

        Raises:
            FlinkFailed: The JobManager does not answer, or refuses.
        """
        if job := self._known():
            self._manager.cancel(job)

    def _known(self) -> str | None:
        """Its id; None before the JobManager knows the job."""
        self._id = self._id or self._manager.named(self._name)
        return self._id


def unmended(failure: str) -> str:
    r"""The class and message of the `UNMENDED` error that a failure ends with; empty for any other failure.

    >>> unmended("a.B: c\nstate.errors.LineTurned: turned off; resume it [while running 'Read']\n\n\tat a.B")
    'LineTurned: turned off; resume it'
    >>> unmended("state.errors.UnreachableBroker: no broker answers")
    ''
    """
    for name, message in OURS.findall(failure):
        if issubclass(getattr(errors, name, object), UNMENDED):
            return f"{name}: {message}"
    return ""
