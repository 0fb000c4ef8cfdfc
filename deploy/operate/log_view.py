"""A command's view of the training log and the clicks topic: their ends, and a scan for rows that a mask names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.formats import age
from state import layout
from state.config.settings import Settings
from state.errors import CorruptVersion, LogError, SpringtideError, UnfitVersion, UnknownVersion
from state.features.erased import MaskedUsers
from state.features.mask import Mask, MaskAt
from state.history.branch_records import branch_records
from state.log import Log, Reader
from state.log.accepted_gaps import Journal, past
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.batch import MicroBatch, masked, trained, trim
from state.microbatch.codec import decode_events
from state.positions import Source
from state.registry.control import MaskEntry
from state.registry.log_line import LogLine, onward
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry
from state.registry.segments import LogSegment

ASK_KAFKA_S = 5.0
ASK_BRIEFLY_S = 1.0
STALLED_S = 30.0


def open_log(settings: Settings) -> Log:
    """Opens the log of these settings."""
    return Log(settings.kafka)


@dataclass(frozen=True)
class LogView:
    """The state of training log and clicks topic at one moment.

    Attributes:
        begin: The first kept offset of the training log's partition.
        end: The offset of its next record.
        clicks: By partition of the clicks topic, its first kept and its next offset.
    """

    log: Log
    topic: str
    topic_id: str
    begin: int
    end: int
    clicks_id: str
    clicks: Mapping[int, tuple[int, int]]

    def reader(self, offset: int) -> Reader:
        """Returns a reader of the training log from `offset` on.

        Raises:
            LogError: The log cannot be read.
        """
        return self.log.reader(self.topic, [TRAINING_PARTITION], {TRAINING_PARTITION: offset})

    def reaches(self, registry: Registry, version: Manifest) -> bool:
        """Returns whether the trainer could continue from a version, across accepted gaps."""
        accepted = Journal(registry.path / layout.GAPS).accepted()
        return past(accepted, Source(self.topic_id, TRAINING_PARTITION), version.log.next) >= self.begin

    def require_reach(self, registry: Registry, version: Manifest) -> None:
        """Checks that the trainer could continue from a version.

        Raises:
            UnfitVersion: The log begins after the version's position, or the topic was recreated since.
        """
        if version.log.topic_id and version.log.topic_id != self.topic_id:
            raise UnfitVersion(
                f"version {version.version} was trained on topic id {version.log.topic_id}, {self.topic} is now {self.topic_id}: "
                "the topic was recreated, so the trainer cannot continue from there",
                f"keep answers at it with `springtide pin {version.version}`, or restore the topic",
            )
        if not self.reaches(registry, version):
            raise UnfitVersion(
                f"version {version.version} continues at offset {version.log.next} and the training log begins at {self.begin}: it can "
                "serve, but training cannot continue from it",
                f"keep answers at it with `springtide pin {version.version}`, or take a version that is not marked "
                "`serve only` in `springtide versions`",
            )


def view_of(settings: Settings, patience_s: float = ASK_KAFKA_S) -> LogView | None:
    """Requests the ends of both topics from Kafka; None if it does not answer in time or a topic does not exist."""
    kafka = settings.kafka.within(patience_s)
    try:
        log = open_log(replace(settings, kafka=kafka))
        topics = log.topics()
        try:
            ends = topics.ends(kafka.microbatches_topic)[TRAINING_PARTITION]
            return LogView(
                log,
                kafka.microbatches_topic,
                topics.describe(kafka.microbatches_topic).topic_id,
                *ends,
                topics.describe(kafka.clicks_topic).topic_id,
                topics.ends(kafka.clicks_topic),
            )
        finally:
            topics.close()
    except (LogError, KeyError):
        return None


def horizon(registry: Registry, view: LogView, now_ms: int) -> dict[str, Any] | None:
    """Returns how far back a rollback can go: number and age of the oldest version that it can return to; None for none.

    The version is of the newest one's branch, and the training log is complete from it on.
    """
    numbers = registry.versions()
    with suppress(CorruptVersion, UnknownVersion):
        branch = registry.manifest(numbers[-1]).visible if numbers else ()
        for number in numbers:
            # Versions that are damaged, or removed in the meantime, are skipped.
            with suppress(CorruptVersion, UnknownVersion):
                if sees(branch, number) and view.reaches(registry, version := registry.manifest(number)):
                    return {"version": number, "age_s": max(0, now_ms - version.created_at_ms) / 1000}
    return None


def horizon_here(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the horizon of these settings; None if it is unknown: no registry, or no answer from Kafka."""
    if not settings.registry_dir.is_dir():
        return None
    try:
        view = view_of(settings, ASK_BRIEFLY_S)
        return None if view is None else horizon(Registry(settings.registry_dir), view, now_ms)
    except (SpringtideError, OSError):
        return None


