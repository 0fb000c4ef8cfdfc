"""Delayed labels: the impressions of a stream that wait for an outcome, by the rules of `streaming.attribution`.

A batch of events passes twice. In the Beam thread, `attribute` decides which of its events wait, and which earlier
impressions they label. In the commit thread, `look_up` reads those impressions from the store, or from the current
cuts. The changes to the waiting rows are committed with histories and positions. So after a crash both continue from
the same event.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.accounts import StreamAccount
from state.config.settings import Settings
from state.errors import CorruptStore
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, WaitingStore, keys_of, place_of
from state.microbatch.batch import Kind, Known, counts_by_range
from state.positions import SHARES, Range, Source
from streaming.attribution import (
    IMPRESSION,
    OUTCOME,
    PLAIN,
    Arrived,
    Queue,
    Stretches,
    WaitingImpressions,
    attribute,
    enter,
    pairs,
)
from streaming.cut import Cut
from streaming.rows import Rows

LOADED_AT_ONCE = 10_000
logger = logging.getLogger(__name__)


class LookedUp(NamedTuple):
    """Completed cuts, and what is committed with them.

    Attributes:
        cuts: Including the columns of earlier impressions.
        waiting: Rows that begin to wait, by key; None for a row whose wait ends.
        extra: Values of the store's owner.
    """

    cuts: list[Cut]
    waiting: Changes
    extra: Extra


class Labels:
    """The waiting impressions of one stream, or of one bucket of its users.

    One thread calls `attribute`. One thread calls `look_up`, and commits its result before it calls again.

    Args:
        settings: `[labels]` and the actions are used.
        store: The committed waiting rows.
    """

    def __init__(self, settings: Settings, store: WaitingStore) -> None:
        labels = settings.labels
        named = {**dict.fromkeys(labels.impressions, IMPRESSION), **dict.fromkeys(labels.outcomes, OUTCOME)}
        self._roles = np.array([named.get(name, PLAIN) for name in settings.events.actions], np.uint8)
        # Each share of a partition has its part of the maximum: no share knows how many wait in another.
        self._wait_ms, self._most = round(labels.wait_s * 1000), -(-labels.max_waiting // SHARES)
        self._rows = WaitingRows(store)
        self._numbers: dict[tuple[str, int], int] = {}
        self._queue = self._load(store)

    def _load(self, store: WaitingStore) -> Queue:
        queue = Queue.of(1024, 1)
        rows = store.waiting()
        while chunk := list(itertools.islice(rows, LOADED_AT_ONCE)):
            assert self._rows.format is not None, "written with the first row"
            columns = self._rows.format.unpack([value for _, value in chunk])
            positions = [place_of(key) for key, _ in chunk]
            pair = pairs(*(columns.get(name, np.zeros(len(chunk), np.uint64)) for name in ("user", "item", "request")))
            offsets = np.array([offset for _, offset in positions], np.int64)
            partitions, at_ms = self._number([source for source, _ in positions]), columns["at_ms"]
            begun_ms = at_ms + columns.get("delay_ms", np.zeros(len(chunk), np.int64))
            queue = enter(queue, WaitingImpressions(offsets, at_ms, begun_ms, pair, columns["user"], partitions))
        return queue

    def _number(self, sources: Sequence[Source]) -> NDArray[np.int64]:
        """`[n]` int64, a number for the partition of each source, the same for all its buckets."""
        known = self._numbers
        return np.array([known.setdefault((one.topic_id, one.partition), len(known)) for one in sources], np.int64)

    def attribute(self, rows: Rows) -> Rows:
        """Decides which events wait, and which earlier impressions become known, by the clocks of `rows.told`."""
        batch, told = rows.batch, rows.told
        if not batch.ranges:
            return rows
        assert told is not None, "the event clock comes before the labels"
        role = self._roles[batch.action]
        role[(role == IMPRESSION) & ~np.isnan(batch.label)] = PLAIN
        request = batch.request if len(batch.request) else np.zeros(len(batch), np.uint64)
        pair = pairs(batch.user, batch.item, request)
        source = batch.source.astype(np.int64)
        self._queue, made = attribute(
            self._queue,
            Arrived(role, source, batch.offset, batch.at_ms, told.clock_ms, pair, batch.user),
            Stretches(
                self._number([part.source for part in batch.ranges]),
                np.array([part.first for part in batch.ranges], np.int64),
                np.array([part.next for part in batch.ranges], np.int64),
                told.moves.source.astype(np.int64),
                told.moves.offset,
                told.moves.clock_ms,
            ),
            self._wait_ms,
            self._most,
        )
        joined = np.flatnonzero(made.known == Kind.JOINED)
        by, count = made.by[joined], len(made.by)
        known = Known(
            by=made.by,
            source=made.stretch.astype(np.uint16),
            offset=made.at,
            opened=made.opened,
            kind=made.known,
            label=np.zeros(count, np.float32),
            weight=np.full(count, np.nan, np.float32),
            at_ms=made.opened_ms + self._wait_ms,
        )
        known.label[joined] = np.where(np.isnan(batch.label[by]), np.float32(1.0), batch.label[by])
        known.weight[joined] = batch.weight[by]
        known.at_ms[joined] = batch.at_ms[by]
        ranges = counted(batch.ranges, batch.source, made.kind, known.source, made.known)
        delay_ms = np.where(made.kind == Kind.OPENED, np.minimum(told.clock_ms - batch.at_ms, 0), 0)
        return replace(rows, batch=replace(batch, ranges=ranges), kind=made.kind, known=known, delay_ms=delay_ms)

    def look_up(self, cuts: Sequence[Cut]) -> LookedUp:
        """Completes cuts with the columns of the earlier impressions.

        Raises:
            CorruptStore: The store lacks one.
        """
        found = LookedUp([], {}, {})
        for cut in cuts:
            pieces = []
            for piece in cut.pieces:
                if piece.known is not None:
                    piece = replace(piece, known=self._complete(piece, piece.known, found))
                pieces.append(piece)
            found.cuts.append(replace(cut, pieces=tuple(pieces)))
        return found

    def _complete(self, piece: Rows, known: Known, found: LookedUp) -> Known:
        batch, events = piece.batch, piece.events
        sources = [part.source for part in batch.ranges]
        now = self._rows.adopt(events, found.waiting, found.extra)
        waits = np.flatnonzero(piece.kind == Kind.OPENED)
        if len(waits):
            keys = keys_of(sources, batch.source[waits], batch.offset[waits])
            rows = now.pack({name: column[waits] for name, column in events.items()})
            found.waiting.update(zip(keys, rows, strict=True))
        if not len(known):
            return replace(known, columns={})
        keys = keys_of(sources, known.source, known.opened)
        values = [value for value in self._rows.values(keys, found.waiting) if value is not None]
        if len(values) != len(keys):
            raise CorruptStore(
                f"{len(keys) - len(values)} rows that wait are not in the store",
                "`springtide rebuild-history` makes it anew",
            )
        found.waiting.update(dict.fromkeys(keys))
        return replace(known, columns=relabelled(now.unpack(values), known))


def relabelled(opened: dict[str, NDArray[Any]], known: Known) -> dict[str, NDArray[Any]]:
    """The columns of impressions with their labels, at the position where the labels became known.

    Args:
        opened: Their columns as they began to wait, `[m]`.
        known: Their labels.
    """
    return opened | {
        "kind": known.kind,
        "label": known.label,
        "weight": np.where(np.isnan(known.weight), opened["weight"], known.weight),
        "source": known.source,
        "offset": known.offset,
        "waited": known.offset - known.opened,
        "delay_ms": known.at_ms - opened["at_ms"],
        "request": np.zeros(len(known), np.uint64),
    }


def counted(
    ranges: Sequence[Range],
    source: NDArray[np.uint16],
    kind: NDArray[np.uint8],
    known_source: NDArray[np.uint16],
    known: NDArray[np.uint8],
) -> tuple[Range, ...]:
    """Ranges with rows counted by kind, including the earlier impressions that became known in them."""
    sources, kinds = np.concatenate([source, known_source]), np.concatenate([kind, known])
    kept = ("dead", "filtered", "absent", "gap", "masked", "elsewhere")
    return tuple(
        Range(part.source, part.first, part.next, **{name: getattr(part, name) for name in kept}, **found)
        for part, found in zip(ranges, counts_by_range(kinds, sources, len(ranges)), strict=True)
    )


def forget_other_topics(store: HistoryStore, topic_id: str) -> int:
    """Drops waiting impressions of another topic, whose outcomes can no longer arrive; returns how many."""
    dropped = {
        source: waiting
        for source, counts in store.counts().items()
        if source.topic_id != topic_id and (waiting := StreamAccount.of(counts).waiting)
    }
    if not dropped:
        return 0
    ended: Changes = {key: None for key, _ in store.waiting() if place_of(key)[0] in dropped}
    at = store.positions()
    ranges = [Range(source, at[source], at[source], dropped=count) for source, count in dropped.items()]
    store.commit(Appends.none(), ranges, waiting=ended)
    logger.warning("%d impressions of a topic that was made anew since then wait no longer: dropped", len(ended))
    return len(ended)


def unused_kernels(settings: Settings) -> Sequence[str]:
    """The modules with kernels that a stream of these settings does not call, unless earlier impressions still wait."""
    return () if settings.labels.impressions else ("streaming.attribution",)


def open_labels(settings: Settings, store: HistoryStore, topic_id: str) -> Labels | None:
    """Opens the labels, as the store and the settings require; None if neither has impressions that wait."""
    if store.waiting_rows():
        forget_other_topics(store, topic_id)
    if not settings.labels.impressions and not store.waiting_rows():
        return None
    labels = Labels(settings, store)
    logger.info("%d impressions wait for their label", store.waiting_rows())
    return labels
