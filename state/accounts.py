"""Checks that the counts of the stream, the trainer and the broker agree at one consistent cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from state.positions import COUNTED, MOST_LEARNED, Source


@dataclass(frozen=True)
class StreamAccount:
    """The committed counts of the stream, for one source or all: the outcomes of `Range`, and the offsets passed."""

    positions: int
    rows: int
    dead: int = 0
    filtered: int = 0
    absent: int = 0
    gap: int = 0
    opened: int = 0
    feedback: int = 0
    joined: int = 0
    expired: int = 0
    dropped: int = 0
    masked: int = 0

    @property
    def learnable(self) -> int:
        """Rows that the trainer learns from: those labelled at once, and those labelled later."""
        return self.rows + self.joined + self.expired

    @property
    def waiting(self) -> int:
        """Impressions that are still waiting for their label, according to these counts."""
        return self.opened - self.joined - self.expired - self.dropped

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> StreamAccount:
        """Builds the account of one source from the history store's counts."""
        outcomes = {name: counts.get(name, 0) for name in COUNTED if name != "elsewhere"}
        # For a bucket, count only its own offsets. Over all buckets of a partition each offset counts once.
        return cls(counts["next"] - counts["first"] - counts.get("elsewhere", 0), **outcomes)


@dataclass(frozen=True)
class TrainerAccount:
    """The trainer's counts of the rows of the micro-batch log, by outcome.

    Attributes:
        rows: Rows in the log, including duplicates written again after a crash.
        trained: Rows learned from.
        skipped: Rows that the guard left out.
        duplicate: Rows seen before, by source position.
        in_flight: Rows not yet consumed, counted independently (log end minus the trainer's offset).
        masked: Rows that a mask left out.
        gap: Source offsets that no record contained, a loss that an operator accepted.
        other_features: Rows of a former feature spec, which an upgrade skipped.
    """

    rows: int
    trained: int
    skipped: int = 0
    duplicate: int = 0
    in_flight: int = 0
    masked: int = 0
    gap: int = 0
    other_features: int = 0


@dataclass(frozen=True)
class BrokerAccount:
    """The stream's next offset in one source, and the broker's first retained offset and end offset."""

    source: Source
    next: int
    begin: int
    end: int

    @property
    def unread(self) -> int:
        """Offsets that the stream has not read yet."""
        return max(0, self.end - self.next)


def check_accounts(
    stream: StreamAccount | None = None,
    trainer: TrainerAccount | None = None,
    broker: Iterable[BrokerAccount] = (),
    waiting: int | None = None,
) -> tuple[str, ...]:
    """Returns a message for each account of one cut that does not balance; empty if all balance.

    1. In the stream each offset has one outcome.
    2. In the trainer each row of the log has one outcome.
    3. The stream's rows equal the log's rows without duplicates: no row was lost in between, and none arrived twice. If
       the trainer accepted a gap, the rows of its positions may be missing: at most one per position, or `MOST_LEARNED`
       per position if impressions wait.
    4. The broker still has every unread offset, and its end is not before the stream's position.
    5. Each opened impression was joined, expired or dropped, or is one of the `waiting` ones, which are counted
       independently.

    >>> check_accounts(StreamAccount(positions=10, rows=8, dead=1, absent=1), TrainerAccount(rows=8, trained=8))
    ()
    >>> check_accounts(StreamAccount(positions=10, rows=8))
    ('stream: 10 positions, but 8 rows + 0 dead + 0 filtered + 0 absent + 0 gap + 0 opened + 0 feedback + 0 masked = 8',)
    >>> check_accounts(StreamAccount(positions=8, rows=8), TrainerAccount(rows=7, trained=7))
    ('log: the stream made 8 rows, but the log holds 7 without duplicates: 1 lost',)
    """
    faults: list[str] = []
    if stream is not None:
        outcomes = (stream.rows, stream.dead, stream.filtered, stream.absent, stream.gap, stream.opened)
        total = sum(outcomes) + stream.feedback + stream.masked
        if total != stream.positions:
            faults.append(
                f"stream: {stream.positions} positions, but {stream.rows} rows + {stream.dead} dead + "
                f"{stream.filtered} filtered + {stream.absent} absent + {stream.gap} gap + {stream.opened} opened + "
                f"{stream.feedback} feedback + {stream.masked} masked = {total}"
            )
    if trainer is not None:
        total = trainer.trained + trainer.skipped + trainer.duplicate + trainer.masked + trainer.in_flight
        total += trainer.other_features
        if total != trainer.rows:
            other_features = f"{trainer.other_features} of other features + " if trainer.other_features else ""
            faults.append(
                f"trainer: {trainer.rows} rows, but {trainer.trained} trained + {trainer.skipped} skipped + "
                f"{trainer.duplicate} duplicate + {trainer.masked} masked + {other_features}{trainer.in_flight} in flight = {total}"
            )
    if stream is not None and trainer is not None:
        distinct = trainer.rows - trainer.duplicate
        lost = stream.learnable - distinct
        excused = trainer.gap * (MOST_LEARNED if stream.opened else 1)
        if not 0 <= lost <= excused:
            difference = f"{-lost} came twice" if lost < 0 else f"{lost - excused} lost"
            accepted = f", and a gap of {trainer.gap} was accepted" if trainer.gap else ""
            faults.append(
                f"log: the stream made {stream.learnable} rows, but the log holds {distinct} without duplicates"
                f"{accepted}: {difference}"
            )
    for partition in broker:
        if partition.begin > partition.next:
            faults.append(
                f"clicks {partition.source}: the stream is at {partition.next} and the broker begins at {partition.begin}: "
                f"{partition.begin - partition.next} positions were deleted unread"
            )
        elif partition.end < partition.next:
            faults.append(
                f"clicks {partition.source}: the stream is at {partition.next} and the broker ends at {partition.end}: "
                "it lost its newest records, or another cluster answers"
            )
    if stream is not None and waiting is not None and waiting != stream.waiting:
        faults.append(
            f"labels: {stream.opened} impressions opened, but {stream.joined} joined + {stream.expired} expired + "
            f"{stream.dropped} dropped + {waiting} waiting = {stream.opened - stream.waiting + waiting}"
        )
    return tuple(faults)
