"""Brings the stream to what control asks: masked clicks, branch of the training log, rollback, and erased users.

A stream without a registry leaves no clicks out, and continues in the epoch of its histories. A running stream polls
control ten times a second. When control changes, the job ends in order and is opened again in the same process, as
after a restart. Then, before any click is read, the histories are rolled back to the branch point, and erased users are
removed from them.

The writer of the stream is opened first, which fences any other one. So the log contains all that the stream wrote on
its old branch. A crash before the histories are rolled back leaves the same to be done, with another writer that fences
this one. After that, the first record that is written has the new epoch.

Dead letters are in their topic only once: those already written are recorded, and not written again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from state.config.settings import Settings
from state.disk.files import HOST
from state.disk.lmdb_store import PAGES_MS
from state.errors import StoreError, StoreFull
from state.features.erased import Erased
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.rewind import Before
from state.history.rewinding import rewind
from state.history.store import HistoryStore
from state.log import Log, Reader
from state.microbatch.batch import trim
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.erasing import ErasureReport, report
from state.registry.log_line import WHOLE, LogLine
from streaming.event_clock import EventClock, clock_names

LOOK_S = 0.1


@dataclass(frozen=True)
class Desired:
    """What control asks of the stream.

    Attributes:
        line: The branch of the training log; the stream writes its last epoch.
        mask: The clicks that are left out.
    """

    line: LogLine
    mask: Mask = Mask.NONE

    @property
    def log_epoch(self) -> int:
        """The epoch of the training log that is written.

        >>> from state.registry.log_line import WHOLE
        >>> Desired(WHOLE).log_epoch
        1
        """
        return self.line[-1].epoch


NOTHING_DESIRED = Desired(WHOLE)


class ControlWatch:
    """Polls control for one shard. Not thread-safe.

    Args:
        registry: The registry's directory, which need not exist.
        own: The branch that the histories belong to.
        clock: Monotonic clock in seconds.

    Raises:
        RegistryError: Control cannot be read.
        StoreError: The histories have a later epoch of the training log than control knows.
    """

    def __init__(self, registry: Path, own: LogLine, clock: Callable[[], float] = time.monotonic) -> None:
        self._own, self._clock = own, clock
        self._control = ControlPoll(registry)
        self._looked_s, self._again_s = float("-inf"), float("inf")
        self.desired = self._wanted(self._control.read())
        if self.desired.log_epoch < own[-1].epoch:
            raise StoreError(
                f"the histories are of epoch {own[-1].epoch} of the training log, and control in {registry} knows "
                f"{self.desired.log_epoch}: it is another registry, or an older copy of it",
                "restore the registry, or run `springtide rebuild-history`, which makes the histories of its epoch",
            )

    def open_again_in(self, seconds: float | None) -> None:
        """Schedules the shard to be opened again in `seconds`, whatever control asks for; None cancels it."""
        self._again_s = float("inf") if seconds is None else self._clock() + seconds

    def changed(self) -> bool:
        """Whether control has changed, or the shard is to be opened again; polls control at most once per `LOOK_S`."""
        now_s = self._clock()
        if now_s >= self._again_s:
            return True
        if now_s - self._looked_s < LOOK_S:
            return False
        self._looked_s = now_s
        return self._wanted(self._control.poll()) != self.desired

    def _wanted(self, control: Control | None) -> Desired:
        return Desired(self._own) if control is None else Desired(control.log, control.mask)


LETTERS = "letters"  # name of the store's extra
PARTITION = 0
logger = logging.getLogger(__name__)


def written_letters(store: HistoryStore) -> dict[Source, int]:
    """By source the offset below which every dead letter is already in its topic, if the stream was rolled back."""
    return {Source.parse(source): int(after) for source, after in json.loads(store.extra(LETTERS) or b"{}").items()}


def clocks_after(before: Before, ours: Collection[Source]) -> dict[str, bytes | None]:
    """The store's extras of the event clock after a rollback, computed from the latest clicks of our sources.

    A source that has not moved since keeps its clock. If no recent click of a rolled-back source was found, its clock
    starts again with its next click.
    """
    clock, state, marks = EventClock(lambda _: None), dict[str, bytes](), dict[Source, int]()
    for batch in before.latest:
        new, marks = trim(batch, marks)
        mine = np.array([part.source in ours for part in batch.header.ranges] or [False])
        rows = batch.take(new & mine[batch.source])
        state |= clock.follow(rows, batch.header.ranges, batch.header.created_ms).state
    return {name: state.get(name) for name in clock_names(before.timed)} if before.timed else {}


def roll_back_histories(
    log: Log, settings: Settings, spec: FeatureSpec, store: HistoryStore, desired: Desired
) -> dict[Source, int]:
    """Rolls `store` back to the desired branch; returns `written_letters`.

    Raises:
        GapError: The training log no longer reaches back to the branch point.
        LogError: The log cannot be read.
        StoreFull: Nothing was changed.
    """
    killpoints.reach("stream.fenced")
    told = written_letters(store)
    told |= {source: max(after, told.get(source, 0)) for source, after in store.positions().items()}
    letters = {LETTERS: json.dumps({str(source): after for source, after in told.items()}).encode()}
    ours = store.positions().keys()

    def extra(_: int, before: Before) -> dict[str, bytes | None]:
        return {**letters, **clocks_after(before, ours)}

    def open_at(offset: int) -> Reader:
        return log.reader(settings.kafka.microbatches_topic, [PARTITION], {PARTITION: offset})

    found = rewind(store, desired.line, open_at, PARTITION, spec.reach_ms(settings.events), extra=extra, timed=True)
    if found is not None:
        logger.info("epoch %d of the training log: %s", desired.log_epoch, found)
    return written_letters(store)


def report_erasures(registry: Path, told: ErasureReport, say: Callable[[str], None]) -> bool:
    """Reports to the registry which erasures were applied; returns whether it succeeded, and calls `say` if not."""
    try:
        report(registry, told)
    except OSError as error:
        say(f"how far erasures are taken into account cannot be told in {registry}: {error}")
        return False
    return True


def compaction_is_due(store: HistoryStore, erased: Erased, now_ms: int) -> bool:
    """Whether the stores of this shard must be rewritten, so that free pages contain no data of erased users."""
    told = store.forgotten
    return told.pages < erased.last and now_ms >= told.paged_ms + PAGES_MS


def apply_erasures(store: HistoryStore, registry: Path, erased: Erased, now_ms: int) -> float | None:
    """Removes erased users from `store`, and reports it; after a crash in between, the same work is due again.

    Args:
        store: The shard's store, already rolled back to its branch of the log.
        registry: Where to report.
        erased: All erasures.
        now_ms: Wall clock.

    Returns:
        In how many seconds the store must be rewritten; None if it need not be.

    Raises:
        CorruptStore: A waiting row cannot be read.
        StoreFull: Nothing was changed.
    """
    if not erased:
        return None
    before, told = store.forgotten, store.forget(erased)
    killpoints.reach("stream.forgotten")
    if told.through > before.through:
        logger.info("erasure %d: users are forgotten here", told.through)
    began_s = time.monotonic()
    try:
        told = store.compact_if_due(now_ms)
    except StoreFull as full:
        logger.warning("free pages keep bytes of erased users: %s", full)
    if told.pages > before.pages:
        logger.info("the histories are written anew, without free pages, in %.1f s", time.monotonic() - began_s)
    shard = store.path.parent
    report_erasures(
        registry, ErasureReport(shard.name, HOST, str(shard), told.through, told.pages, 0, now_ms), logger.warning
    )
    due_ms = told.due_ms()
    if due_ms is None:
        return None
    # If there was no space, it is tried again later.
    return (due_ms - now_ms if due_ms > now_ms else PAGES_MS) / 1000
