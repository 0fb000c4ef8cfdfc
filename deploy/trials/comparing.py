"""Follows the losses of both trainers, pairs them, and keeps the comparison of one trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from state.config.sections import TrialSettings
from state.trials import comparison
from state.trials.comparison import PairedComparison
from state.trials.row_losses import LossReader

KEEP_S = 5.0
"""Between two times that the comparison is written."""
READS_AT_ONCE = 8


class ComparedTrial:
    """The comparison of one trial while it runs; one thread.

    Args:
        folder: The trial's directory.
        live: The registry of the live trainer.
        own: That of the trial's.
        settings: How sure, and after how many rows.
        elapsed: Monotonic seconds.

    Raises:
        CorruptStore: What was compared before cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        live: Path,
        own: Path,
        settings: TrialSettings,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._elapsed = folder, elapsed
        self._comparison = comparison.read(folder) or PairedComparison(settings.alpha, settings.planned_rows)
        self._live, self._own = LossReader(live), LossReader(own)
        self._kept_s, self._kept_records = elapsed(), self._comparison.records

    def step(self) -> None:
        """Reads on, and keeps what was compared where it is time.

        Raises:
            OSError: The disk refused; nothing is lost.
        """
        pairing = self._comparison.pairing
        for _ in range(READS_AT_ONCE):
            live_behind, own_behind = pairing.behind
            live = self._live.read() if live_behind else []
            own = self._own.read() if own_behind else []
            if not live and not own:
                break
            pairing.add(live, own)
            self._comparison.take(pairing.pairs())
        if self._elapsed() - self._kept_s >= KEEP_S:
            self.keep()

    def keep(self) -> None:
        """Writes what was compared; durable when this returns.

        Raises:
            OSError: The disk refused; it is tried again.
        """
        self._kept_s = self._elapsed()
        if self._comparison.records != self._kept_records:
            comparison.write(self._folder, self._comparison)
            self._kept_records = self._comparison.records
