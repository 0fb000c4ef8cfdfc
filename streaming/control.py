"""Applies control to the stream: masked clicks, branch of the training log, rollback, and erased users.

A stream without a registry leaves no clicks out, and continues in the epoch of its histories. A running stream polls
control ten times a second. When control changes, the job ends in order and is opened again in the same process, as
after a restart. Before any click is read:

1. The writer of the stream is opened, which fences any other writer. So the log contains everything that the stream
   wrote on its old branch.
2. The histories are rolled back to the branch point in one commit. After a crash before the commit, it is repeated.
3. Erased users are removed from them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
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
from state.history.rewinding import LogToRead, rewind
from state.history.store import HistoryStore
from state.log import Log, Reader
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.batch import trim
from state.positions import Source
from state.process import killpoints
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.hosts import ErasureReport, write_erasure_report
from state.registry.log_line import LogLine
from streaming.event_clock import PREFIX, EventClock, agreed_on

POLL_S = 0.1
LETTERS = "letters"  # name of the store's extra
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desired:
    """The state that control requests of the stream.

    Attributes:
        branch: The branch of the training log; the stream writes its last epoch.
    """

    branch: LogLine
    mask: Mask = Mask.NONE

    @property
    def log_epoch(self) -> int:
        """The epoch of the training log that is written."""
        return self.branch[-1].epoch


class ControlWatch:
    """Polls control for one stream. Not thread-safe.

    Args:
        registry: The registry's directory, which need not exist.

    Raises:
        RegistryError: Control cannot be read.
        StoreError: The histories have a later epoch of the training log than control knows.
    """

    def __init__(self, registry: Path, own: LogLine, clock: Callable[[], float] = time.monotonic) -> None:
        self._own, self._clock = own, clock
        self._control = ControlPoll(registry)
        self._polled_s, self._again_s = float("-inf"), float("inf")
        self.desired = self._wanted(self._control.read())
        if self.desired.log_epoch < own[-1].epoch:
            raise StoreError(
                f"the histories belong to epoch {own[-1].epoch} of the training log, but control in {registry} has epoch "
                f"{self.desired.log_epoch}: this is another registry, or an older copy of it",
                "restore the registry, or run `springtide rebuild-history`, which rebuilds the histories of that epoch",
            )

    def open_again_in(self, seconds: float | None) -> None:
        """Schedules the stream to be opened again in `seconds`, even if control does not change; None cancels it."""
        self._again_s = float("inf") if seconds is None else self._clock() + seconds

    def changed(self) -> bool:
        """Whether control has changed, or the stream is to be opened again; polls at most once per `POLL_S`."""
        now_s = self._clock()
        if now_s >= self._again_s:
            return True
        if now_s - self._polled_s < POLL_S:
            return False
        self._polled_s = now_s
        return self._wanted(self._control.poll()) != self.desired

    def _wanted(self, control: Control | None) -> Desired:
        return Desired(self._own) if control is None else Desired(control.log, control.mask)


def written_dead_letters(store: HistoryStore) -> dict[Source, int]:
    """By source, the offset below which each dead letter is already in its topic; set if the stream was rolled back."""
    return {Source.parse(source): int(after) for source, after in json.loads(store.extra(LETTERS) or b"{}").items()}


def clocks_after(before: Before, own: Collection[Source]) -> dict[str, bytes | None]:
    """The store's extras of the event clock after a rollback, computed from the latest clicks of our sources.

    A source whose position did not change keeps its clock. If too few users of a rolled-back source clicked lately, the
    time that was believed then has votes in addition, so that no single user decides the clock.
    """
    begun = clocks_before(before)
    clock, state, marks = EventClock(begun.get), dict(begun), dict[Source, int]()
    for batch in before.latest:
        new, marks = trim(batch, marks)
        is_own = np.array([part.source in own for part in batch.header.ranges] or [False])
        rows = batch.take(new & is_own[batch.source])
        state |= clock.follow(rows, batch.header.ranges, batch.header.created_ms).state
    names = [PREFIX + "all", *(PREFIX + str(source) for source in before.timed)]
    return {name: state.get(name) for name in names} if before.timed else {}


def clocks_before(before: Before) -> dict[str, bytes]:
    """States of the event clock with which to follow the latest clicks, for sources of which these are too few.

    They are the times that readers believed before the first such click of a source; without one, those of all sources
    after the last click.
    """
    begins, believed = dict[Source, tuple[int, int]](), list[tuple[int, int]]()
    for batch in before.latest:
        # Records of earlier releases have no clocks.
        for part, (begin_ms, end_ms) in zip(batch.header.ranges, batch.header.clocks, strict=False):
            begins.setdefault(part.source, (begin_ms, batch.header.created_ms))
            believed.append((end_ms, batch.header.created_ms))
    untimed = before.untimed
    if not untimed or not believed:
        return {}
    states = {PREFIX + str(source): agreed_on(*begins.get(source, max(believed))) for source in untimed}
    return {PREFIX + "all": agreed_on(*min(begins.values())), **states}


def roll_back_histories(
    log: Log, settings: Settings, spec: FeatureSpec, store: HistoryStore, desired: Desired
) -> dict[Source, int]:
    """Rolls `store` back to the desired branch; returns `written_dead_letters`.

    Raises:
        GapError: The training log no longer reaches back to the branch point.
        LogError: The log cannot be read.
        StoreFull: Nothing was changed.
    """
    killpoints.reach("stream.fenced")
    positions = store.positions()
    written = written_dead_letters(store)
    written |= {source: max(after, written.get(source, 0)) for source, after in positions.items()}
    letters = {LETTERS: json.dumps({str(source): after for source, after in written.items()}).encode()}

    def extra(_: int, before: Before) -> dict[str, bytes | None]:
        return {**letters, **clocks_after(before, positions.keys())}

    def open_at(offset: int) -> Reader:
        return log.reader(settings.kafka.microbatches_topic, [TRAINING_PARTITION], {TRAINING_PARTITION: offset})

    training_log = LogToRead(open_at, spec.reach_ms(settings.events))
    result = rewind(store, desired.branch, training_log, extra=extra, timed=True)
    if result is not None:
        logger.info("epoch %d of the training log: %s", desired.log_epoch, result)
    return written_dead_letters(store)


def report_erasures(registry: Path, applied: ErasureReport, warn: Callable[[str], None]) -> bool:
    """Reports to the registry which erasures were applied; returns whether it succeeded, and calls `warn` if not."""
    try:
        write_erasure_report(registry, applied)
    except OSError as error:
        warn(f"applied erasures cannot be reported in {registry}: {error}")
        return False
    return True


def compaction_is_due(store: HistoryStore, erased: Erased, now_ms: int) -> bool:
    """Whether the stream's stores must be rewritten, so that free pages contain no data of erased users."""
    due_ms = replace(store.forgotten, through=erased.last).due_ms()
    return due_ms is not None and now_ms >= due_ms


