"""What the trainer takes from the training log: its records, the rows to learn from, its position, and the account of rows.

Rows to learn from are new and not masked. Gaps that an operator accepts are recorded. Two kinds of gap stop the trainer:

- A gap in the training log: retention deleted records before the trainer read them, or the trainer cannot learn from a
  record. Such a record is damaged, is not a micro-batch, or has other features or another salt.
- A gap in a source: no record of the log covers some positions of the clicks. A gap in the training log explains it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from state.accounts import TrainerAccount, check_accounts
from state.errors import (
    GapError,
    MicroBatchError,
    SaltMismatch,
    SpecMismatch,
    SpringtideError,
    TruncatedLog,
    UnknownVersion,
)
from state.features.mask import MaskAt
from state.log import PartitionBatch, accepted_gaps
from state.log.accepted_gaps import Accepted, Consent, Journal, how_to_go_on
from state.metrics import TrainerMetrics
from state.microbatch.batch import Logged, MicroBatch, gaps, in_log_time, masked, trained, trim
from state.microbatch.codec import decode
from state.positions import Gap, Source
from state.registry.log_line import WHOLE, LogLine, counts
from state.registry.manifest import TOLD_MS, Manifest, sees
from state.registry.registry import Registry

BAD = (MicroBatchError, SpecMismatch, SaltMismatch)
"""The errors that concern a single record."""


@dataclass(frozen=True, slots=True)
class Intake:
    """The outcome of the rows of one record.

    Attributes:
        batch: The rows to learn from, in log time; may be empty.
        rows: Rows of the record to learn from; the others only update histories.
        masked: New rows that the mask excludes.
        gaps: Positions that no record covered: (source, expected, found).
        told_ms: The newest time of a row to learn from, of its event or its label; 0 without rows.
        other_features: New rows of a record of another feature spec or salt, which is skipped.
    """

    batch: MicroBatch
    marks: dict[Source, int]
    rows: int
    duplicate: int
    masked: int
    gaps: list[tuple[Source, int, int]]
    told_ms: int = 0
    other_features: int = 0


def never(spec: str) -> bool:
    """Never skips a record of another feature spec."""
    return False


def former(specs: Collection[str], steps: Callable[[], int]) -> Callable[[str], bool]:
    """Returns a predicate for the feature specs whose records a trainer skips.

    Those are `specs`, which upgrades replaced, and before the first of the trainer's steps all but its own spec.

    >>> [former({"ab"}, lambda: steps)(spec) for steps in (0, 9) for spec in ("ab", "cd")]
    [True, True, True, False]
    """
    return lambda spec: spec in specs or not steps()


class RecordFilter(NamedTuple):
    """Selects the rows of records that a trainer with these features learns from.

    Attributes:
        spec: Digest of the feature spec.
        salt: Fingerprint of the salt.
        is_former: Whether a record of another spec or salt is skipped; otherwise it is an error.
    """

    spec: str
    salt: str
    is_former: Callable[[str], bool] = never

    def take_in(
        self,
        value: bytes | None,
        marks: Mapping[Source, int],
        mask_at: MaskAt,
        where: str,
        line: LogLine = WHOLE,
        offset: int = 0,
    ) -> Intake:
        """Decodes a record, drops rows that `marks` covers, and excludes masked rows. Raises one of `BAD` for a bad record.

        A record outside `line`, or of a former spec or salt, has no rows left. `where` names the record in messages;
        `offset` is its offset.
        """
        try:
            batch = decode(value or b"")
        except MicroBatchError as error:
            raise MicroBatchError(f"{where}: {error.what}", error.do) from error
        if not counts(line, batch.header.log_epoch, offset):
            batch = replace(_without_rows(batch), header=replace(batch.header, ranges=()))
            return Intake(batch, dict(marks), 0, 0, 0, [])
        is_ours = self._is_ours(batch, where)
        unseen, after = trim(batch, marks)
        is_trained = trained(batch.kind)
        fresh = is_trained & unseen
        if not is_ours:
            # Sources without a mark get none: their clicks may still come, perhaps from the beginning.
            known = {source: after[source] for source in marks}
            rows, new = int(is_trained.sum()), int(fresh.sum())
            return Intake(
                _without_rows(batch), known, rows, rows - new, 0, gaps(batch.header, marks), other_features=new
            )
        mask = mask_at(batch.header.mask_generation)
        allowed = unseen & ~masked(batch, mask) if mask else unseen
        keep = is_trained & allowed
        # Log time is computed from all rows, and only then the rows to learn from are selected.
        learned = in_log_time(batch.take(allowed)).take(is_trained[allowed])
        return Intake(
            batch=replace(learned, logged=Logged(value or b"", keep)),
            marks=after,
            rows=int(is_trained.sum()),
            duplicate=int((is_trained & ~unseen).sum()),
            masked=int(fresh.sum()) - int(keep.sum()),
            gaps=gaps(batch.header, marks),
            told_ms=int((batch.at_ms + np.maximum(batch.delay_ms, 0))[keep].max()) if keep.any() else 0,
        )

    def _is_ours(self, batch: MicroBatch, where: str) -> bool:
        """Whether a record has the trainer's features and salt. Raises if it has others that are not former ones."""
        header = batch.header
        if header.spec != self.spec and not self.is_former(header.spec):
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, this trainer has {self.spec[:12]}",
                "give both the same release, [features] and events.actions: see `springtide upgrade --dry-run` with the stream's",
            )
        if header.salt != self.salt and not self.is_former(header.salt):
            raise SaltMismatch.between(where, header.salt, self.salt)
        return (header.spec, header.salt) == (self.spec, self.salt)


