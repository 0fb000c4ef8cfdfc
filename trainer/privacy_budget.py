"""Asks the ledger for each period before its first record is learned, and lets training hold where too little is left."""

from __future__ import annotations

import logging
from dataclasses import replace

from state.config.settings import Settings
from state.errors import RegistryError, SettingsError
from state.metrics import TrainerMetrics
from state.microbatch.batch import MicroBatch
from state.positions import Source
from state.process import secret_file
from state.registry import privacy_ledger
from state.registry.privacy_ledger import PrivacyLedger, PrivacyPeriod
from trainer.engine.step import Trainer
from trainer.place import TrainingPlace
from trainer.privacy.key import own_key
from trainer.privacy.place import NoisePlace

ROUNDING = 1e-6
"""By so much of itself epsilon may be above the budget: what a search leaves."""

logger = logging.getLogger(__name__)


class PrivacyBudget:
    """The budget of one trainer. The step thread calls every method.

    Args:
        settings: All settings; with `privacy.epsilon` 0 nothing is ever asked.
        trainer: Whose records they are.
        metrics: What is shown.

    Attributes:
        held: Whether training holds, for the next period would take more than is left.
    """

    def __init__(self, settings: Settings, trainer: Trainer, metrics: TrainerMetrics) -> None:
        self._wanted, self._path, self._metrics = settings.privacy, settings.privacy_ledger_path, metrics
        self._trainer, self.held = trainer, False
        self._ledger: PrivacyLedger | None = None
        metrics.privacy_epsilon_limit.set(self._wanted.epsilon)
        if self._wanted.epsilon:
            # Not at the top: what computes a budget takes a second to load.
            from trainer.engine.private_step import PrivateTrainer

            assert isinstance(trainer, PrivateTrainer), "what trainer_of makes where a budget is set"
            self._private, self._key = trainer.private, secret_file.fingerprint(own_key(settings))

    def enter(self) -> None:
        """At the beginning of an epoch, or after a start: takes up what is spent.

        Raises:
            RegistryError: The ledger is gone, or it is damaged.
            SettingsError: It is of another key, or of another unit.
        """
        if not self._wanted.epsilon:
            return
        found, ours = privacy_ledger.read(self._path), (self._key, self._wanted.unit)
        if found is None and self._private.allowance.began:
            raise RegistryError(
                f"there is no ledger of the privacy budget at {self._path}, and versions were learned under one",
                "restore it from a backup, or begin a new state directory (paths.state)",
            )
        if found is not None and (found.key, found.unit) != ours:
            names = ("privacy.key_file", "privacy.unit")
            name, was, now = next(
                one for one in zip(names, (found.key, found.unit), ours, strict=True) if one[1] != one[2]
            )
            raise SettingsError(
                f"the ledger of the privacy budget at {self._path} has {was} for {name}, and the trainer has {now}",
                f"put {name} back, or begin a new state directory (paths.state)",
            )
        self._ledger, self.held = found or PrivacyLedger(*ours), False
        self._show()

    def allows(self, place: TrainingPlace, batch: MicroBatch) -> bool:
        """Whether a record may be learned; its period is in the ledger, durably, before this returns True.

        Args:
            place: Before the record.
            batch: What is to be learned of it; no row takes nothing.

        Raises:
            OSError: The disk refused.
        """
        if self._ledger is None or not len(batch):
            return True
        self._metrics.privacy_rows_left_out.set(self._private.allowance.left_out)
        log_ms = max(self._trainer.counters.log_ms, int(batch.at_ms.max()))
        number = int(log_ms // (1000 * self._wanted.period_s)) if self._wanted.unit == "user" else 0
        period = PrivacyPeriod(place.epoch, number, self._private.updates, self._private.noise)
        if period in self._ledger.periods:
            return True
        from trainer.privacy.accounting import spent

        wanted, periods = self._wanted, (*self._ledger.periods, period)
        after, before = spent(periods, wanted.delta), spent(self._ledger.periods, wanted.delta)
        self.held = after > wanted.epsilon * (1.0 + ROUNDING)
        kept = self._ledger.periods if self.held else periods
        self._ledger = replace(
            self._ledger,
            periods=kept,
            epsilon=wanted.epsilon,
            delta=wanted.delta,
            spent=before if self.held else after,
            held=self.held,
        )
        privacy_ledger.write(self._path, self._ledger)
        self._show()
        if self.held:
            logger.error(
                "training holds: the privacy budget is spent, epsilon %.3g of %.3g after %d periods; answers go on; see "
                "trainer/PRIVACY.md for what a larger budget means",
                *(before, wanted.epsilon, len(kept)),
            )
        return not self.held

    def _show(self) -> None:
        if self._ledger is not None:
            self._metrics.privacy_epsilon_spent.set(self._ledger.spent)
            self._metrics.privacy_held.set(self.held)


def noise_place(source: Source, offset: int, place: TrainingPlace) -> NoisePlace:
    """Where the noise of the record at `offset` stands.

    Args:
        source: Of the training log.
        offset: Of the record.
        place: Of the trainer before it.
    """
    return NoisePlace(source.topic_id, source.partition, offset, place.epoch, place.erased)
