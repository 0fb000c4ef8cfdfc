"""Where a trainer begins: from a version, with no knowledge, or, for some experiments, with past clicks."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from state.config.settings import Settings
from state.errors import GapError, ProcessFailed, UnknownTopic
from state.experiments.past import Past, read_past
from state.features.spec import FeatureSpec
from state.log import Log, Reader
from state.log.follow import Position, open_topic
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.codec import Frames
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control
from state.registry.log_line import LogLine, onward
from state.registry.manifest import LogRange, Manifest
from state.registry.registry import Registry
from trainer.engine.step import Trainer
from trainer.intake import Passages, RecordFilter, TrainingPlace
from trainer.versions import checkpoint
from trainer.versions.carrying import nothing_learned

POLL_S, PROGRESS_S = 0.2, 10.0
PIPE_BYTES = 1 << 20
CHILD = "streaming.past"
logger = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """The training log, open at the position where a trainer begins, and what the first base holds."""

    log: Reader
    place: TrainingPlace
    tensors: Mapping[str, Any]


Begins = Callable[[Settings, Trainer, Mapping[str, Any], Log, Control], Beginning]
"""Prepares a trainer for its first epoch.

The trainer is cleared first. The other arguments are the settings, the bootstrap's document of the feature spec, the
log with the training log, and the control generation whose epoch begins.
"""


def from_nothing(
    settings: Settings, trainer: Trainer, description: Mapping[str, Any], log: Log, control: Control
) -> Beginning:
    """Starts from scratch, with the training log from its beginning; see `Begins`."""
    reader = log.reader(settings.kafka.microbatches_topic, [TRAINING_PARTITION])
    begin = reader.position(TRAINING_PARTITION)
    position = TrainingPlace(control.epoch, parent=0, first=begin, next=begin, durable_first=begin)
    return Beginning(reader, position, nothing_learned(trainer, description))


@dataclass(frozen=True)
class FromPast:
    """Starts with past clicks, and the training log from the cut on.

    Attributes:
        records: A context manager that yields their encoded micro-batches.
    """

    past: Past
    records: Callable[[], AbstractContextManager[Iterator[bytes]]]
    elapsed: Callable[[], float] = time.monotonic

    def __call__(
        self, settings: Settings, trainer: Trainer, description: Mapping[str, Any], log: Log, control: Control
    ) -> Beginning:
        """See `Begins`.

        1. The past is learned; after a crash here it is learned again.
        2. The log is opened at the cut.
        """
        # 1.
        with trainer.alone():
            checkpoint.begin(trainer, description)
            own = RecordFilter(FeatureSpec.from_settings(settings).digest, str(description["salt"]))
            rows, newest_ms = self._learn(own, trainer, control)
            tensors = checkpoint.changes(trainer) | checkpoint.full(trainer)
        killpoints.reach("past.learned")
        # 2.
        cut = self.past.log
        at = onward(control.log, cut.next)
        reader = open_after(
            log,
            settings,
            cut,
            at,
            f"the past ends at offset {cut.next} of",
            "stop the experiment, and start another: `springtide experiment stop NAME --reason TEXT`",
        )
        position = TrainingPlace(
            control.epoch,
            parent=0,
            first=at,
            next=at,
            marks=self.past.marks,
            rows=rows,
            durable_first=at,
            told_ms=newest_ms,
            # Past clicks exclude the users of these erasures.
            erased=control.erased.last,
        )
        # The next version need not repeat the content of this one.
        return Beginning(reader, position, tensors)

    def _learn(self, own: RecordFilter, trainer: Trainer, control: Control) -> tuple[int, int]:
        past, began_s = self.past, self.elapsed()
        logged_s, rows, newest_ms = began_s, 0, 0
        logger.info("learning past clicks up to live version %d, offset %d", past.version, past.log.next)
        with self.records() as records:
            for number, value in enumerate(records, 1):
                micro_batch = own.take_in(value, {}, control.mask_at, f"micro-batch {number} of past clicks")
                batch = micro_batch.batch.take(past.has(micro_batch.batch))
                if len(batch):
                    if trainer.guard.held:
                        # As in a replay, a hold does not stop learning of later records.
                        trainer.guard = trainer.guard.released()
                    trainer.step(batch)
                    rows, newest_ms = rows + len(batch), max(newest_ms, micro_batch.told_ms)
                    killpoints.reach("past.stepped")
                if self.elapsed() - logged_s >= PROGRESS_S:
                    logged_s = self.elapsed()
                    logger.info("%s rows of past clicks are learned in %.0f s", f"{rows:,}", logged_s - began_s)
        took_s, skipped = self.elapsed() - began_s, trainer.counters.skipped
        logger.info("all %s rows of past clicks are learned in %.1f s, %d skipped", f"{rows:,}", took_s, skipped)
        return rows, newest_ms


@contextmanager
def from_child(arguments: Sequence[str], stopping: threading.Event) -> Iterator[Iterator[bytes]]:
    """Yields the micro-batches that a child process with the same `arguments` makes; the child ends with the block.

    Raises:
        ProcessFailed: The child ended before all of them were made.
        SystemExit: This process is to end.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", CHILD, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        yield _read(child, stopping)
    finally:
        child.kill()
        child.communicate()