def _without_rows(batch: MicroBatch) -> MicroBatch:
    return batch.take(np.zeros(len(batch), np.bool_))


class LogRecord(NamedTuple):
    """A record of the training log, or the records `first` to `next` of a batch that cannot be read because of `damage`."""

    first: int
    next: int
    value: bytes | None = None
    damage: str = ""

    def require_whole(self, where: str) -> None:
        """Raises MicroBatchError if the record is damaged; `where` names its offset."""
        if self.damage:
            raise MicroBatchError(
                f"{where} cannot be read: {self.damage}",
                "check the broker's disk, and restore the topic if you can",
            )


def records_of(batch: PartitionBatch) -> Iterator[LogRecord]:
    """All records of a poll, in log order.

    >>> import numpy as np
    >>> at = np.array([4, 9])
    >>> batch = PartitionBatch("ab" * 16, 0, 4, 11, at, at, [None] * 2, [b"a", b"b"], corrupt=((5, 9, "checksum"),))
    >>> [(one.first, one.next, one.value) for one in records_of(batch)]
    [(4, 5, b'a'), (5, 9, None), (9, 10, b'b')]
    """
    records_read = zip(batch.offsets.tolist(), batch.values, strict=True)
    damaged = [LogRecord(first, after, damage=reason) for first, after, reason in batch.corrupt]
    if not damaged:
        yield from (LogRecord(offset, offset + 1, value) for offset, value in records_read)
        return
    yield from sorted([*damaged, *(LogRecord(offset, offset + 1, value) for offset, value in records_read)])


COMMAND = "springtide train (or up)"
NAMES = ("rows", "trained", "skipped", "duplicate", "masked", "gap", "other_features")
logger = logging.getLogger(__name__)


