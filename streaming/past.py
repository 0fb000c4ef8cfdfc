"""Makes past clicks into rows once more, for a trainer that learns them: `python -m streaming.past`, its child.

Settings are those of the trial's trainer; what is wanted lies in its registry
(`state/trials/past.py`). Micro-batches go to the standard output, framed as in
`state/microbatch/frames.py`; lines go to the standard error. What it keeps
meanwhile, histories and attributes, lies in a directory of its own in that
registry, and goes with it; what one that was killed left goes with the next.
It ends with 0 behind the last micro-batch, and where nobody reads any more.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO

from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.errors import RegistryError
from state.events.identity import load_salt
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import KafkaLog, Log, PartitionBatch
from state.metrics import StreamMetrics
from state.microbatch.frames import END, framed
from state.process.part import run_part
from state.registry.log_line import WHOLE
from state.storage.shares import STREAM, map_bytes
from state.trials.past import Past, read_past
from streaming.desired import ControlWatch
from streaming.open_shard import open_job, open_join
from streaming.past_clicks import of_files, of_topic, recording_of, stretch_of
from streaming.past_rows import PastContext, PastRows
from streaming.sample_source import topic_of

KEPT = "past-"
PROGRESS_S = 5.0
logger = logging.getLogger(__name__)


class ReadingProgress:
    """Says now and then how far the reading is.

    Args:
        total: Positions to read; None where that is not known.
        elapsed: Monotonic seconds.
    """

    def __init__(self, total: int | None, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._total, self._elapsed = total, elapsed
        self._said_s = elapsed()
        self._began: tuple[float, int] | None = None

    def reach(self, done: int) -> None:
        """Notes that so many are read."""
        now_s = self._elapsed()
        # The first rows load what computes them: the pace is measured from there.
        self._began = began_s, began = self._began or (now_s, done)
        if now_s - self._said_s < PROGRESS_S or done == began:
            return
        self._said_s, rate = now_s, (done - began) / max(now_s - began_s, 1e-9)
        if self._total is None:
            logger.info("%s rows of files are read, %s/s", f"{done:,}", f"{rate:,.0f}")
        else:
            left = f"{(self._total - done) / rate:,.0f} s left"
            logger.info("%s of %s clicks are read, %s/s, %s", f"{done:,}", f"{self._total:,}", f"{rate:,.0f}", left)


def run(settings: Settings, wanted: Past, log: Log, out: Callable[[bytes], object]) -> None:
    """Gives `out` the micro-batches of the past.

    Args:
        settings: Of the trial's trainer: its registry, and its control, which says who is left out.
        wanted: The past.
        log: Where the clicks are.
        out: Takes each encoded micro-batch.

    Raises:
        SpringtideError: Clicks, files or the disk cannot be used.
        OSError: The disk refused, or nobody reads any more.
    """
    spec, salt = FeatureSpec.from_settings(settings), load_salt(settings.salt_path, create=False)
    with ExitStack() as stack:
        folder = _own_folder(settings.registry_dir, stack)
        histories = folder / HISTORIES
        histories.mkdir()
        store = HistoryStore(histories, spec.history, map_bytes(settings, STREAM, HISTORIES, histories))
        stack.callback(store.close)
        mask = ControlWatch(settings.registry_dir, WHOLE).desired.mask
        place = replace(settings, paths=replace(settings.paths, state=str(folder)))
        metrics = StreamMetrics(CollectorRegistry())
        join = open_join(place, salt, metrics, stack, reports=lambda _: lambda letters: None)
        if wanted.files:
            recording = recording_of(settings, wanted)
            topic_id, progress = topic_of(recording), ReadingProgress(None)
        else:
            with log.topics() as topics:
                stretch = stretch_of(settings, wanted, topics)
            topic_id, progress = stretch.topic_id, ReadingProgress(stretch.positions)
        job = open_job(settings, spec, store, salt, topic_id, mask)
        parts = {one.name: getattr(job, one.name) for one in fields(job)}
        rows = PastRows(PastContext(**parts, join=join, metrics=metrics), salt.fingerprint, wanted.begin_ms)
        clicks: Iterator[list[PartitionBatch]]
        if wanted.files:
            clicks = of_files(settings, recording, logger.info, progress.reach)
        else:
            clicks = of_topic(settings, stretch, log, rows.reached, progress.reach)
        for batches in clicks:
            for value in rows.take(batches):
                out(value)
        for value in rows.flush():
            out(value)


def _own_folder(registry: Path, stack: ExitStack) -> Path:
    """A directory that goes with the block; those of processes that were killed go now."""
    for left in registry.glob(f"{KEPT}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=KEPT, dir=registry))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write_all(settings: Settings, out: BinaryIO) -> None:
    wanted = read_past(settings.registry_dir)
    if wanted is None:
        raise RegistryError(
            f"{settings.registry_dir} wants no past clicks",
            "it is a part of `springtide trial start NAME --from clicks`",
        )
    try:
        run(settings, wanted, KafkaLog(settings.kafka), lambda value: out.write(framed(value)))
        out.write(END)
        out.flush()
    except BrokenPipeError:
        logger.warning("nobody reads on: the trainer ended")
        # What is not written is nobody's: closing must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all of it; returns the exit code."""
    # Whatever a library prints must not come between the frames.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        return run_part("past clicks", lambda settings: _write_all(settings, out), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
