"""Lets whoever compares this trainer with another one have the loss of each row, as it was scored before it was learned.

Nothing is written, and nothing copied, while nobody reads (`state/trials/row_losses.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from state.process.said_once import SaidOnce
from state.trials import row_losses
from state.trials.row_losses import LossWriter, RowLosses
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.measures.step_scores import SUMS

LOOK_S = 1.0
"""Between two looks at whether somebody reads."""
AGAIN_S = 10.0
"""After the disk refused."""

_LOG_LOSS = SUMS.index("log_loss")
logger = logging.getLogger(__name__)


class LossRecorder:
    """Writes the losses of one trainer. The step thread calls every method.

    Args:
        registry: The trainer's registry; its lock is held.
        elapsed: Monotonic seconds.
    """

    def __init__(self, registry: Path, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._elapsed = registry, elapsed
        self._look_s, self._writer = float("-inf"), LossWriter(registry)
        self._wanted = True
        self._say = SaidOnce(logger.warning)

    def take(self, offset: int, users: npt.NDArray[np.uint64], report: Report) -> None:
        """Writes what an accepted step scored, where somebody reads it; where the disk refuses, it is said and left out for a while.

        Rows of a record of which the guard skipped any are left out: a comparison is of rows that both trainers learn.

        Args:
            offset: Of the record in the training log.
            users: `[n]` uint64, of the rows that the step took.
            report: Of the step.
        """
        if not self._is_wanted():
            return
        if report.verdict is not Verdict.ACCEPT:
            return
        targets = np.concatenate([one.targets for one in report.judged])
        losses = np.concatenate([one.rows[:, _LOG_LOSS] for one in report.judged])
        try:
            self._writer.append(RowLosses(offset, row_losses.blocks_of(users[targets]), losses))
        except OSError as error:
            self._say(f"losses of rows are not written, and no trial is compared meanwhile: {error}")
            self._wanted, self._look_s = False, self._elapsed() + AGAIN_S - LOOK_S

    def _is_wanted(self) -> bool:
        now_s = self._elapsed()
        if now_s - self._look_s >= LOOK_S:
            before, self._wanted = self._wanted, row_losses.is_wanted(self._registry)
            self._look_s = now_s
            if before and not self._wanted:
                # Also at the start: an earlier one may have left some.
                self._writer.close()
                row_losses.remove_all(self._registry)
        return self._wanted