class Passages:
    """Lets the trainer continue past gaps that an operator accepts, and records each of them. Not thread-safe."""

    def __init__(self, journal: Journal, consent: Consent, metrics: TrainerMetrics, clock: Callable[[], float]) -> None:
        self._journal, self._consent, self._metrics, self._clock = journal, consent, metrics, clock
        self._known = journal.accepted()
        self._count(self._known)

    def past(self, source: Source, offset: int) -> int:
        """The offset at which reading continues from `offset`: the end of the gap accepted there, if any."""
        return accepted_gaps.past(self._known, source, offset)

    def pass_log(self, error: GapError, marks: Mapping[Source, int]) -> int:
        """Accepts a gap in the training log and returns the offset after it. The gap's record is durable on return.

        Raises:
            GapError: The operator does not accept the gap.
            TruncatedLog: The log was truncated. No operator can accept this; the trainer has to rewind.
        """
        if len(error.gaps) != 1 or isinstance(error, TruncatedLog):
            raise error
        (gap,) = error.gaps
        self._pass([gap], error, gap.source.topic_id, marks)
        return gap.next

    def is_left_out(self, source: Source, offset: int) -> bool:
        """Whether the record at this offset of the training log was skipped before."""
        return accepted_gaps.left_out(self._known, source, offset)

    def leave_out(self, gap: Gap, marks: Mapping[Source, int], problem: SpringtideError) -> None:
        """Skips a record, or a damaged batch, that cannot be learned from because of `problem`. The skip is durable on return.

        Raises:
            SpringtideError: The operator does not accept the skip; `problem` plus the command to skip the record.
        """
        if not all(self._consent.leaves_out(offset) for offset in range(gap.first, gap.next)):
            flag = f"{gap.first}" if gap.positions == 1 else f"{gap.first}-{gap.next - 1}"
            raise type(problem)(
                problem.what,
                f"{problem.do}; to continue without this record: {COMMAND} --skip-record {flag} --reason TEXT",
            ) from problem
        self._keep(accepted_gaps.accept(gap, self._consent, int(self._clock() * 1000), marks, problem.what))

    def pass_sources(self, gaps: Sequence[tuple[Source, int, int]], where: str, read_topic: str) -> int:
        """Accepts the positions that no record before `where` covers, and returns how many there are.

        A gap is (source, the trainer's mark, the first position that the record covers).

        Raises:
            GapError: The operator does not accept one of the gaps.
        """
        lost = [Gap(source, mark, first) for source, mark, first in gaps]
        new = [gap for gap in lost if not accepted_gaps.explained(self._known, gap)]
        if new:
            positions = "; ".join(f"{gap} of topic id {gap.source.topic_id}" for gap in new)
            self._pass(
                new,
                GapError(
                    f"{where}: no record before it holds these clicks: {positions}",
                    "they were lost before the training log: check the stream's log file, or accept the loss",
                    new,
                ),
                read_topic,
            )
        return sum(gap.positions for gap in lost)

    def _pass(
        self, gaps: Sequence[Gap], error: GapError, read_topic: str, marks: Mapping[Source, int] | None = None
    ) -> None:
        refused = [gap for gap in gaps if not self._consent.covers(gap, read_topic)]
        if refused:
            refusal = how_to_go_on(error, COMMAND)
            raise GapError(refusal.what, refusal.do, refused)
        for gap in gaps:
            self._keep(accepted_gaps.accept(gap, self._consent, int(self._clock() * 1000), marks))

    def _keep(self, loss: Accepted) -> None:
        self._journal.add(loss)
        self._known.append(loss)
        self._count([loss])
        text = f"record left out ({loss.record})" if loss.record else "gap accepted"
        logger.warning(
            "%s by %s (%s): topic id %s, %s",
            text,
            loss.actor,
            loss.reason,
            loss.gap.source.topic_id,
            loss.gap,
        )

    def _count(self, passed: Sequence[Accepted]) -> None:
        records = sum(bool(accepted.record) for accepted in passed)
        self._metrics.records_left_out.inc(records)
        self._metrics.gaps_accepted.inc(len(passed) - records)


