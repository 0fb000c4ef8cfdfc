"""Pairs what two trainers said of the same records of the training log, row by row. Pure.

Each side comes in the order of the log, but for what a trainer learns again
after a crash, and may begin later, lag or stop. A record is paired once, where
both have it with the same rows; what one side lacks, as rows that one left out
by a mask that the other did not know yet, is counted and compared with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.trials.row_losses import Blocks, RowLosses

F64 = NDArray[np.float64]


class Pair(NamedTuple):
    """The rows of one record, as both scored them.

    Attributes:
        offset: The record's, in the training log.
        blocks: `[n]` uint16, the blocks of their users.
        live: `[n]` float64, the log losses of the live trainer.
        trial: `[n]` float64, those of the trial's.
    """

    offset: int
    blocks: Blocks
    live: F64
    trial: F64


class Pairing:
    """The records of two sides that wait for each other.

    Args:
        next: Records before this offset were paired, or passed by, before.

    Attributes:
        next: Likewise, now.
        alone: Records that one side had and the other passed by.
        unlike: Records of which the sides had other rows.

    >>> def record(offset, *losses):
    ...     return RowLosses(offset, np.zeros(len(losses), np.uint16), np.array(losses))
    >>> pairing = Pairing()
    >>> pairing.add([record(4, 1.0), record(6, 2.0)], [record(6, 1.5)])
    >>> [(one.offset, float(one.trial[0] - one.live[0])) for one in pairing.pairs()], pairing.next, pairing.alone
    ([(6, -0.5)], 7, 1)
    """

    def __init__(self, next: int = 0) -> None:
        self.next, self.alone, self.unlike = next, 0, 0
        self._sides: tuple[dict[int, RowLosses], dict[int, RowLosses]] = ({}, {})
        self._newest = [-1, -1]

    def add(self, live: Iterable[RowLosses] = (), trial: Iterable[RowLosses] = ()) -> None:
        """Takes records of both sides; one that comes again takes the place of itself."""
        for place, records in enumerate((live, trial)):
            for one in records:
                self._newest[place] = max(self._newest[place], one.offset)
                if one.offset >= self.next:
                    self._sides[place][one.offset] = one

    @property
    def behind(self) -> tuple[bool, bool]:
        """Whether the live side, and the trial's, is not ahead of the other: who is ahead need not be read on.

        So what waits here is bounded by what one reading brings.
        """
        live, trial = self._newest
        return live <= trial, trial <= live

    def pairs(self) -> list[Pair]:
        """The records that both have now, each once, in the order of the log."""
        live, trial = self._sides
        both = sorted(live.keys() & trial.keys())
        found = []
        for offset in both:
            ours, theirs = live.pop(offset), trial.pop(offset)
            if np.array_equal(ours.blocks, theirs.blocks):
                found.append(Pair(offset, ours.blocks, ours.losses, theirs.losses))
            else:
                self.unlike += 1
        if both:
            self.next = both[-1] + 1
        # Both sides come in order: what is older than all that the other has was passed by there.
        for side, other in ((live, trial), (trial, live)):
            bound = max(self.next, min(other, default=0))
            passed = [offset for offset in side if offset < bound]
            self.alone += len(passed)
            for offset in passed:
                del side[offset]
        return found
