"""A job on a Flink cluster as its JobManager knows it: how it was ended, and what no restart of it mends.

Beam's job server calls a job failed that was stopped by a savepoint, and says
nothing while a job begins again and again from its checkpoint.
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
from state.flink.rest import JobManager, url

UNMENDED = (GapError, LineTurned, SaltMismatch, SettingsError)
"""What only another job gets over: one with other settings or consent, or from an older checkpoint."""
OF_CLUSTER = "[auto]"
TRIES, LOOK_S = 6, 0.25
OURS = re.compile(r"state\.errors\.(\w+): (.+?)(?: \[while running .*)?$", re.MULTILINE)


class FlinkJob:
    """A job that was handed in.

    Args:
        manager: Of the cluster.
        name: Of the job, which no other has.
    """

    def __init__(self, manager: JobManager, name: str) -> None:
        self._manager, self._name = manager, name
        self._id: str | None = None

    @classmethod
    def of(cls, options: PipelineOptions, settings: Settings, local: bool) -> FlinkJob | None:
        """The job of some options; None where nobody says where its JobManager is.

        Args:
            options: Of the job, named.
            settings: Of the local cluster.
            local: Whether the job is handed in there.
        """
        master = options.view_as(FlinkRunnerOptions).flink_master
        name = options.view_as(GoogleCloudOptions).job_name
        if master != OF_CLUSTER:
            return cls(JobManager(master if "://" in master else f"http://{master}"), name)
        return cls(JobManager(url(settings)), name) if local else None

    def unmended(self) -> str:
        """The error of ours, of `UNMENDED`, that its tasks failed with last; empty where there is none, or nobody says so."""
        with suppress(FlinkFailed):
            if job := self._known():
                return unmended(self._manager.failure(job))
        return ""

    def ended_by(self, sleep: Callable[[float], None] = time.sleep) -> str | None:
        """The savepoint that it was stopped by; empty where it was cancelled without one, None where it ended otherwise.

        Args:
            sleep: Waits, for the JobManager answers with what was so half a second ago.
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
        """Asks for its end, at its newest checkpoint.

        Raises:
            FlinkFailed: The JobManager does not answer, or refuses.
        """
        if job := self._known():
            self._manager.cancel(job)

    def _known(self) -> str | None:
        """Its id; None before it has come to the JobManager."""
        self._id = self._id or self._manager.named(self._name)
        return self._id


def unmended(failure: str) -> str:
    r"""The class and the message of the error of `UNMENDED` that a failure ends with; empty where it is another one.

    >>> unmended("a.B: c\nstate.errors.LineTurned: turned off; resume it [while running 'Read']\n\n\tat a.B")
    'LineTurned: turned off; resume it'
    >>> unmended("state.errors.UnreachableBroker: no broker answers")
    ''
    """
    for name, message in OURS.findall(failure):
        if issubclass(getattr(errors, name, object), UNMENDED):
            return f"{name}: {message}"
    return ""
