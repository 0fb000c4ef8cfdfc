"""How far a source element has read: positions and clocks together, as the engine checkpoints them.

Whatever an element of the source gave out, the engine keeps the `SourceReading` after
it in the same checkpoint; reading goes on from there, with the witnesses of the
time as they were, so that each click gets the clock that it had before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from apache_beam.coders import Coder
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.transforms.core import RestrictionProvider

from state.positions import Source
from streaming.distributed.wire import pack, unpack


@dataclass(frozen=True)
class SourceReading:
    """How far one source element has read.

    Attributes:
        topic_id: The topic of clicks; empty before the first poll.
        next: By partition the next offset; a partition that is not named is read from its beginning.
        clocks: What the event clock keeps, by name.
        log_epoch: The epoch of the training log that was written so far; 0 before the first poll.
    """

    topic_id: str = ""
    next: Mapping[int, int] = field(default_factory=dict)
    clocks: Mapping[str, bytes] = field(default_factory=dict)
    log_epoch: int = 0

    def positions(self) -> dict[Source, int]:
        """By source the next offset."""
        return {Source(self.topic_id, partition): at for partition, at in self.next.items()}


class ReadingCoder(Coder):
    """The bytes of a `SourceReading`, in checkpoints and savepoints.

    >>> one = SourceReading("ab" * 16, {3: 7}, {"clock:all": b"12"}, 2)
    >>> ReadingCoder().decode(ReadingCoder().encode(one)) == one
    True
    """

    def encode(self, value: SourceReading) -> bytes:
        """The bytes."""
        head = {"topic_id": value.topic_id, "next": sorted(value.next.items()), "log_epoch": value.log_epoch}
        clocks = {name: np.frombuffer(value.clocks[name], np.uint8) for name in sorted(value.clocks)}
        return pack(head, clocks)

    def decode(self, encoded: bytes) -> SourceReading:
        """What `encode` took."""
        head, clocks = unpack(encoded)
        found = {name: one.tobytes() for name, one in clocks.items()}
        return SourceReading(
            head["topic_id"], {int(one): int(at) for one, at in head["next"]}, found, head["log_epoch"]
        )

    def is_deterministic(self) -> bool:
        """Equal readings have equal bytes."""
        return True

    def to_type_hint(self) -> type[SourceReading]:
        """What is encoded."""
        return SourceReading

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class ReadingTracker(RestrictionTracker):
    """A `SourceReading` that goes on with each claim, until the engine, or the step itself, puts off the rest.

    Args:
        reading: Where it begins.
    """

    def __init__(self, reading: SourceReading) -> None:
        self._reading = reading
        self._ended = self._put_off = False

    def current_restriction(self) -> SourceReading:
        """How far it is."""
        return self._reading

    def current_progress(self) -> RestrictionProgress:
        """None of it is done until all of it is: there is no end."""
        return RestrictionProgress(fraction=float(self._ended))

    def try_claim(self, after: SourceReading | None) -> bool:
        """Moves on to `after`; None ends it. False where the rest was put off: nothing may be given out then."""
        if self._put_off:
            return False
        self._ended = after is None
        self._reading = self._reading if after is None else after
        return True

    def try_split(self, fraction_of_remainder: float) -> tuple[SourceReading, SourceReading] | None:
        """Puts off the rest; partitions are not divided further, and an endless rest has no middle."""
        if fraction_of_remainder > 0 or self._ended or self._put_off:
            return None
        self._put_off = True
        return self._reading, self._reading

    def check_done(self) -> None:
        """Raises ValueError where the step returned and neither put off the rest nor ended."""
        if not (self._ended or self._put_off):
            raise ValueError("reading ended before anybody asked for it")

    def is_bounded(self) -> bool:
        """Whether it ends by itself: no."""
        return False


class Readings(RestrictionProvider):
    """Begins an element's reading at the topic's beginning."""

    def initial_restriction(self, element: int) -> SourceReading:
        """Nothing read."""
        return SourceReading()

    def create_tracker(self, restriction: SourceReading) -> ReadingTracker:
        """A tracker of it."""
        return ReadingTracker(restriction)

    def restriction_size(self, element: int, restriction: SourceReading) -> int:
        """One: there is nothing to weigh it against."""
        return 1

    def restriction_coder(self) -> ReadingCoder:
        """Not a pickle."""
        return ReadingCoder()
