"""Counts the rows between the trainer's place and the stream's, and makes both accounts of what is stored. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from state.accounts import StreamAccount, TrainerAccount
from state.microbatch.batch import MicroBatch
from state.microbatch.cutting import trim
from state.microbatch.row_kinds import trained
from state.positions import Source
from state.registry.manifest import Manifest

LONGEST_TAIL = 20_000

Counts = Mapping[Source, Mapping[str, int]]


@dataclass(frozen=True)
class InFlight:
    """Rows between the trainer's place and the stream's, counted on their own.

    Attributes:
        rows: New rows.
        duplicate: Rows written again by a stream that crashed.
        marks: The next offset of each source afterwards.
        complete: Whether the log was read to its end.
    """

    rows: int
    duplicate: int
    marks: dict[Source, int]
    complete: bool = True


def in_flight(batches: Iterable[MicroBatch], marks: Mapping[Source, int], until: Mapping[Source, int]) -> InFlight:
    """Counts the rows of `batches` that lie from `marks` on and before `until`. Pure."""
    rows = duplicate = 0
    at = dict(marks)
    for batch in batches:
        fresh, after = trim(batch, at)
        ends = np.array([until.get(part.source, 0) for part in batch.header.ranges] or [0], np.int64)
        counted = trained(batch.kind) & (batch.offset < ends[batch.source])
        rows += int((fresh & counted).sum())
        duplicate += int((~fresh & counted).sum())
        at = after
    return InFlight(rows, duplicate, at)


def stream_account(counts: Counts) -> StreamAccount:
    """The account over all sources.

    >>> one = {"first": 0, "next": 3, "rows": 2, "dead": 1, "filtered": 0, "absent": 0}
    >>> stream_account({Source("ab" * 16, 0): one, Source("ab" * 16, 1): one}).rows
    4
    """
    parts = [StreamAccount.of(one) for one in counts.values()]
    return StreamAccount(*(sum(getattr(one, each.name) for one in parts) for each in dataclasses.fields(StreamAccount)))


def trainer_account(version: Manifest, flying: InFlight) -> TrainerAccount:
    """The version's account, with what is in flight behind it."""
    counted = {
        name: int(version.metrics.get(f"account.{name}", 0))
        for name in ("rows", "trained", "skipped", "duplicate", "masked", "gap", "other_features")
    }
    return TrainerAccount(
        rows=counted["rows"] + flying.rows + flying.duplicate,
        trained=counted["trained"],
        skipped=counted["skipped"],
        duplicate=counted["duplicate"] + flying.duplicate,
        in_flight=flying.rows,
        masked=counted["masked"],
        gap=counted["gap"],
        other_features=counted["other_features"],
    )


def comparable(counts: Counts, version: Manifest, flying: InFlight) -> str:
    """Why the stream's rows and the trainer's cannot be compared; empty where they can. Pure.

    Args:
        counts: Of the stream's stores.
        version: The trainer's newest version.
        flying: What lies behind it.
    """
    if not flying.complete:
        return f"the trainer is more than {LONGEST_TAIL:,} positions behind: rows in flight are not counted"
    ahead = sum(max(0, mark - counts[source]["next"]) for source, mark in version.marks.items() if source in counts)
    if ahead:
        return f"the trainer has {ahead:,} positions that the stream has still to commit"
    if unknown := [str(source) for source in version.marks if source not in counts]:
        return f"the trainer has sources that no store here counts: {', '.join(unknown)}"
    began = sum(one["first"] for source, one in counts.items() if source in flying.marks)
    if "account.before" not in version.metrics:
        return "the version was made by a release that did not count where its line began"
    if flying.marks.keys() == version.marks.keys() and int(version.metrics["account.before"]) != began:
        return "the trainer's line began later than the stream's store, or earlier: its log had been cut, or the store is new"
    return ""
