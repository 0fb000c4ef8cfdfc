"""What became of each position of the clicks, over all buckets. Pure.

A partition was read up to the least that any of its buckets has; each offset is
counted by the bucket whose user it is of, or by the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from state.accounts import StreamAccount, check_accounts
from state.errors import PositionConflict
from state.history.counts import Counts, advanced, summed
from state.positions import Range, Source, from_json


@dataclass
class Account:
    """The counts of all buckets.

    Attributes:
        counts: By source, as the histories of the local form count them.
        conflicts: Ranges that did not go on where their source was: what the engine lost or repeated.
        erased: By bucket the last erasure that it has taken into account.
    """

    counts: dict[Source, Counts] = field(default_factory=dict)
    conflicts: int = 0
    erased: dict[int, int] = field(default_factory=dict)

    def take_bundle(self, told: Mapping[str, Any]) -> None:
        """Takes what the sink told of a bundle."""
        self.take(map(from_json, told["ranges"]))
        self.erased |= {int(bucket): erased for bucket, erased in told["erased"].items()}

    def take(self, ranges: Iterable[Range]) -> None:
        """Takes ranges, those of one source in order."""
        for part in ranges:
            before = self.counts.get(part.source)
            try:
                self.counts[part.source] = advanced(before, part, "the account")
            except PositionConflict:
                assert before is not None
                self.conflicts += 1
                self.counts[part.source] = advanced({**before, "next": part.first}, part, "the account")

    def reached(self, topic_id: str) -> dict[int, int]:
        """By partition of a topic the offset up to which all buckets have it."""
        found: dict[int, list[int]] = {}
        wanted: dict[int, int] = {}
        for source, counts in self.counts.items():
            if source.topic_id == topic_id:
                found.setdefault(source.partition, []).append(counts["next"])
                wanted[source.partition] = source.buckets
        return {one: min(nexts) for one, nexts in sorted(found.items()) if len(nexts) >= wanted[one]}

    def forgotten(self, buckets: int) -> int:
        """The last erasure that all of so many buckets have taken into account.

        >>> Account(erased={0: 2, 1: 1}).forgotten(2), Account(erased={0: 2}).forgotten(2)
        (1, 0)
        """
        return min(self.erased.get(bucket, 0) for bucket in range(buckets))

    @property
    def totals(self) -> Counts:
        """Outcomes over all sources, with `positions`, their sum."""
        return summed(self.counts.values())

    @property
    def waiting(self) -> int:
        """Impressions that wait for their label."""
        return sum(StreamAccount.of(one).waiting for one in self.counts.values())

    def faults(self) -> tuple[str, ...]:
        """Where it does not balance: ranges that did not go on, and partitions whose buckets do not add up to its offsets."""
        found = [f"{self.conflicts} ranges did not begin where their bucket was"] if self.conflicts else []
        partitions: dict[tuple[str, int, int], list[Mapping[str, int]]] = {}
        for source, counts in self.counts.items():
            found += [f"{source}: {fault}" for fault in check_accounts(StreamAccount.of(counts))]
            partitions.setdefault((source.topic_id, source.partition, source.buckets), []).append(counts)
        for (topic_id, partition, buckets), theirs in partitions.items():
            spans = {(one["first"], one["next"]) for one in theirs}
            # While some buckets are ahead of others their parts do not make a whole.
            if len(spans) == 1 and len(theirs) == buckets:
                ((first, after),) = spans
                passed = summed(theirs)["positions"]
                if passed != after - first:
                    found.append(
                        f"{topic_id}:{partition}: {after - first} offsets, and its buckets have {passed} of their own"
                    )
        return tuple(found)

    def to_bytes(self) -> bytes:
        """As the engine keeps it."""
        counts = {str(source): one for source, one in self.counts.items()}
        return json.dumps({"counts": counts, "conflicts": self.conflicts, "erased": self.erased}).encode()

    @classmethod
    def from_bytes(cls, value: bytes | None) -> Account:
        """What `to_bytes` gave; None is an account of nothing.

        >>> one = Account()
        >>> one.take([Range(Source("ab" * 16, 0, 1, 2), 5, 9, rows=1, elsewhere=3)])
        >>> Account.from_bytes(one.to_bytes()) == one, one.totals["positions"]
        (True, 1)
        """
        if value is None:
            return cls()
        told = json.loads(value)
        erased = {int(bucket): last for bucket, last in told["erased"].items()}
        return cls({Source.parse(source): one for source, one in told["counts"].items()}, told["conflicts"], erased)