def horizon_text(horizon_found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the horizon for `springtide status`: a keyword and a description.

    >>> horizon_text({"version": 7, "age_s": 5400.0})
    ('reaches', 'back 1 h 30 min, to version 7')
    """
    return "reaches", f"back {age(horizon_found['age_s'])}, to version {horizon_found['version']}"


@dataclass(frozen=True, slots=True)
class FirstHit:
    """The first masked row: the control epoch in which its record was read, and the record's offset in the training log."""

    epoch: int
    offset: int


@dataclass
class Counted:
    """What the trainer will read between a version and the log's end.

    Attributes:
        rows: Rows to learn from, each counted once.
        masked: How many of these rows are masked.
        users: Users of the rows that new masks exclude.
        after: Rows after a masked row of the same user, so soon after it that their windows include it.
        by_mask: By id of each new mask, the number of its rows, and their users.
    """

    records: int = 0
    rows: int = 0
    masked: int = 0
    users: set[int] = field(default_factory=set)
    after: int = 0
    by_mask: dict[int, tuple[int, set[int]]] = field(default_factory=dict)


def records(reader: Reader, first: int, end: int, branch: LogLine) -> Iterator[tuple[int, MicroBatch]]:
    """Yields the records of a branch at offsets from `first` up to `end`, exclusive, with their offsets.

    Features are not decoded.

    Raises:
        LogError: No record arrived for `STALLED_S`, or the log cannot be read.
    """
    at = onward(branch, first)
    return branch_records(reader, at, end, branch, decode_events, STALLED_S) if at < end else iter(())


def first_hit(reader: Reader, segments: Sequence[LogSegment], mask: Mask, exact: bool) -> FirstHit | None:
    """Finds the first row along the branch that `mask` names and that was learned; None if there is none.

    Args:
        reader: Reads the training log.
        segments: The segments of the branch, oldest first, each with its masks at that time.
        mask: The mask.
        exact: Whether to include rows that were not learned: events for histories only, and rows already masked.

    Raises:
        LogError: The log cannot be read.
    """
    for segment in segments:
        for offset, batch in records(reader, segment.first, segment.next, segment.line):
            hit = masked(batch, mask)
            if not exact:
                hit &= trained(batch.kind)
                if hit.any() and (already := segment.mask_at(batch.header.mask_generation)):
                    hit &= ~masked(batch, already)
            if hit.any():
                return FirstHit(segment.epoch, offset)
    return None


class Counting:
    """Counts rows along a branch from a version to the log's end; takes the records in order.

    Args:
        marks: The next offset of each source at the version.
        mask_at: The mask that applies already.
        new: The new masks.
        longest_ms: The longest window.
    """

    def __init__(self, marks: dict[Source, int], mask_at: MaskAt, new: Sequence[MaskEntry], longest_ms: int) -> None:
        self._marks, self._mask_at, self._longest_ms = marks, mask_at, longest_ms
        self._new = [(entry.id, entry.mask) for entry in new]
        self._poisoned: dict[int, int] = {}
        self._names = MaskedUsers.NOBODY
        self.found = Counted(by_mask={entry.id: (0, set()) for entry in new})

    def take(self, batch: MicroBatch) -> None:
        """Counts the next record of the branch."""
        unseen, self._marks = trim(batch, self._marks)
        fresh = trained(batch.kind) & unseen
        already = self._mask_at(batch.header.mask_generation)
        out = masked(batch, already) if already else np.zeros(len(batch), np.bool_)
        for number, mask in self._new:
            hits = masked(batch, mask)
            out |= hits
            hits &= fresh
            if hits.any():
                rows, users = self.found.by_mask[number]
                users.update(batch.user[hits].tolist())
                self.found.by_mask[number] = (rows + int(hits.sum()), users)
                self._poison(batch, hits)
        self.found.records += 1
        self.found.rows += int(fresh.sum())
        self.found.masked += int((fresh & out).sum())
        if self._poisoned:
            self._count_after(batch, fresh & ~out)

    def _poison(self, batch: MicroBatch, hits: NDArray[np.bool_]) -> None:
        for user, at_ms in zip(batch.user[hits].tolist(), batch.at_ms[hits].tolist(), strict=True):
            self._poisoned[user] = max(at_ms, self._poisoned.get(user, 0))
        if len(self._poisoned) > len(self.found.users):
            self.found.users |= self._poisoned.keys()
            self._names = MaskedUsers.of(self._poisoned)

    def _count_after(self, batch: MicroBatch, rows: NDArray[np.bool_]) -> None:
        rows = rows & self._names.has(batch.user)
        for user, at_ms in zip(batch.user[rows].tolist(), batch.at_ms[rows].tolist(), strict=True):
            self.found.after += at_ms - self._poisoned[user] < self._longest_ms
