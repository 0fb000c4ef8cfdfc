"""How far a source has read: positions and clocks together, as the engine checkpoints them.

Whatever a source gave out, the engine keeps the `SourceReading` after
it in the same checkpoint; reading goes on from there, with the witnesses of the
time as they were, so that each click gets the clock that it had before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from state.log.accepted_gaps import Accepted
from state.positions import Source
from streaming.distributed.wire import pack, unpack


@dataclass(frozen=True)
class SourceReading:
    """How far one source has read.

    Attributes:
        topic_id: The topic of clicks; empty before the first poll.
        next: By partition the next offset; a partition that is not named is read from its beginning.
        clocks: What the event clock keeps, by name.
        log_epoch: The epoch of the training log that was written so far; 0 before the first poll.
        erased: The last erasure that all buckets were told of.
        leaders: By partition the leader's epoch of the record before `next`, where it is known: it shows whether the
            clicks were cut back since.
        accepted: The losses that operators accepted, oldest first.
    """

    topic_id: str = ""
    next: Mapping[int, int] = field(default_factory=dict)
    clocks: Mapping[str, bytes] = field(default_factory=dict)
    log_epoch: int = 0
    erased: int = 0
    leaders: Mapping[int, int] = field(default_factory=dict)
    accepted: tuple[Accepted, ...] = ()

    def positions(self) -> dict[Source, int]:
        """By source the next offset."""
        return {Source(self.topic_id, partition): at for partition, at in self.next.items()}

    def to_bytes(self) -> bytes:
        """As the state keeps it; equal readings have equal bytes."""
        head = {
            "topic_id": self.topic_id,
            "next": sorted(self.next.items()),
            "log_epoch": self.log_epoch,
            "erased": self.erased,
            "leaders": sorted(self.leaders.items()),
            "accepted": [one.to_json() for one in self.accepted],
        }
        clocks = {name: np.frombuffer(self.clocks[name], np.uint8) for name in sorted(self.clocks)}
        return pack(head, clocks)

    @classmethod
    def from_bytes(cls, value: bytes | None) -> SourceReading:
        """What `to_bytes` gave; None is a source that was never read.

        >>> from state.positions import Gap
        >>> lost = Accepted(Gap(Source("ab" * 16, 3), 5, 6), "ann", "retention", 9)
        >>> one = SourceReading("ab" * 16, {3: 7}, {"clock:all": b"12"}, 2, 1, {3: 4}, (lost,))
        >>> SourceReading.from_bytes(one.to_bytes()) == one
        True
        """
        if value is None:
            return cls()
        head, clocks = unpack(value)
        found = {name: one.tobytes() for name, one in clocks.items()}
        return cls(
            head["topic_id"],
            {int(one): int(at) for one, at in head["next"]},
            found,
            head["log_epoch"],
            head["erased"],
            {int(one): int(epoch) for one, epoch in head["leaders"]},
            tuple(map(Accepted.from_json, head["accepted"])),
        )
