"""How a trial compares with the live trainer so far: sums over paired rows, and a confidence sequence of their differences.

A difference is the trial's log loss less the live one's, of one row that both
scored before they learned from it: below 0 the trial was better. The interval
of the mean holds at all looks at once (`state/statistics/confidence_sequence.py`),
so that one may look as often as one likes, and stop when one has seen enough.
All of it is in one document, replaced as a whole: a restart goes on from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from state.disk import files as durable
from state.errors import CorruptStore
from state.statistics.confidence_sequence import ConfidenceSequence
from state.trials.pairing import Pair, Pairing

COMPARISON = "comparison.json"

Finding = Literal["better", "worse", "undecided", "the same"]


class PairedComparison:
    """The comparison of one trial; one thread.

    Args:
        alpha: How often a difference is told where there is none, over all looks together.
        planned_rows: After how many rows the interval is about as narrow as it can be.

    Attributes:
        pairing: Who waits for whom.
        sequence: Of the differences, in nats a row.
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
        """What people and metrics are told; None for what is not known yet."""
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
        """All that a restart goes on from, and `figures`."""
        sums = {"next": self.pairing.next, "live": self._live, "trial": self._trial}
        return {"figures": self.figures(), "sums": sums, "sequence": self.sequence.document()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PairedComparison:
        """What `document` made.

        Raises:
            KeyError, TypeError, ValueError: It is none.
        """
        sequence = ConfidenceSequence.from_json(document["sequence"])
        found, sums, figures = cls(sequence.alpha, sequence.planned_rows), document["sums"], document["figures"]
        found.sequence, found.pairing = sequence, Pairing(int(sums["next"]))
        found.pairing.alone, found.pairing.unlike = int(figures["alone"]), int(figures["unlike"])
        found.records, found.differing = int(figures["records"]), int(figures["differing"])
        found._live, found._trial = float(sums["live"]), float(sums["trial"])
        return found


def verdict(rows: int, differing: int, low: float, high: float) -> Finding:
    """What can be said of the trial, in words.

    >>> verdict(9, 9, -0.3, -0.1), verdict(9, 9, 0.1, 0.3), verdict(9, 9, -0.1, 0.1), verdict(9, 0, -math.inf, math.inf)
    ('better', 'worse', 'undecided', 'the same')
    """
    if rows and not differing:
        return "the same"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"


def write(folder: Path, comparison: PairedComparison) -> None:
    """Replaces the document of a trial; durable when this returns.

    Raises:
        OSError: The disk refused; the one before is there.
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
    """What a trial's document says for people; None where there is none, or it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / COMPARISON).read_bytes())["figures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
