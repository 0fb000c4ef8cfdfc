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

from apache_beam.runners.runner import PipelineResult, PipelineState

from state.config.settings import Settings
from state.errors import JobFailed
from state.log.gaps import Consent
from streaming.distributed.job import plan_of, run_distributed
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
        result = run_distributed(plan, beam_options(runner, words, settings))
    # Whatever a runner raises: gRPC's errors, those of a job server, of a library that is not installed.
    except Exception as error:
        raise JobFailed(
            f"the job cannot be handed in to {runner}: {_first_line(error)}",
            "see that the engine runs (`springtide flink status`), and that it is of Beam's release",
        ) from error
    follow(result, runner, stopping)


def follow(result: PipelineResult, runner: str, stopping: threading.Event) -> None:
    """Says how the job goes until it ends, or until this process is asked to stop.

    Raises:
        JobFailed: It has failed.
    """
    said = None
    while not stopping.wait(LOOK_S):
        state = result.state
        if state != said:
            logger.info("the job is %s", str(state).lower())
            said = state
        if state is not None and PipelineState.is_terminal(state):
            if state in (PipelineState.FAILED, PipelineState.UNRECOGNIZED):
                # Flink calls a job failed, too, that was cancelled with its savepoint.
                raise JobFailed(
                    f"the job has ended on {runner}, {str(state).lower()}, which is also said of one that was stopped by savepoint",
                    "read the engine's log; `springtide flink status` names what it is resumed from",
                )
            return
    if runner == FLINK:
        logger.info("the job goes on; `springtide flink down` stops it by savepoint")
        return
    result.cancel()
    logger.info("the job is cancelled")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
