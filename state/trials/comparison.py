"""Compares a trial with the live trainer: sums over paired rows, and a confidence sequence of their differences.

A difference is the trial's log loss minus the live one's, for one row that both scored before they learned from it.
Below 0 the trial was better. The interval of the mean holds at all times at once
(`state/statistics/confidence_sequence.py`), so it may be checked as often as wanted, and stopped early.
All of it is in one document, replaced as a whole; a restart continues from there.

`Pairing` matches the rows that two trainers scored of the same records of the training log. Each side arrives in the
order of the log, except for what a trainer learns again after a crash. A side may begin later, lag or stop.
A record is paired once, if both sides have it with the same rows. Rows that one side lacks are counted and not
compared; for example, a mask removed them that the other side did not have yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.disk import files as durable
from state.errors import CorruptStore
from state.statistics.confidence_sequence import ConfidenceSequence
from state.trials.row_losses import Blocks, RowLosses

F64 = NDArray[np.float64]

COMPARISON = "comparison.json"

Finding = Literal["better", "worse", "undecided", "the same"]


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
        next: Records before this offset were paired or skipped before.

    Attributes:
        next: Likewise, now.
        alone: Records that one side had and the other skipped.
        unlike: Records for which the sides had different rows.

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
        """Takes records of both sides; a repeated record replaces the earlier copy."""
        for place, records in enumerate((live, trial)):
            for one in records:
                self._newest[place] = max(self._newest[place], one.offset)
                if one.offset >= self.next:
                    self._sides[place][one.offset] = one

    @property
    def behind(self) -> tuple[bool, bool]:
        """Whether to read on for the live side and for the trial's: the side that is ahead waits.

        So the waiting records are bounded by one read.
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
        # Both sides come in order: records older than all of the other side's were skipped there.
        for side, other in ((live, trial), (trial, live)):
            bound = max(self.next, min(other, default=0))
            passed = [offset for offset in side if offset < bound]
            self.alone += len(passed)
            for offset in passed:
                del side[offset]
        return found


class PairedComparison:
    """The comparison of one trial; one thread.

    Args:
        alpha: Probability that a difference is ever reported if there is none.
        planned_rows: After how many rows the interval is about as narrow as it can be.

    Attributes:
        pairing: The records that wait for the other side.
        sequence: Of the differences, in nats per row.
        records: Records that were paired.
        differing: Rows of which the two losses differ in a bit at least.
    """

    def __init__(self, alpha: float, planned_rows: int) -> None:
        self.pairing, self.sequence = Pairing(), ConfidenceSequence(alpha, planned_rows)
        self.records = self.differing = 0
        self._live = self._trial = 0.0

    def take(self, pairs: Iterable[Pair]) -> None:
        """Adds paired records."""
        for one in pairs:
            differences = one.trial - one.live
            self.records += 1
            self.differing += int(np.count_nonzero(differences))
            self._live += float(one.live.sum())
            self._trial += float(one.trial.sum())
            self.sequence.add(differences, one.blocks.astype(np.uint64))

    def figures(self) -> dict[str, Any]:
        """The figures for people and metrics; None for those that are not known yet."""
        rows, (low, high) = self.sequence.rows, self.sequence.interval()
        return {
            "rows": rows,
            "records": self.records,
            "alone": self.pairing.alone,
            "unlike": self.pairing.unlike,
            "differing": self.differing,
            "live_log_loss": self._live / rows if rows else None,
            "trial_log_loss": self._trial / rows if rows else None,
            "difference": self.sequence.mean if rows else None,
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
            "alpha": self.sequence.alpha,
            "verdict": verdict(rows, self.differing, low, high),
        }

    def document(self) -> dict[str, Any]:
        """The state from which a restart continues, and `figures`."""
        sums = {"next": self.pairing.next, "live": self._live, "trial": self._trial}
        return {"figures": self.figures(), "sums": sums, "sequence": self.sequence.document()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PairedComparison:
        """Loads the result of `document`.

        Raises:
            KeyError, TypeError, ValueError: It is not such a document.
        """
        sequence = ConfidenceSequence.from_json(document["sequence"])
        found, sums, figures = cls(sequence.alpha, sequence.planned_rows), document["sums"], document["figures"]
        found.sequence, found.pairing = sequence, Pairing(int(sums["next"]))
        found.pairing.alone, found.pairing.unlike = int(figures["alone"]), int(figures["unlike"])
        found.records, found.differing = int(figures["records"]), int(figures["differing"])
        found._live, found._trial = float(sums["live"]), float(sums["trial"])
        return found


def verdict(rows: int, differing: int, low: float, high: float) -> Finding:
    """The verdict on the trial.

    >>> verdict(9, 9, -0.3, -0.1), verdict(9, 9, 0.1, 0.3), verdict(9, 9, -0.1, 0.1), verdict(9, 0, -math.inf, math.inf)
    ('better', 'worse', 'undecided', 'the same')
    """
    if rows and not differing:
        return "the same"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"


def write(folder: Path, comparison: PairedComparison) -> None:
    """Replaces the document of a trial; durable when this returns.

    Raises:
        OSError: The disk refused; the former document is unchanged.
    """
    durable.replace(folder / COMPARISON, json.dumps(comparison.document()).encode())


def read(folder: Path) -> PairedComparison | None:
    """The comparison of a trial; None before anything was compared.

    Raises:
        CorruptStore: It cannot be read.
    """
    path = folder / COMPARISON
    try:
        return PairedComparison.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStore(
            f"{path} is damaged: {error}", "remove it: the comparison begins anew with the next rows"
        ) from error


def figures_in(folder: Path) -> dict[str, Any] | None:
    """The figures in a trial's document; None if there is none, or it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / COMPARISON).read_bytes())["figures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
