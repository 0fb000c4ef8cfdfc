"""Positions in a log: sources, ranges with the outcome of each offset, and gaps.

A position names the topic by its id, never by its name: a recreated topic is another topic. Everything here is a value;
`state/history/store.py` and `state/registry/registry.py` store positions in their transactions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.user_shares import SHARES

UNPLACED = ("joined", "expired", "dropped")  # outcomes without their own offsets
# Included only if not 0.
RARE = ("gap", "opened", "feedback", "joined", "expired", "dropped", "masked", "elsewhere")
MOST_LEARNED = 17  # rows at one position: its own or one it joins, and twice `MOST_EXPIRED` of streaming/labels.py
_TOPIC_ID = re.compile(r"[0-9a-f]{32}")


class Source(NamedTuple):
    """One totally ordered sequence of positions: a partition, or one bucket of its users.

    A bucket counts all offsets of its partition; it counts those of other buckets' users as `elsewhere`.

    Attributes:
        topic_id: The topic's id, 32 hexadecimal digits.
        partition: The partition's number.
        bucket: The bucket of users: those whose share modulo `buckets` equals it; 0 in the local form.
        buckets: The number of buckets, a divisor of `SHARES`; 1 in the local form.
    """

    topic_id: str
    partition: int
    bucket: int = 0
    buckets: int = 1

    @property
    def topic(self) -> int:
        """The topic's short number in event records: the first 8 digits of its id."""
        return int(self.topic_id[:8], 16)

    def has(self, user: int) -> bool:
        """Whether a user belongs to the source's bucket.

        >>> Source("ab" * 16, 3).has(7), Source("ab" * 16, 3, 1, 4).has(9), Source("ab" * 16, 3, 1, 4).has(8)
        (True, True, False)
        """
        return user % SHARES % self.buckets == self.bucket

    def __str__(self) -> str:
        """`topic id:partition`, followed by the bucket if there are several."""
        share = "" if self.buckets == 1 else f":{self.bucket}/{self.buckets}"
        return f"{self.topic_id}:{self.partition}{share}"

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parses the output of `str`; ValueError if `text` is no source."""
        topic_id, partition, *share = text.split(":")
        if not _TOPIC_ID.fullmatch(topic_id) or len(share) > 1:
            raise ValueError(f"{text!r} is no source: expected <32 hex digits>:<partition>[:<bucket>/<buckets>]")
        bucket, buckets = share[0].split("/") if share else ("0", "1")
        return cls(topic_id, int(partition), int(bucket), int(buckets))


def share_of(user: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The share of each user, `[n]` int64, of the `SHARES` shares of a partition's users; pseudonyms are random."""
    return (user % np.uint64(SHARES)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Gap:
    """The positions `[first, next)` of a source that are missing."""

    source: Source
    first: int
    next: int

    @property
    def positions(self) -> int:
        """The number of positions."""
        return self.next - self.first

    @property
    def place(self) -> str:
        """The gap in the form of `--accept-gap`; both ends are included.

        >>> Gap(Source("ab" * 16, 3), 10, 20).place
        'abababab:3:10-19'
        """
        return f"{self.source.topic_id[:8]}:{self.source.partition}:{self.first}-{self.next - 1}"

    def __str__(self) -> str:
        """Partition, both ends and the number of positions."""
        return f"partition {self.source.partition}, positions {self.first} to {self.next - 1} ({self.positions})"


@dataclass(frozen=True, slots=True)
class Range:
    """The contiguous offsets `[first, next)` of one source, with counts of their outcomes.

    Attributes:
        source: The source.
        first: The first offset.
        next: The offset after the last one.
        rows: Offsets that became rows.
        dead: Offsets whose records became dead letters.
        filtered: Offsets left out on purpose (too old, a tombstone).
        absent: Offsets without a record: transaction markers, aborted, compacted.
        gap: Offsets deleted before they were read, a loss that an operator accepted.
        opened: Offsets of impressions whose label comes later.
        feedback: Offsets of outcomes, which update only the histories.
        joined: Earlier impressions that outcomes in this range labelled: rows without an offset of their own.
        expired: Earlier impressions whose wait ended in this range: likewise.
        dropped: Impressions among `opened` that could not wait.
        masked: Offsets left out by the mask of control.
        elsewhere: Offsets of users of other buckets. Offsets without a user count in the first bucket.
    """

    source: Source
    first: int
    next: int
    rows: int = 0
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
    elsewhere: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError unless each offset has exactly one outcome."""
        outcomes = (self.rows, self.dead, self.filtered, self.absent, self.gap, self.opened, self.feedback, self.masked)
        negative = min(*outcomes, self.joined, self.expired, self.dropped, self.elsewhere) < 0
        if self.first < 0 or negative or self.next - self.first != sum(outcomes) + self.elsewhere:
            raise ValueError(
                f"offsets [{self.first}, {self.next}) of {self.source} do not add up: "
                f"{self.rows} rows + {self.dead} dead + {self.filtered} filtered + {self.absent} absent + {self.gap} gap "
                f"+ {self.opened} opened + {self.feedback} feedback + {self.masked} masked + {self.elsewhere} elsewhere"
            )

    @property
    def outcomes(self) -> dict[str, int]:
        """The counts by outcome; those of `RARE` are included only if not 0.

        >>> Range(Source("ab" * 16, 0), 5, 8, rows=2, dead=1).outcomes
        {'rows': 2, 'dead': 1, 'filtered': 0, 'absent': 0}
        """
        outcomes = {"rows": self.rows, "dead": self.dead, "filtered": self.filtered, "absent": self.absent}
        return outcomes | {name: count for name in RARE if (count := getattr(self, name))}


COUNTED = tuple(field.name for field in fields(Range))[3:]


def merge_ranges(earlier: Range, later: Range) -> Range:
    """Merges two adjacent ranges of a source; ValueError if the sources differ or the ranges are not adjacent."""
    if earlier.source != later.source or earlier.next != later.first:
        raise ValueError(
            f"[{earlier.first}, {earlier.next}) of {earlier.source} and "
            f"[{later.first}, {later.next}) of {later.source} are not adjacent"
        )
    return Range(
        earlier.source,
        earlier.first,
        later.next,
        *(getattr(earlier, name) + getattr(later, name) for name in COUNTED),
    )


def split_range(
    whole: Range, at: int, rows_before: int, others: Mapping[str, int] | None = None
) -> tuple[Range, Range]:
    """Splits `whole` before offset `at`, with `rows_before` of its rows in the first part; ValueError if impossible.

    A range counts dead, filtered and absent offsets, but does not identify them. So the first part takes the dead
    first, then the filtered, the masked, the absent, those elsewhere and the gap. The sums over both parts equal the
    whole. `others` has the counts of `opened`, `feedback`, `joined`, `expired` and `dropped` below `at`.

    >>> before, after = split_range(Range(Source("ab" * 16, 0), 0, 10, rows=7, dead=1, absent=2), at=5, rows_before=3)
    >>> before.outcomes, after.outcomes["rows"], after.outcomes["absent"]
    ({'rows': 3, 'dead': 1, 'filtered': 0, 'absent': 1}, 4, 1)
    """
    before = {"opened": 0, "feedback": 0, **(others or {}), "rows": rows_before}
    remaining = at - whole.first - rows_before - before["opened"] - before["feedback"]
    for name in ("dead", "filtered", "masked", "absent", "elsewhere"):
        before[name] = min(remaining, getattr(whole, name))
        remaining -= before[name]
    before["gap"] = remaining
    after = {name: getattr(whole, name) - before.get(name, 0) for name in COUNTED}
    return Range(whole.source, whole.first, at, **before), Range(whole.source, at, whole.next, **after)


def to_json(part: Range) -> dict[str, Any]:
    """Encodes a range as a JSON object; bucket and buckets only if a partition has several.

    >>> from_json(to_json(Range(Source("ab" * 16, 1), 3, 4, dead=1))).dead
    1
    """
    source = part.source
    share = {} if source.buckets == 1 else {"bucket": source.bucket, "buckets": source.buckets}
    return {
        "topic_id": source.topic_id,
        "partition": source.partition,
        **share,
        "first": part.first,
        "next": part.next,
        **part.outcomes,
    }


def from_json(document: Mapping[str, Any]) -> Range:
    """Decodes the output of `to_json`; ValueError if a field is missing or invalid, or the outcomes do not add up."""
    topic_id = document.get("topic_id")
    if not isinstance(topic_id, str) or not _TOPIC_ID.fullmatch(topic_id):
        raise ValueError(f"topic_id {topic_id!r} is not 32 hexadecimal digits")
    numbers = {}
    absent = {**dict.fromkeys(RARE, 0), "bucket": 0, "buckets": 1}
    for name in ("partition", "first", "next", *COUNTED, "bucket", "buckets"):
        number = document.get(name, absent.get(name))
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{name} {number!r} of a range is not an integer")
        numbers[name] = number
    source = Source(topic_id, numbers.pop("partition"), numbers.pop("bucket"), numbers.pop("buckets"))
    return Range(source, **numbers)
