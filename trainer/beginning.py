"""Where a trainer without a version to start from begins: with no knowledge, or, for some experiments, with past clicks.

Past clicks are learned before the training log. A child process makes their micro-batches (`streaming/past.py`); each
one is one step. They are the stream's micro-batches of the same clicks; `state.experiments.past.Past` defines which of
their rows count. No version is kept before all of the past is learned. After a crash the next start learns it
again from the first click.
"""

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
from functools import partial
from typing import Any, NamedTuple, Protocol

from state.config.settings import Settings
from state.errors import ProcessFailed
from state.experiments.past import Past, read_past
from state.features.spec import FeatureSpec
from state.log import Log, Reader
from state.microbatch.codec import Frames
from state.process import killpoints
from state.registry.control import Control
from state.registry.log_line import onward
from state.registry.registry import Registry
from trainer.engine.step import Trainer
from trainer.intake import take_in
from trainer.place import TrainingPlace
from trainer.resume import open_after
from trainer.versions import checkpoint
from trainer.versions.carrying import nothing_learned

LOOK_S, PROGRESS_S = 0.2, 10.0
PIPE_BYTES = 1 << 20
CHILD = "streaming.past"
logger = logging.getLogger(__name__)

Records = Callable[[], AbstractContextManager[Iterator[bytes]]]
"""A context manager that yields the encoded micro-batches of the past."""


class PastLearning:
    """Lets a trainer learn past clicks. One thread.

    Args:
        past: The clicks and the cut.
        records: Gives their micro-batches.
        elapsed: Monotonic seconds.
    """

    def __init__(self, past: Past, records: Records, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._past, self._records, self._elapsed = past, records, elapsed

    def learn(self, settings: Settings, trainer: Trainer, salt: str, control: Control) -> TrainingPlace:
        """Lets `trainer` learn the past; returns the position at the cut.

        Args:
            settings: All settings.
            trainer: Has learned nothing.
            salt: Fingerprint of the users' salt.
            control: Its masks count, and its erasures are taken into account.

        Raises:
            MicroBatchError, SpecMismatch, SaltMismatch: The micro-batches do not fit this trainer.
            ProcessFailed, SystemExit: See `from_child`.
        """
        spec, past, began_s = FeatureSpec.from_settings(settings).digest, self._past, self._elapsed()
        said_s, rows, records, told_ms = began_s, 0, 0, 0
        logger.info("learning past clicks up to live version %d, offset %d", past.version, past.log.next)
        with self._records() as made:
            for value in made:
                records += 1
                found = take_in(value, {}, control.mask_at, spec, salt, f"micro-batch {records} of past clicks")
                batch = found.batch.take(past.has(found.batch))
                if len(batch):
                    if trainer.guard.held:
                        # As in a replay: later records may be learned from again.
                        trainer.guard = trainer.guard.released()
                    trainer.step(batch)
                    rows, told_ms = rows + len(batch), max(told_ms, found.told_ms)
                    killpoints.reach("past.stepped")
                if self._elapsed() - said_s >= PROGRESS_S:
                    said_s = self._elapsed()
                    logger.info("%s rows of past clicks are learned in %.0f s", f"{rows:,}", said_s - began_s)
        took_s, skipped = self._elapsed() - began_s, trainer.counters.skipped
        logger.info("all %s rows of past clicks are learned in %.1f s, %d skipped", f"{rows:,}", took_s, skipped)
        killpoints.reach("past.learned")
        at = onward(control.log, past.log.next)
        return TrainingPlace(
            control.epoch,
            parent=0,
            first=at,
            next=at,
            marks=past.marks,
            rows=rows,
            durable_first=at,
            told_ms=told_ms,
            # The users of these erasures were left out.
            erased=control.erased.last,
        )

    def open_behind(self, log: Log, settings: Settings, control: Control) -> Reader:
        """The training log at the cut.

        Raises:
            GapError: It does not reach back to the cut any more.
            UnknownTopic: It was recreated since the cut.
        """
        cut = self._past.log
        return open_after(
            log,
            settings,
            cut,
            onward(control.log, cut.next),
            f"the past ends at offset {cut.next} of",
            "stop the experiment, and start another: `springtide experiment stop NAME --reason TEXT`",
        )


@contextmanager
def from_child(arguments: Sequence[str], stopping: threading.Event) -> Iterator[Iterator[bytes]]:
    """The micro-batches that a child makes, which ends with the block.

    Args:
        arguments: The command line of this process: the child has the same settings.
        stopping: Set when this process is to end.

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
        if not select.select([pipe], [], [], LOOK_S)[0]:
            continue
        data = os.read(pipe, PIPE_BYTES)
        if not data:
            raise ProcessFailed(
                f"{CHILD} ended with exit code {child.wait()} before all past clicks were made into rows",
                "read the lines before this one; it begins again by itself",
            )
        yield from frames.take(data)


class Beginning(NamedTuple):
    """The position at which a trainer begins.

    Attributes:
        log: The training log, open at the position.
        place: The position.
        tensors: What the first base holds.
    """

    log: Reader
    place: TrainingPlace
    tensors: Mapping[str, Any]


class Begins(Protocol):
    """Prepares a trainer for its first epoch."""

    def __call__(
        self, settings: Settings, trainer: Trainer, about: Mapping[str, Any], log: Log, control: Control
    ) -> Beginning:
        """When this returns, the trainer has learned everything that it begins with.

        Args:
            settings: All settings.
            trainer: Is cleared first.
            about: The bootstrap's document of the feature spec.
            log: The log with the training log.
            control: The generation whose epoch begins.
        """
        ...


def from_nothing(
    settings: Settings, trainer: Trainer, about: Mapping[str, Any], log: Log, control: Control
) -> Beginning:
    """Starts from scratch, with the training log from its beginning."""
    reader = log.reader(settings.kafka.microbatches_topic, [settings.trainer.partition])
    begin = reader.position(settings.trainer.partition)
    place = TrainingPlace(control.epoch, parent=0, first=begin, next=begin, durable_first=begin)
    return Beginning(reader, place, nothing_learned(trainer, about))


def from_past(
    learning: PastLearning,
    settings: Settings,
    trainer: Trainer,
    about: Mapping[str, Any],
    log: Log,
    control: Control,
) -> Beginning:
    """Starts with past clicks, and the training log from the cut on.

    1. The past is learned; after a crash here it is learned again.
    2. The log is opened at the cut.

    Raises:
        GapError: The log does not reach back to the cut any more.
        UnknownTopic: The log was recreated since the cut.
        SpringtideError: See `PastLearning.learn`.
    """
    # 1.
    checkpoint.begin(trainer, about)
    place = learning.learn(settings, trainer, str(about["salt"]), control)
    # 2.
    reader = learning.open_behind(log, settings, control)
    # The next version need not repeat the content of this one.
    return Beginning(reader, place, checkpoint.changes(trainer) | checkpoint.full(trainer))


def beginning_of(registry: Registry, arguments: Sequence[str], stopping: threading.Event) -> Begins:
    """How the trainer of a registry begins.

    Args:
        registry: The trainer's own.
        arguments: The command line of this process.
        stopping: Set when the process is to end.

    Raises:
        RegistryError: The request for past clicks cannot be read.
    """
    past = read_past(registry.path)
    if past is None:
        return from_nothing
    return partial(from_past, PastLearning(past, partial(from_child, arguments, stopping)))