def apply_erasures(store: HistoryStore, registry: Path, erased: Erased, now_ms: int) -> float | None:
    """Removes erased users from `store` and reports it; after a crash in between, both steps are repeated.

    The store must already be rolled back to its branch of the log.

    Returns:
        In how many seconds the store must be rewritten; None if it need not be.

    Raises:
        CorruptStore: A waiting row cannot be read.
        StoreFull: Nothing was changed.
    """
    if not erased:
        return None
    before, after = store.forgotten, store.forget(erased)
    killpoints.reach("stream.forgotten")
    if after.through > before.through:
        logger.info("erasure %d: users are removed from the histories", after.through)
    began_s = time.monotonic()
    try:
        after = store.compact_if_due(now_ms)
    except StoreFull as full:
        logger.warning("free pages keep bytes of erased users: %s", full)
    if after.pages > before.pages:
        logger.info("the histories were rewritten without free pages in %.1f s", time.monotonic() - began_s)
    folder = store.path.parent
    applied = ErasureReport(folder.name, HOST, str(folder), after.through, after.pages, 0, now_ms)
    report_erasures(registry, applied, logger.warning)
    due_ms = after.due_ms()
    if due_ms is None:
        return None
    # If there was no space, it is tried again later.
    return (due_ms - now_ms if due_ms > now_ms else PAGES_MS) / 1000
