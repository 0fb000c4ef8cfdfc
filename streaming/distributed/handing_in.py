"""Hands the job in to an engine, and stays with it: what the command `springtide stream --runner ...` does.

On Flink the job lives on the cluster. This process says how it goes, and its own
end ends nothing: a job is stopped by savepoint (`springtide flink down`), or
cancelled on the cluster. On Prism, which is for tests and for trying things out,
the job ends with this process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import cast

import grpc
from apache_beam.options.pipeline_options import GoogleCloudOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from state.config.settings import Settings
from state.errors import JobFailed
from state.log.gaps import Consent
from streaming.distributed.job import plan_of, run_distributed
from streaming.distributed.on_flink import FlinkJob
from streaming.distributed.options import FLINK, beam_options

LOOK_S = 0.5
logger = logging.getLogger(__name__)


def run_elsewhere(
    settings: Settings, consent: Consent, runner: str, words: Sequence[str], stopping: threading.Event
) -> None:
    """Hands the job in, and returns when it has ended, or when this process is asked to stop.

    Args:
        settings: The effective settings.
        consent: The losses that the operator accepts.
        runner: As it was named.
        words: Options of Beam that were given.
        stopping: Set by a signal.

    Raises:
        JobFailed: The job could not be handed in, or has failed.
        SpringtideError: What would stop the steps was found before.
    """
    plan = plan_of(settings, consent)
    logger.info("handing the job in to %s: %d buckets of users", runner, settings.stream.buckets)
    try:
        options = beam_options(runner, words, settings)
        named = options.view_as(GoogleCloudOptions)
        named.job_name = named.job_name or f"springtide-{plan.job}"
        result = run_distributed(plan, options)
    # Whatever a runner raises: gRPC's errors, those of a job server, of a library that is not installed.
    except Exception as error:
        raise JobFailed(
            f"the job cannot be handed in to {runner}: {_first_line(error)}",
            "see that the engine runs (`springtide flink status`), and that it is of Beam's release",
        ) from error
    local = not any(word.startswith("--job_endpoint") for word in words)
    job = FlinkJob.of(options, settings, local) if runner == FLINK else None
    follow(result, runner, stopping, job)


def follow(result: PipelineResult, runner: str, stopping: threading.Event, job: FlinkJob | None = None) -> None:
    """Says how the job goes until it ends, or until this process is asked to stop.

    A job that fails for what no restart mends is cancelled.

    Args:
        result: What the runner gave.
        runner: As it was named.
        stopping: Set by a signal.
        job: The same job as its JobManager knows it.

    Raises:
        JobFailed: It has failed, or nobody says how it goes.
    """
    said = None
    while not stopping.wait(LOOK_S):
        state = _state_of(result, runner)
        if state != said:
            logger.info("the job is %s", str(state).lower())
            said = state
        if job is not None and (problem := job.unmended()):
            job.cancel()
            raise JobFailed(f"the job was cancelled, for it fails with what no restart mends: {problem}")
        if state is not None and PipelineState.is_terminal(state):
            _say_end(state, runner, job)
            return
    if runner == FLINK:
        logger.info("the job goes on; `springtide flink down` stops it by savepoint")
        return
    result.cancel()
    logger.info("the job is cancelled")


def _state_of(result: PipelineResult, runner: str) -> str | None:
    try:
        return cast(str | None, result.state)
    except grpc.RpcError as error:
        raise JobFailed(
            f"the job server of {runner} does not answer any more ({error.code().name})",
            "the job may go on without it: see the engine (`springtide flink status`)",
        ) from error


def _say_end(state: str, runner: str, job: FlinkJob | None) -> None:
    """Says how a job was ended by somebody.

    Raises:
        JobFailed: Nobody ended it, or nobody says so.
    """
    savepoint = None if job is None else job.ended_by()
    if savepoint:
        logger.info("the job was stopped by a savepoint; resume it with --savepoint_path=%s", savepoint)
    elif savepoint is not None:
        logger.info("the job was cancelled; `springtide flink status` names the checkpoint that it is resumed from")
    elif state in (PipelineState.FAILED, PipelineState.UNRECOGNIZED):
        # Beam calls a job failed, too, that was cancelled with its savepoint.
        also = ", which is also said of one that was stopped by savepoint" if job is None else ""
        raise JobFailed(
            f"the job has ended on {runner}, {state.lower()}{also}",
            "read the engine's log; `springtide flink status` names what it is resumed from",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
