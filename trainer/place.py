"""The trainer's position in the training log, the account of the rows up to it, and the version before an offset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from state.errors import UnknownVersion
from state.positions import Source
from state.registry.manifest import TOLD_MS, Manifest, sees
from state.registry.registry import Registry
from trainer.intake import Intake

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
        """The position once the version with all handed-over changes exists."""
        position = replace(self, parent=manifest.version)
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
