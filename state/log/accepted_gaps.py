"""The gaps and bad records that an operator accepted: which loss, by whom, when and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state.disk import files as durable
from state.log.gaps import Consent
from state.positions import Gap, Source


@dataclass(frozen=True, slots=True)
class Accepted:
    """A gap that was skipped permanently.

    Attributes:
        gap: What is missing.
        actor: Who accepted it.
        reason: Why.
        at_ms: When, wall clock.
        marks: The reader's position in each source of the rows that the gap contained, as text: rows
            that follow each position may be missing too. Only for a gap in the training log.
        record: Why the record could not be learned from; empty if there was no record.
    """

    gap: Gap
    actor: str
    reason: str
    at_ms: int
    marks: Mapping[str, int] = field(default_factory=dict)
    record: str = ""

    def to_json(self) -> dict[str, Any]:
        """The gap as JSON values.

        >>> one = Accepted(Gap(Source("ab" * 16, 3), 10, 20), "ann", "old", 5)
        >>> Accepted.from_json(one.to_json()) == one
        True
        """
        gap = {"source": str(self.gap.source), "first": self.gap.first, "next": self.gap.next}
        who = {"actor": self.actor, "reason": self.reason, "at_ms": self.at_ms}
        what = {"record": self.record} if self.record else {}
        return {**gap, **who, **what, "marks": dict(self.marks)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Accepted:
        """Decodes the output of `to_json`."""
        gap = Gap(Source.parse(document["source"]), int(document["first"]), int(document["next"]))
        marks = {str(name): int(mark) for name, mark in document.get("marks", {}).items()}
        who = (str(document["actor"]), str(document["reason"]))
        return cls(gap, *who, int(document["at_ms"]), marks, str(document.get("record", "")))


def encode(accepted: Iterable[Accepted]) -> bytes:
    """Encodes accepted gaps.

    >>> decode(encode([])), decode(None)
    ([], [])
    """
    return json.dumps([one.to_json() for one in accepted], sort_keys=True).encode()


def decode(data: bytes | None) -> list[Accepted]:
    """Decodes the output of `encode`; no data means none."""
    return [Accepted.from_json(one) for one in json.loads(data or b"[]")]


class Journal:
    """The gaps that the trainer skipped: one immutable file each in a directory. One writer, under its lock.

    Args:
        path: The directory; created with the first gap.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def accepted(self) -> list[Accepted]:
        """All accepted gaps, in the order of acceptance."""
        files = sorted(path for path in self.path.glob("*.json") if path.stem.isdecimal())
        return [Accepted.from_json(json.loads(path.read_bytes())) for path in files]

    def add(self, one: Accepted) -> None:
        """Stores a gap durably; a gap that is stored already stays unchanged."""
        known = self.accepted()
        if any(each.gap == one.gap for each in known):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        final = self.path / f"{len(known) + 1:08d}.json"
        data = json.dumps(one.to_json(), sort_keys=True).encode()
        if not durable.create(final, data, durable.unique(final)):
            raise FileExistsError(final)


def past(accepted: Iterable[Accepted], source: Source, offset: int) -> int:
    """The offset at which reading resumes from `offset`, after the losses accepted there.

    >>> one = Accepted(Gap(Source("ab" * 16, 0), 10, 20), "ann", "old", 5)
    >>> [past([one], Source("ab" * 16, 0), offset) for offset in (9, 10, 15, 20)]
    [9, 20, 20, 20]
    """
    for one in sorted(accepted, key=lambda each: each.gap.first):
        if one.gap.source == source and one.gap.first <= offset < one.gap.next:
            offset = one.gap.next
    return offset


def left_out(accepted: Iterable[Accepted], source: Source, offset: int) -> bool:
    """Whether the record at `offset` is skipped, whatever it contains.

    >>> log = Source("cd" * 16, 0)
    >>> one = Accepted(Gap(log, 10, 11), "ann", "a test wrote it", 5, record="no micro-batch")
    >>> left_out([one], log, 10), left_out([one], log, 11)
    (True, False)
    """
    return any(
        bool(one.record) and one.gap.source == source and one.gap.first <= offset < one.gap.next for one in accepted
    )


def explained(accepted: Iterable[Accepted], gap: Gap) -> bool:
    """Whether the loss of `gap` was accepted, by itself or as a consequence of a gap in the training log.

    >>> log, clicks = Source("cd" * 16, 0), Source("ab" * 16, 1)
    >>> one = Accepted(Gap(log, 10, 20), "ann", "old", 5, {str(clicks): 300})
    >>> explained([one], Gap(clicks, 300, 340)), explained([one], Gap(clicks, 301, 340))
    (True, False)
    """
    return any(
        one.marks.get(str(gap.source)) == gap.first
        or (one.gap.source == gap.source and one.gap.first <= gap.first and gap.next <= one.gap.next)
        for one in accepted
    )


def accept(
    gap: Gap, consent: Consent, now_ms: int, marks: Mapping[Source, int] | None = None, record: str = ""
) -> Accepted:
    """The record of `gap` accepted by `consent`; see `Accepted`."""
    known = {str(source): mark for source, mark in (marks or {}).items()}
    return Accepted(gap, consent.actor, consent.reason, now_ms, known, record)
