"""Submits the distributed job to an engine and follows it: the command `springtide stream --runner ...`.

    read ─┬─ (bucket, portion) ─ update bucket ─ write ─── account
          └─ of each source                 └── one stage ──┘   └─ one key

The engine keeps positions, clocks, histories, waiting rows and the account in one checkpoint. Everything after a
checkpoint is read and computed again after a failure.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import cast

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import FlinkRunnerOptions, GoogleCloudOptions, PipelineOptions
from apache_beam.pvalue import PCollection
from apache_beam.runners.runner import PipelineResult, PipelineState
from apache_beam.transforms.periodicsequence import PeriodicImpulse, RebaseMode

from state import errors
from state.config.settings import Settings
from state.errors import FlinkFailed, GapError, RewoundLog, SaltMismatch, SettingsError, first_line
from state.events.identity import own_salt
from state.flink import JobManager, url
from state.log import Log
from state.log.accepted_gaps import Consent
from state.registry.model_fit import require_same_model
from streaming.context import NO_CONSENT, ensure_topics
from streaming.distributed.account import KeepAccount, WriteBuckets
from streaming.distributed.bucket import BucketRows, allowed
from streaming.distributed.steps import ReadPartitions, UpdateBuckets
from streaming.distributed.worker import JobPlan, without_secrets

FLINK, PRISM = "flink", "prism"
WAKE_S = 3600.0
FOLLOW_S = 0.5
TRIES, POLL_S = 6, 0.25
OF_CLUSTER = "[auto]"
OURS = re.compile(r"state\.errors\.(\w+): (.+?)(?: \[while running .*)?$", re.MULTILINE)
PERMANENT = (GapError, RewoundLog, SaltMismatch, SettingsError)
"""Errors that only a new job can fix: with other settings or consent, or from an older checkpoint."""
logger = logging.getLogger(__name__)

ON_FLINK = (
    # Otherwise a bundle that a checkpoint ends would keep its output until more clicks arrive.
    ("finish_bundle_before_checkpointing", True),
    # Work after the last checkpoint is repeated after a failure. One checkpoint per second costs about 150 ms, with
    # little work.
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


def beam_options(runner: str, words: Sequence[str], settings: Settings) -> PipelineOptions:
    """Builds the Beam options of a job: those that it needs on this runner, unless `words` sets them, and `words`."""
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
        if path := shutil.which("prism"):
            # Use an installed one; otherwise Beam downloads it.
            filled.append(("prism_location", path))
    else:
        filled.append(("runner", runner))
    options = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    filled_words = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in filled if name not in options
    ]
    return PipelineOptions([*filled_words, *words])


class FlinkJob:
    """A submitted job, as the JobManager of its cluster knows it by its unique name."""

    def __init__(self, manager: JobManager, name: str) -> None:
        self._manager, self._name = manager, name
        self._id: str | None = None

    @classmethod
    def of(cls, options: PipelineOptions, settings: Settings, local: bool) -> FlinkJob | None:
        """The job of the given options; None if it was not submitted to the local cluster and names no JobManager."""
        master = options.view_as(FlinkRunnerOptions).flink_master
        name = options.view_as(GoogleCloudOptions).job_name
        if master != OF_CLUSTER:
            return cls(JobManager(master if "://" in master else f"http://{master}"), name)
        return cls(JobManager(url(settings)), name) if local else None

    def permanent(self) -> str:
        """The `PERMANENT` error that its tasks failed with last; empty if there is none, or Flink does not answer."""
        with suppress(FlinkFailed):
            if job := self._known():
                return permanent(self._manager.failure(job))
        return ""

    def ended_by(self) -> str | None:
        """The savepoint that it was stopped with; empty if it was cancelled without one, None if it ended otherwise."""
        found_savepoint = None
        with suppress(FlinkFailed):
            job = self._known()
            if job is None:
                return None
            for _ in range(TRIES):
                state, savepoint = self._manager.state(job), self._manager.last_savepoint(job)
                if state == "CANCELED":
                    found_savepoint = savepoint
                if found_savepoint or state in ("FINISHED", "FAILED"):
                    break
                # Answers of the JobManager are half a second old.
                time.sleep(POLL_S)
        return found_savepoint

    def cancel(self) -> None:
        """Requests cancellation at the newest checkpoint.

        Raises:
            FlinkFailed: The JobManager does not answer, or refuses.
        """
        if job := self._known():
            self._manager.cancel(job)

    def _known(self) -> str | None:
        self._id = self._id or self._manager.named(self._name)
        return self._id


def permanent(failure: str) -> str:
    r"""The class and message of the `PERMANENT` error that a failure ends with; empty for any other failure.

    >>> permanent("a.B: c\nstate.errors.RewoundLog: turned off; resume it [while running 'Read']\n\n\tat a.B")
    'RewoundLog: turned off; resume it'
    >>> permanent("state.errors.UnreachableBroker: no broker answers")
    ''
    """
    for name, message in OURS.findall(failure):
        if issubclass(getattr(errors, name, object), PERMANENT):
            return f"{name}: {message}"
    return ""


def build_distributed(pipeline: beam.Pipeline, plan: JobPlan) -> PCollection[None]:
    """Applies the job to `pipeline`."""
    keyed, sources = tuple[int, bytes], plan.settings.stream.sources
    # Sources wake themselves. But when input ends, an engine drops the state of keys, and Flink is busy with timers.
    endless = PeriodicImpulse(fire_interval=WAKE_S, rebase=RebaseMode.REBASE_START)
    accounted: PCollection[None] = (
        pipeline
        | "Start" >> (endless if plan.until is None else beam.Impulse())
        | "Wake sources"
        >> beam.FlatMap(lambda _: [(source, b"") for source in range(sources)]).with_output_types(keyed)
        | "Read partitions" >> beam.ParDo(ReadPartitions(plan)).with_output_types(keyed)
        | "Update buckets" >> beam.ParDo(UpdateBuckets(plan)).with_output_types(BucketRows)
        | "Write buckets" >> beam.ParDo(WriteBuckets(plan)).with_output_types(keyed)
        | "Keep account" >> beam.ParDo(KeepAccount(plan))
    )
    return accounted


def plan_of(
    settings: Settings, consent: Consent = NO_CONSENT, until: Mapping[int, int] | None = None, log: Log | None = None
) -> JobPlan:
    """The plan for the steps; conditions that would stop them are checked first.

    Raises:
        ModelMismatch: The features differ from the learned ones, and no upgrade was requested.
        SettingsError: Users cannot be divided into this many buckets.
        MissingSalt: The salt of the stored data is gone.
        LogError: The topic of clicks is missing, or Kafka is not reachable.
    """
    buckets = settings.stream.buckets
    if not allowed(buckets):
        raise SettingsError(f"stream.buckets {buckets} is no divisor of 64", "use 1, 2, 4, 8, 16, 32 or 64")
    require_same_model(settings, features_only=True)
    salt = own_salt(settings)
    with (log or Log(settings.kafka)).topics() as topics:
        ensure_topics(settings, topics)
    return JobPlan(secrets.token_hex(8), without_secrets(settings), salt.fingerprint, consent, until)


def run_on_engine(
    settings: Settings, consent: Consent, runner: str, words: Sequence[str], stopping: threading.Event
) -> None:
    """Submits the job to `runner`, and returns when it has ended, or when this process is asked to stop.

    Raises:
        FlinkFailed: The job could not be submitted, or has failed.
        SpringtideError: A condition that would stop the steps was found first.
    """
    plan = plan_of(settings, consent)
    logger.info("submitting the job to %s: %d buckets of users", runner, settings.stream.buckets)
    try:
        options = beam_options(runner, words, settings)
        named = options.view_as(GoogleCloudOptions)
        named.job_name = named.job_name or f"springtide-{plan.job}"
        pipeline = beam.Pipeline(options=options)
        build_distributed(pipeline, plan)
        result = pipeline.run()
    # Whatever a runner raises: gRPC's errors, those of a job server, of a library that is not installed.
    except Exception as error:
        raise FlinkFailed(
            f"the job cannot be submitted to {runner}: {first_line(error)}",
            "check that the engine runs (`springtide flink status`), and that it is of Beam's release",
        ) from error
    local = not any(word.startswith("--job_endpoint") for word in words)
    job = FlinkJob.of(options, settings, local) if runner == FLINK else None
    follow(result, runner, stopping, job)


def follow(result: PipelineResult, runner: str, stopping: threading.Event, job: FlinkJob | None = None) -> None:
    """Logs the state of the job until it ends, or until this process is asked to stop.

    A job with a failure that no restart repairs is cancelled.

    Raises:
        FlinkFailed: It has failed, or its state cannot be read.
    """
    reported = None
    while not stopping.wait(FOLLOW_S):
        state = _state_of(result, runner)
        if state != reported:
            logger.info("the job is %s", str(state).lower())
            reported = state
        if job is not None and (problem := job.permanent()):
            job.cancel()
            raise FlinkFailed(f"the job was cancelled, because no restart repairs its failure: {problem}")
        if state is not None and PipelineState.is_terminal(state):
            _report_end(state, runner, job)
            return
    if runner == FLINK:
        logger.info("the job continues; `springtide flink down` stops it by savepoint")
        return
    result.cancel()
    logger.info("the job is cancelled")


def _state_of(result: PipelineResult, runner: str) -> str | None:
    try:
        return cast(str | None, result.state)
    except grpc.RpcError as error:
        raise FlinkFailed(
            f"the job server of {runner} no longer answers ({error.code().name})",
            "the job may continue without it: check the engine (`springtide flink status`)",
        ) from error


def _report_end(state: str, runner: str, job: FlinkJob | None) -> None:
    """Logs how an operator ended the job; raises FlinkFailed if no operator did."""
    savepoint = None if job is None else job.ended_by()
    if savepoint:
        logger.info("the job was stopped by a savepoint; resume it with --savepoint_path=%s", savepoint)
    elif savepoint is not None:
        logger.info("the job was cancelled; `springtide flink status` names the checkpoint to resume from")
    elif state in (PipelineState.FAILED, PipelineState.UNRECOGNIZED):
        # Beam also reports a job as failed that was cancelled with a savepoint.
        also = ", which is also reported after a stop by savepoint" if job is None else ""
        raise FlinkFailed(
            f"the job has ended on {runner}, {state.lower()}{also}",
            "read the engine's log; `springtide flink status` names the checkpoint to resume from",
        )
