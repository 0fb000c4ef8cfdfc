"""Rolls the stream's histories back to the training log's branch point, before any click is read.

The writer of the shard is opened first, which fences any other one. So the log contains all that this shard wrote on
its old branch. A crash before the histories are rolled back leaves the same to be done, with another writer that fences
this one. After that, the first record that is written has the new epoch.

Dead letters are in their topic only once: those already written are recorded, and not written again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.history.before import Before
from state.history.rewinding import go_back
from state.history.store import HistoryStore
from state.log import Log, Reader
from state.microbatch.batch import trim
from state.positions import Source
from state.process import killpoints
from streaming.desired import Desired
from streaming.event_clock import EventClock, clock_names
from streaming.rebuild_log import part_of

LETTERS = "letters"  # name of the store's extra
PARTITION = 0
logger = logging.getLogger(__name__)


def letters_told(store: HistoryStore) -> dict[Source, int]:
    """By source the offset below which every dead letter is already in its topic, if the stream was rolled back."""
    return {Source.parse(source): int(after) for source, after in json.loads(store.extra(LETTERS) or b"{}").items()}


def clocks_after(before: Before, ours: Collection[Source]) -> dict[str, bytes | None]:
    """The store's extras of the event clock after a rollback, computed from the latest clicks of our sources.

    A source that has not moved since keeps its clock. If no recent click of a rolled-back source was found, its clock
    starts again with its next click.
    """
    clock, state, marks = EventClock(lambda _: None), dict[str, bytes](), dict[Source, int]()
    for batch in before.latest:
        mine = part_of(batch, [part.source in ours for part in batch.header.ranges])
        if mine is not None:
            new, marks = trim(mine, marks)
            state |= clock.follow(mine.take(new), mine.header.ranges, mine.header.created_ms).state
    return {name: state.get(name) for name in clock_names(before.timed)} if before.timed else {}


def take_back(
    log: Log, settings: Settings, spec: FeatureSpec, store: HistoryStore, desired: Desired
) -> dict[Source, int]:
    """Rolls `store` back to the desired branch; returns `letters_told`.

    Raises:
        GapError: The training log no longer reaches back to the branch point.
        LogError: The log cannot be read.
        StoreFull: Nothing was changed.
    """
    killpoints.reach("stream.fenced")
    told = letters_told(store)
    told |= {source: max(after, told.get(source, 0)) for source, after in store.positions().items()}
    letters = {LETTERS: json.dumps({str(source): after for source, after in told.items()}).encode()}
    ours = store.positions().keys()

    def extra(_: int, before: Before) -> dict[str, bytes | None]:
        return {**letters, **clocks_after(before, ours)}

    def open_at(offset: int) -> Reader:
        return log.reader(settings.kafka.microbatches_topic, [PARTITION], {PARTITION: offset})

    reach_ms = 1000 * round(spec.windows_s[-1] + settings.events.max_age_s)
    found = go_back(store, desired.line, open_at, PARTITION, reach_ms, extra=extra, timed=True)
    if found is not None:
        logger.info("epoch %d of the training log: %s", desired.log_epoch, found)
    return letters_told(store)