def show_account(account: Mapping[str, int], metrics: TrainerMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the gauges of the row account, and logs an imbalance that is not in `known`, the result of the last call."""
    rows_by_outcome = {name: account.get(name, 0) for name in NAMES}
    for name, rows in rows_by_outcome.items():
        metrics.accounting_rows.labels(name).set(rows)
    faults = check_accounts(trainer=TrainerAccount(**rows_by_outcome))
    if faults and faults != known:
        logger.error("the account of the rows does not balance: %s", "; ".join(faults))
    metrics.accounting_faults.set(len(faults))
    return faults


COUNTS = ("rows", "duplicate", "masked", "gap", "before")
RARE = ("left_out", "other_features")  # counted only where there are any


@dataclass(frozen=True, slots=True)
class TrainingPlace:
    """The trainer's position: one consistent cut together with its weights.

    Attributes:
        parent: The newest version of this branch, recent or durable; 0 for none.
        first: The offset at which the log continues after `parent`.
        duplicate: Rows of this branch that were dropped as seen before.
        masked: Rows that a mask excluded.
        gap: Source positions that no record held, an accepted loss.
        before: Source positions before the first one of this branch, summed over sources.
        left_out: Records of the log that could not be learned from, an accepted loss.
        other_features: Rows of a former feature spec, which were skipped.
        leader_epoch: Kafka's epoch of the leader that wrote the record before `next`; set when a version is made.
        changed: Whether there was a step since `parent`.
        durable: The newest durable version of this branch; 0 for none.
        durable_first: The offset at which the log continues after `durable`.
        unsaved: Whether there was a step since `durable`.
        erasures: (erasure, offset) of the newest erasures that were applied in this epoch.
        told_ms: The newest time that a learned row reported. A rollback uses it to find what a version cannot contain.
    """

    epoch: int
    parent: int
    first: int
    next: int
    marks: Mapping[Source, int] = field(default_factory=dict)
    rows: int = 0
    duplicate: int = 0
    masked: int = 0
    gap: int = 0
    before: int = 0
    left_out: int = 0
    other_features: int = 0
    leader_epoch: int = -1
    changed: bool = False
    durable: int = 0
    durable_first: int = 0
    unsaved: bool = False
    told_ms: int = 0
    erased: int = 0
    erasures: tuple[tuple[int, int], ...] = ()

    @classmethod
    def restored(cls, version: Manifest, epoch: int, next: int) -> TrainingPlace:
        """The position of a loaded version, from which reading continues at `next`."""
        counts: dict[str, Any] = {name: int(version.metrics.get(f"account.{name}", 0)) for name in (*COUNTS, *RARE)}
        told_ms = int(version.metrics.get(TOLD_MS, version.event_time_ms))
        erasures = version.erasures if version.epoch == epoch else ()
        first = version.log.next if version.log.topic_id else next
        at = (epoch, version.version, first, next, version.marks)
        begin = cls(*at, **counts, told_ms=told_ms, erased=version.erased, erasures=erasures)
        return begin.at_version(version).handed_over(True, first)

    def taken(self, intake: Intake, offset: int, gap: int) -> TrainingPlace:
        """The position after the record at `offset`. Before the record, `gap` source positions were accepted as lost."""
        new = (part.first for part in intake.batch.header.ranges if part.source not in self.marks)
        return replace(
            self,
            next=offset + 1,
            marks=intake.marks,
            rows=self.rows + intake.rows,
            duplicate=self.duplicate + intake.duplicate,
            masked=self.masked + intake.masked,
            gap=self.gap + gap,
            before=self.before + sum(new),
            told_ms=max(self.told_ms, intake.told_ms),
            other_features=self.other_features + intake.other_features,
        )

    def past(self, next: int) -> TrainingPlace:
        """The position after a record that is skipped."""
        return replace(self, next=next, left_out=self.left_out + 1)

    def stepped(self) -> TrainingPlace:
        """The position after a step, or after anything else that a version has to record."""
        return replace(self, changed=True, unsaved=True)

    def handed_over(self, durable: bool, end: int | None = None) -> TrainingPlace:
        """The position once all changes were handed to a new version; the version's end is `end`, or the current offset."""
        end = self.next if end is None else end
        position = replace(self, first=end, changed=False)
        return replace(position, durable_first=end, unsaved=False) if durable else position

    def at_version(self, manifest: Manifest) -> TrainingPlace:
        """The position once a version with handed-over changes exists. One that became durable may have newer ones."""
        position = replace(self, parent=max(self.parent, manifest.version))
        return replace(position, durable=manifest.version) if manifest.durable else position

    def counts(self) -> dict[str, int]:
        """The account of the rows of this branch.

        >>> TrainingPlace(1, 0, 0, 9, rows=5, masked=2).counts()
        {'rows': 5, 'duplicate': 0, 'masked': 2, 'gap': 0, 'before': 0}
        """
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {name: count for name in RARE if (count := getattr(self, name))}


def newest_before(registry: Registry, branch: Manifest, partition: Source, offset: int) -> Manifest | None:
    """The newest version that learned nothing from `offset` of the log's `partition` on; None if none can be loaded.

    It is `branch` or a predecessor of it. Versions that were trained on another topic do not count.
    """
    for number in reversed(registry.versions()):
        if not sees(branch.visible, number):
            continue
        try:
            manifest = registry.manifest(number)
            learned = Source(manifest.log.topic_id, manifest.log.partition)
            if learned == partition and manifest.log.next <= offset and registry.chain(number):
                return manifest
        except UnknownVersion:
            # Its base was removed; an older version may have one.
            continue
    return None
