"""Accounts kept of positions: what the stream, the trainer and the broker each have of one cut, and whether they balance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from state.positions import COUNTED, MOST_LEARNED, Source


@dataclass(frozen=True)
class StreamAccount:
    """What the stream has committed, summed over sources, or for one of them.

    Attributes:
        positions: Offsets passed, from the first position ever taken to the next one.
        rows: Offsets that became rows.
        dead: Offsets that went to the dead letters.
        filtered: Offsets left out on purpose.
        absent: Offsets without a record.
        gap: Offsets deleted unread, a loss that an operator accepted.
        opened: Impressions whose label comes later.
        feedback: Outcomes, which only histories gained.
        joined: Impressions that an outcome labelled.
        expired: Impressions whose wait was over.
        dropped: Impressions that could not wait.
        masked: Offsets that control's mask left out.
    """

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
        """Rows that the trainer learns from: those known at once, and those known later.

        >>> StreamAccount(positions=5, rows=2, opened=3, joined=1, expired=1).learnable
        4
        """
        return self.rows + self.joined + self.expired

    @property
    def waiting(self) -> int:
        """Impressions that must be waiting."""
        return self.opened - self.joined - self.expired - self.dropped

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> StreamAccount:
        """The account of one source, as the history store counts it.

        >>> StreamAccount.of({"first": 3, "next": 5, "rows": 2, "dead": 0, "filtered": 0, "absent": 0}).positions
        2
        """
        outcomes = {name: counts.get(name, 0) for name in COUNTED if name != "elsewhere"}
        # Of a bucket, the offsets that are its own: all buckets of a partition together have each once.
        return cls(counts["next"] - counts["first"] - counts.get("elsewhere", 0), **outcomes)


@dataclass(frozen=True)
class TrainerAccount:
    """What the trainer did with the rows of the micro-batch log.

    Attributes:
        rows: Rows in the log, duplicates written again after a crash included.
        trained: Rows learned from.
        skipped: Rows left out by the guard.
        duplicate: Rows seen before, by their source position.
        in_flight: Rows not yet taken, counted on their own (log end less the trainer's offset).
        masked: Rows left out by a mask.
        gap: Source offsets that no record of the log held, a loss that an operator accepted.
        other_features: Rows of a former feature spec, which an upgrade passed over.
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
    """One source as the stream has it and as the broker has it.

    Attributes:
        source: Which.
        next: The stream's next offset.
        begin: The first offset that the broker keeps.
        end: The offset after the last one.
    """

    source: Source
    next: int
    begin: int
    end: int

    @property
    def unread(self) -> int:
        """Offsets that are still to be read.

        >>> BrokerAccount(Source("ab" * 16, 0), next=5, begin=0, end=9).unread
        4
        """
        return max(0, self.end - self.next)


def check_accounts(
    stream: StreamAccount | None = None,
    trainer: TrainerAccount | None = None,
    broker: Iterable[BrokerAccount] = (),
    waiting: int | None = None,
) -> tuple[str, ...]:
    """Says where the accounts of one cut do not balance; empty where they do.

    1. In the stream each offset has one outcome.
    2. In the trainer each row of the log has one outcome.
    3. The stream's rows are the log's rows without the duplicates: no row was
       lost between the two, none came twice. Where the trainer accepted a gap,
       at most the rows of that many positions may be missing: one each, or
       `MOST_LEARNED` where impressions wait.
    4. The broker still has what is to be read, and does not end before us.
    5. Each impression opened was joined, expired or dropped, or is among the
       `waiting` ones, which were counted on their own.

    >>> check_accounts(StreamAccount(positions=10, rows=8, dead=1, absent=1), TrainerAccount(rows=8, trained=8))
    ()
    >>> check_accounts(StreamAccount(positions=10, rows=8))
    ('stream: 10 positions, but 8 rows + 0 dead + 0 filtered + 0 absent + 0 gap + 0 opened + 0 feedback + 0 masked = 8',)
    >>> check_accounts(StreamAccount(positions=8, rows=8), TrainerAccount(rows=7, trained=7))
    ('log: the stream made 8 rows, but the log holds 7 without duplicates: 1 lost',)
    """
    return (
        *([] if stream is None else _unbalanced_stream(stream)),
        *([] if trainer is None else _unbalanced_trainer(trainer)),
        *([] if stream is None or trainer is None else _lost_between(stream, trainer)),
        *(fault for one in broker for fault in _misplaced(one)),
        *([] if stream is None or waiting is None else _lost_while_waiting(stream, waiting)),
    )


def _unbalanced_stream(stream: StreamAccount) -> Iterator[str]:
    """Fault 1."""
    outcomes = (stream.rows, stream.dead, stream.filtered, stream.absent, stream.gap, stream.opened, stream.feedback)
    total = sum(outcomes) + stream.masked
    if total != stream.positions:
        yield (
            f"stream: {stream.positions} positions, but {stream.rows} rows + {stream.dead} dead + "
            f"{stream.filtered} filtered + {stream.absent} absent + {stream.gap} gap + {stream.opened} opened + "
            f"{stream.feedback} feedback + {stream.masked} masked = {total}"
        )


def _unbalanced_trainer(trainer: TrainerAccount) -> Iterator[str]:
    """Fault 2."""
    total = trainer.trained + trainer.skipped + trainer.duplicate + trainer.masked + trainer.in_flight
    total += trainer.other_features
    if total != trainer.rows:
        other = f"{trainer.other_features} of other features + " if trainer.other_features else ""
        yield (
            f"trainer: {trainer.rows} rows, but {trainer.trained} trained + {trainer.skipped} skipped + "
            f"{trainer.duplicate} duplicate + {trainer.masked} masked + {other}{trainer.in_flight} in flight = {total}"
        )


def _lost_between(stream: StreamAccount, trainer: TrainerAccount) -> Iterator[str]:
    """Fault 3."""
    distinct = trainer.rows - trainer.duplicate
    lost = stream.learnable - distinct
    excused = trainer.gap * (MOST_LEARNED if stream.opened else 1)
    if not 0 <= lost <= excused:
        what = f"{-lost} came twice" if lost < 0 else f"{lost - excused} lost"
        accepted = f", and a gap of {trainer.gap} was accepted" if trainer.gap else ""
        yield (
            f"log: the stream made {stream.learnable} rows, but the log holds {distinct} without duplicates{accepted}: {what}"
        )


def _misplaced(one: BrokerAccount) -> Iterator[str]:
    """Fault 4."""
    if one.begin > one.next:
        yield (
            f"clicks {one.source}: the stream is at {one.next} and the broker begins at {one.begin}: "
            f"{one.begin - one.next} positions were deleted unread"
        )
    elif one.end < one.next:
        yield (
            f"clicks {one.source}: the stream is at {one.next} and the broker ends at {one.end}: "
            "it lost its newest records, or another cluster answers"
        )


def _lost_while_waiting(stream: StreamAccount, waiting: int) -> Iterator[str]:
    """Fault 5."""
    if waiting != stream.waiting:
        yield (
            f"labels: {stream.opened} impressions opened, but {stream.joined} joined + {stream.expired} expired + "
            f"{stream.dropped} dropped + {waiting} waiting = {stream.opened - stream.waiting + waiting}"
        )