def _read(child: subprocess.Popen[bytes], stopping: threading.Event) -> Iterator[bytes]:
    assert child.stdout is not None, "it is a pipe"
    pipe, frames = child.stdout.fileno(), Frames()
    while not frames.ended:
        if stopping.is_set():
            logger.info("stopped; past clicks are learned from the first one at the next start")
            raise SystemExit(0)
        if not select.select([pipe], [], [], POLL_S)[0]:
            continue
        data = os.read(pipe, PIPE_BYTES)
        if not data:
            raise ProcessFailed(
                f"{CHILD} ended with exit code {child.wait()} before all past clicks were made into rows",
                "read the lines before this one; it begins again by itself",
            )
        yield from frames.take(data)


def beginning_of(registry: Registry, arguments: Sequence[str], stopping: threading.Event) -> Begins:
    """Returns how the trainer of a registry begins."""
    past = read_past(registry.path)
    return from_nothing if past is None else FromPast(past, partial(from_child, arguments, stopping))


def refuse(error: GapError) -> int:
    """Accepts no loss."""
    raise error


def open_after(
    log: Log,
    settings: Settings,
    end: LogRange,
    at: int,
    subject: str,
    do: str,
    lost: Callable[[GapError], int] = refuse,
) -> Reader:
    """Opens the training log at `at`, after the range `end` that `subject` was learned from; `lost` as in `open_topic`.

    Raises:
        UnknownTopic: The topic was recreated since.
        GapError: The log does not continue from there: deleted, or truncated (TruncatedLog).
    """
    topic, partition = settings.kafka.microbatches_topic, end.partition
    # The leader epochs of skipped records are unknown.
    leaders = {partition: end.leader_epoch} if at == end.next else {}
    reader, opening = open_topic(log, topic, [partition], Position(end.topic_id, {partition: at}, leaders), lost)
    if opening.recreated:
        reader.close()
        raise UnknownTopic(
            f"{subject} topic id {end.topic_id}, {topic} is now {opening.topic_id}: it was deleted and created again",
            do,
        )
    return reader


def resume(restored: Manifest, line: LogLine, log: Log, settings: Settings, passages: Passages) -> Reader:
    """Opens the log at the offset where `restored` continues along `line`.

    1. The version is loaded.
    2. The log is open at its offset.

    Nothing is written up to here, so after a crash the next start repeats both steps.
    """
    # 1.
    killpoints.reach("enter.restored")
    end = restored.log
    if not end.topic_id:
        # The version's log was lost with Kafka: the new log is read from its beginning.
        return log.reader(settings.kafka.microbatches_topic, [end.partition])
    at = passages.past(Source(end.topic_id, end.partition), onward(line, end.next))
    reader = open_after(
        log,
        settings,
        end,
        at,
        f"version {restored.version} was trained on",
        "restore the topic, or learn the new one from its beginning: `springtide upgrade --from-scratch --reason TEXT`",
        lambda error: onward(line, passages.pass_log(error, restored.marks)),
    )
    # 2.
    killpoints.reach("enter.opened")
    return reader
