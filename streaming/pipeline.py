"""The job as one sentence, and the process around it: `python -m streaming.pipeline [--section.name VALUE ...]`.

Where clicks were deleted before they were read the process ends and says which; with
`--accept-gap P:A-B --reason TEXT` it counts them as a gap and goes on.

SIGTERM and SIGINT end it cleanly: the source returns, what is gathered is
written and committed, and the process ends with 0. Everything else that ends
it is one line on the standard error and exit code 1 (2 for a wrong setting).

With `--runner flink`, `prism` or another of Beam's runners the same cores run
as a job of that engine (`streaming/distributed`); Beam's options pass through.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import PCollection
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import GapError, SpringtideError, of_disk
from state.log.gap_options import take_options
from state.log.gaps import Consent, how_to_go_on
from state.process import log_lines
from state.process.actor import actor
from state.process.ending import stop_on_signals
from state.process.private_files import keep_private
from streaming.context import Handle, StreamContext
from streaming.distributed.options import LOCAL, take_runner
from streaming.open_shard import open_shard
from streaming.sink import WriteMicroBatches
from streaming.source import ReadClicks
from streaming.steps import ParseEvents, UpdateProfiles

logger = logging.getLogger(__name__)


def build(pipeline: beam.Pipeline, shard: Handle[StreamContext]) -> PCollection[None]:
    """Applies the job to `pipeline`: one fused stage, for nothing may stand behind an endless source."""
    written: PCollection[None] = (
        pipeline
        | "Start" >> beam.Impulse()
        | "Read clicks" >> beam.ParDo(ReadClicks(shard))
        | "Parse events" >> beam.ParDo(ParseEvents(shard))
        | "Update profiles" >> beam.ParDo(UpdateProfiles(shard))
        | "Write micro-batches" >> beam.ParDo(WriteMicroBatches(shard))
    )
    return written


def run(shard: Handle[StreamContext]) -> None:
    """Runs the job in this process until the shard is `stopping` or control has changed; returns when all is committed.

    Raises:
        SpringtideError: What a step raised.
    """
    # Named: DirectRunner would first try to download another runner.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(["--streaming"]))
    build(pipeline, shard)
    with shard.as_raised():
        pipeline.run().wait_until_finish()


def run_here(settings: Settings, consent: Consent, stopping: threading.Event) -> None:
    """Runs the stream in this process until it is asked to stop.

    Raises:
        SpringtideError: What ended it.
    """
    while not stopping.is_set():
        # Again where control has changed: opening the shard is what brings it to what control asks for.
        with open_shard(settings, consent, stopping) as shard:
            run(shard)
    logger.info("stopped; everything read is committed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stream; returns the exit code."""
    keep_private()
    log_lines.begin("stream")
    try:
        consent, rest = take_options(sys.argv[1:] if argv is None else argv, actor())
        flags, words = split_settings(rest)
        runner, options = take_runner(words)
        # From here on: opening what a stream owns may take a while.
        settings, stopping = load(flags, os.environ), stop_on_signals()
        log_lines.follow(settings.logs)
        if runner == LOCAL:
            run_here(settings, consent, stopping)
        else:
            from streaming.distributed.handing_in import run_elsewhere

            run_elsewhere(settings, consent, runner, options, stopping)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        told = how_to_go_on(error, "springtide stream (or up)") if isinstance(error, GapError) else error
        logger.error("%s: %s", type(error).__name__, told)
        return error.exit_code
    return 0


if __name__ == "__main__":
    # By its real name: what Beam pickles must not live in __main__.
    from streaming.pipeline import main as run_main

    sys.exit(run_main())
