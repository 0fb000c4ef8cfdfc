"""The engine of a distributed job: Beam's options for each kind, and a job on Flink as its JobManager reports it.

Options that a Springtide job needs are filled in, and all others pass through; an option on the command line takes
precedence. The values for Flink and Prism were measured; a comment next to each gives its reason.

Beam's job server reports a job that was stopped with a savepoint as failed. It reports nothing while a job restarts
repeatedly from its checkpoint. So `FlinkJob` asks the JobManager.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from apache_beam.options.pipeline_options import FlinkRunnerOptions, GoogleCloudOptions, PipelineOptions

from state import errors
from state.config.settings import Settings
from state.errors import FlinkFailed, GapError, RewoundLog, SaltMismatch, SettingsError
from state.flink import JobManager, url

LOCAL, FLINK, PRISM = "local", "flink", "prism"

ON_FLINK = (
    # Otherwise a bundle that a checkpoint ends would keep its output until more clicks arrive.
    ("finish_bundle_before_checkpointing", True),
    # Work since the last checkpoint is repeated after a failure; one checkpoint a second costs about 150 ms of little
    # work.
    ("checkpointing_interval", 1000),
    # The default of one second would add one second to the age of every response.
    ("max_bundle_time_mills", 100),
    ("parallelism", 1),
    # A cancelled job without a savepoint is resumed from its last checkpoint.
    ("externalized_checkpoints_enabled", True),
    ("retain_externalized_checkpoints_on_cancellation", True),
)
ON_PRISM = (
    # Splitting an unbounded restriction never ends; an hour without a change is no reason to end the job.
    ("experiments", "prism_disable_sdf_split"),
    ("job_server_timeout", 86400),
    # Workers run in this process: Prism is for tests and experiments.
    ("environment_type", "LOOPBACK"),
)


def take_runner(words: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--runner` off a command line; returns the runner and the remaining words, which are Beam's options.

    >>> take_runner(["--parallelism=2", "--runner", "flink"]), take_runner([])
    (('flink', ['--parallelism=2']), ('local', []))

    Raises:
        SettingsError: The local form does not have such an option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--runner", default=LOCAL)
    try:
        asked, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise SettingsError(
            str(error), "write --runner local, flink or prism, or the name of another Beam runner"
        ) from None
    if asked.runner == LOCAL and rest:
        raise SettingsError(
            f"unknown argument {rest[0]}", "options of Beam go with --runner flink, prism or another of its runners"
        )
    return asked.runner, rest


def beam_options(runner: str, words: Sequence[str], settings: Settings) -> PipelineOptions:
    """Builds the Beam options of a job.

    Args:
        runner: As returned by `take_runner`.
        words: Options from the command line.
        settings: The effective settings.
    """
    filled: list[tuple[str, object]] = [("streaming", True)]
    if runner == FLINK:
        # `PortableRunner` uses a running job server; `FlinkRunner` would download and start its own.
        filled += [("runner", "PortableRunner"), ("job_endpoint", f"127.0.0.1:{settings.flink.job_port}")]
        # JobWorker processes next to the TaskManager, which run this same code.
        filled += [
            ("environment_type", "EXTERNAL"),
            ("environment_config", f"127.0.0.1:{settings.flink.worker_port}"),
            *ON_FLINK,
        ]
    elif runner == PRISM:
        filled += [("runner", "PrismRunner"), *ON_PRISM]
        if place := shutil.which("prism"):
            # Use an installed one; otherwise Beam downloads it.
            filled.append(("prism_location", place))
    else:
        filled.append(("runner", runner))
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    return PipelineOptions([*(_word(name, value) for name, value in filled if name not in given), *words])


def _word(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


UNMENDED = (GapError, RewoundLog, SaltMismatch, SettingsError)
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

    >>> unmended("a.B: c\nstate.errors.RewoundLog: turned off; resume it [while running 'Read']\n\n\tat a.B")
    'RewoundLog: turned off; resume it'
    >>> unmended("state.errors.UnreachableBroker: no broker answers")
    ''
    """
    for name, message in OURS.findall(failure):
        if issubclass(getattr(errors, name, object), UNMENDED):
            return f"{name}: {message}"
    return ""
