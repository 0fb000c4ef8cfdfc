"""The stream's Beam job and its process: `python -m streaming.pipeline [--section.name VALUE ...]`.

SIGTERM and SIGINT end it cleanly: gathered rows are written and committed, and the process exits with 0. With
`--runner`, the same code runs as a job of another engine (`streaming/distributed`); Beam's options pass through.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import GapError, SettingsError
from state.log.accepted_gaps import Consent, how_to_go_on, take_options
from state.process.environment import actor, wall_ms
from state.process.part import Work, run_process, stop_on_signals
from streaming.commit import Committer
from streaming.context import StreamContext, open_stream
from streaming.rows import Cut, Rows
from streaming.steps import Handle, ParseEvents, ReadClicks, Step, UpdateProfiles, opened

# One cut is written while two wait; a longer queue would only delay data for serving.
QUEUED_CUTS = 2
LOCAL = "local"

logger = logging.getLogger(__name__)


class CommitThread:
    """Writes and commits cuts in the order in which they were put, in a separate thread.

    Without a cut it wakes only to publish or sweep what is due. `put`, `flush` and `close` are called by the Beam
    thread. An exception ends the thread and surfaces in the next call of `put`, `check` or `flush`.
    """

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._queue: deque[Cut] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def put(self, cut: Cut) -> None:
        """Queues a cut; waits while two are queued, which slows down the reading of clicks.

        Raises:
            SpringtideError: The thread failed.
        """
        self._wait(lambda: len(self._queue) < QUEUED_CUTS)
        with self._changed:
            self._queue.append(cut)
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a cut waits or is written."""
        return self._busy or bool(self._queue)

    def check(self) -> None:
        """Raises the error that ended the thread, if there was one."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Returns when all queued cuts are committed, and so are the group's offsets.

        Raises:
            SpringtideError: The thread failed.
        """
        self._wait(lambda: not self.busy)
        self._committer.show()

    def close(self) -> None:
        """Ends the thread after the commit at hand; queued cuts are dropped and read again later."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or until())
        self.check()

    def _run(self) -> None:
        try:
            while (cuts := self._take()) is not None:
                if cuts:
                    self._committer.commit(cuts)
                else:
                    self._committer.catch_up()
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        # The edge of the thread: kept, and raised again in the Beam thread.
        except BaseException as failure:  # noqa: BLE001
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _take(self) -> list[Cut] | None:
        """Waits for cuts and takes all of them: none if something else is due, None when the thread should end."""
        due_s = self._committer.due_s
        with self._changed:
            self._changed.wait_for(
                lambda: self._queue or self._closing, None if due_s is None else max(0.0, due_s - time.monotonic())
            )
            if self._closing:
                return None
            cuts = list(self._queue)
            self._queue.clear()
            self._busy = True
            self._changed.notify_all()
            return cuts


class WriteMicroBatches(Step[StreamContext]):
    """Cuts by rows and time, and passes the cuts to the commit thread; yields nothing."""

    _commits: CommitThread

    def setup(self) -> None:
        """Starts the commit thread; Beam calls it once, because one process has one bundle."""
        context = self.handle.context
        self._commits = CommitThread(Committer(context))
        context.closing.callback(self._commits.close)

    def process(self, rows: Rows) -> Iterator[None]:
        """Takes a batch; an empty one only advances the time."""
        with self.handle.watched():
            self._commits.check()
            for cut in self.handle.context.cutter.add(rows, wall_ms(), self._commits.busy):
                self._commits.put(cut)
        yield from ()

    def finish_bundle(self) -> None:
        """At a clean stop: commits what is gathered."""
        with self.handle.watched():
            for cut in self.handle.context.cutter.flush(wall_ms()):
                self._commits.put(cut)
            self._commits.flush()


def run(handle: Handle[StreamContext]) -> None:
    """Runs the job in this process until the stream is `stopping` or control changes, then commits everything.

    Raises:
        SpringtideError: A step failed.
    """
    # Named: DirectRunner would first try to download another runner.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(["--streaming"]))
    # One fused stage, because no stage may follow an endless source.
    (
        pipeline
        | "Start" >> beam.Impulse()
        | "Read clicks" >> beam.ParDo(ReadClicks(handle))
        | "Parse events" >> beam.ParDo(ParseEvents(handle))
        | "Update profiles" >> beam.ParDo(UpdateProfiles(handle))
        | "Write micro-batches" >> beam.ParDo(WriteMicroBatches(handle))
    )
    with handle.as_raised():
        pipeline.run().wait_until_finish()


def run_local(settings: Settings, consent: Consent, stopping: threading.Event) -> None:
    """Runs the stream in this process until it is asked to stop.

    Raises:
        SpringtideError: The stream failed.
    """
    while not stopping.is_set():
        # Repeats if control has changed: opening the stream applies the new control.
        with open_stream(settings, consent, stopping) as context, opened(context) as handle:
            run(handle)
    logger.info("stopped; everything read is committed")


def take_runner(words: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--runner` off a command line; returns the runner and the remaining words, which are Beam's options.

    >>> take_runner(["--parallelism=2", "--runner", "flink"]), take_runner([])
    (('flink', ['--parallelism=2']), ('local', []))

    Raises:
        SettingsError: The local runner does not have this option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--runner", default=LOCAL)
    try:
        args, beam_options = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise SettingsError(
            str(error), "write --runner local, flink or prism, or the name of another Beam runner"
        ) from None
    if args.runner == LOCAL and beam_options:
        raise SettingsError(
            f"unknown argument {beam_options[0]}",
            "options of Beam go with --runner flink, prism or another of its runners",
        )
    return args.runner, beam_options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stream; returns the exit code."""

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        consent, words_left = take_options(words, actor())
        flags, engine = split_settings(words_left)
        runner, options = take_runner(engine)
        # Opening the stores may take a while: signals are handled from here on.
        settings, stopping = load(flags, os.environ), stop_on_signals()

        def work() -> None:
            try:
                if runner == LOCAL:
                    run_local(settings, consent, stopping)
                else:
                    from streaming.distributed.job import run_on_engine

                    run_on_engine(settings, consent, runner, options, stopping)
            except GapError as gap:
                raise how_to_go_on(gap, "springtide stream (or up)") from gap

        return settings, work

    return run_process("stream", start, argv, logger)


if __name__ == "__main__":
    # Imported by its real name: objects that Beam pickles must not be defined in __main__.
    from streaming.pipeline import main as run_main

    sys.exit(run_main())
