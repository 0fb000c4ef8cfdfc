"""What the trainer does at its start, as a gauge and in the log: a restart that takes long shows where it is."""

from __future__ import annotations

import logging
import time

from state.metrics import TrainerMetrics

IMPORTS = "loading TensorFlow"
KERNELS = "compiling kernels"
BOOTSTRAP = "waiting for the bootstrap"
MODEL = "building the model"
PROGRAM = "lowering the program"
VERSION = "loading the version"
CATCHING_UP = "catching up"
LEARNING = "learning"
PHASES = (IMPORTS, KERNELS, BOOTSTRAP, MODEL, PROGRAM, VERSION, CATCHING_UP, LEARNING)

SAY_S = 5.0
logger = logging.getLogger(__name__)


class Phases:
    """The phase of a trainer's start.

    Args:
        metrics: Of the trainer.
    """

    def __init__(self, metrics: TrainerMetrics) -> None:
        self._metrics, self._phase = metrics, ""
        self._since_s = self._said_s = time.monotonic()

    def enter(self, phase: str) -> None:
        """Shows the phase, and logs how long the one before took; the one that it is in already is entered once."""
        if phase == self._phase:
            return
        now_s = time.monotonic()
        if self._phase:
            logger.info("%s: %.1f s; now %s", self._phase, now_s - self._since_s, phase)
        self._phase, self._since_s, self._said_s = phase, now_s, now_s
        for one in PHASES:
            self._metrics.phase.labels(one).set(one == phase)

    def follow(self, caught_up: bool, records_left: int | None) -> None:
        """Shows whether the trainer has read the log to its end; until then how many records are left, every few seconds.

        Args:
            caught_up: Whether it has.
            records_left: Positions of the log that it has not taken; None where that is not known yet.
        """
        self.enter(LEARNING if caught_up else CATCHING_UP)
        if not caught_up and time.monotonic() >= self._said_s + SAY_S:
            self._said_s = time.monotonic()
            logger.info("catching up, %s records left", "unknown" if records_left is None else f"{records_left:,}")
