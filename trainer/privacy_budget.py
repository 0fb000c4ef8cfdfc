"""The privacy budget: charges the ledger before records are learned, and holds training if too little is left.

A record is learned only under a charge for its period and its branch (`trainer/privacy.py`). The order matters:

1. The ledger is written. It also names an offset, `through`, before which records may have been learned. It is raised
   by `RESERVED` offsets at a time.
2. The record is learned.

A change at or after `through` costs no budget, because no record from there on was learned before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import msgspec

from state.config.settings import Settings
from state.errors import RegistryError, SettingsError
from state.metrics import TrainerMetrics
from state.positions import Source
from state.process import private_files
from state.registry import privacy_ledger
from state.registry.control import Control
from state.registry.directory import Directory
from state.registry.privacy_ledger import PrivacyLedger, PrivacyPeriod
from trainer.engine.step import Trainer
from trainer.intake import Intake, TrainingPlace
from trainer.privacy import NoisePlace, environment_digest, own_key

ROUNDING = 1e-6
"""Relative tolerance of epsilon above the budget: the precision of the search."""

RESERVED = 256
"""Offsets of the training log that one write of the ledger reserves."""

logger = logging.getLogger(__name__)


class PrivacyBudget:
    """The budget of one trainer. The step thread calls every method."""

    def __init__(
        self,
        settings: Settings,
        directory: Directory,
        trainer: Trainer,
        metrics: TrainerMetrics,
        environment: Mapping[str, str],
    ) -> None:
        self._directory = directory
        self._wanted, self._path, self._metrics = settings.privacy, settings.privacy_ledger_path, metrics
        self._trainer, self.held = trainer, False
        self._ledger: PrivacyLedger | None = None
        self._environment = environment_digest(environment)
        self._allowed: PrivacyPeriod | None = None
        self._learned: tuple[str, int] | None = None
        metrics.privacy_epsilon_limit.set(self._wanted.epsilon)
        if self._wanted.epsilon:
            # Not at the top: the accountant's import takes a second.
            from trainer.engine.private_step import PrivateTrainer

            assert isinstance(trainer, PrivateTrainer), "what trainer_of makes where a budget is set"
            self._private, self._key = trainer.private, private_files.fingerprint(own_key(settings))

    def enter(self) -> None:
        """Reads the spent budget, at the beginning of an epoch or after a start.

        Raises:
            RegistryError: The ledger is missing or damaged.
            SettingsError: It has another key, or another unit.
        """
        if not self._wanted.epsilon:
            return
        ledger, identity = privacy_ledger.read(self._path), (self._key, self._wanted.unit)
        if ledger is None and self._private.allowance.began:
            raise RegistryError(
                f"there is no ledger of the privacy budget at {self._path}, and versions were learned under one",
                "restore it from a backup, or begin a new state directory (paths.state)",
            )
        if ledger is not None and (ledger.key, ledger.unit) != identity:
            names = ("the key of the noise", "privacy.unit")
            name, was, now = next(
                pair for pair in zip(names, (ledger.key, ledger.unit), identity, strict=True) if pair[1] != pair[2]
            )
            raise SettingsError(
                f"the ledger of the privacy budget at {self._path} has {was} for {name}, and the trainer has {now}",
                f"put {name} back, or begin a new state directory (paths.state)",
            )
        self._ledger, self.held = ledger or PrivacyLedger(*identity), False
        # Source and offset before which other trainers may have learned; None if there were none.
        self._learned = (self._ledger.source, self._ledger.through) if self._ledger.periods else None
        self._allowed = None
        self._show()

    def noise_place(self, intake: Intake, source: Source, offset: int, control: Control) -> NoisePlace:
        """The identity of the record at `offset` of the training log's partition `source`, for its noise."""
        mask = control.mask_at(intake.batch.header.mask_generation)
        return NoisePlace(
            source.topic_id, source.partition, offset, control.epoch, control.log, mask, self._environment
        )

    def allows(self, noise_place: NoisePlace, intake: Intake, position: TrainingPlace, leader_epoch: int) -> bool:
        """Whether a record may be learned; when this returns True, the ledger has its charge durably.

        `position` is that before the record. A record without rows to learn costs nothing.

        Raises:
            OSError: The disk cannot be written.
        """
        if self._ledger is None or not len(intake.batch):
            return True
        self._metrics.privacy_rows_left_out.set(self._private.allowance.left_out)
        log_ms = max(self._trainer.counters.log_ms, int(intake.batch.at_ms.max()))
        number = log_ms // self._private.allowance.period_ms if self._wanted.unit == "user" else 0
        # A rewritten log and accepted losses change which records a branch has; the history sees them only afterwards.
        lost = position.left_out + position.gap + sum(first - mark for _, mark, first in intake.gaps)
        line = self._private.history.line_at(noise_place) + f"leader {leader_epoch} lost {lost}".encode()
        name = hashlib.blake2b(line, digest_size=16).hexdigest()
        period = PrivacyPeriod(noise_place.epoch, number, self._private.updates, self._private.noise, (name,))
        source = f"{noise_place.topic_id}:{noise_place.partition}"
        reserved = source == self._ledger.source and noise_place.offset < self._ledger.through
        if period == self._allowed and reserved:
            return True
        ledger = self._ledger
        if not privacy_ledger.is_charged(ledger, period):
            again = self._learned is not None and (source != self._learned[0] or noise_place.offset < self._learned[1])
            ledger = self._paid(privacy_ledger.charged(ledger, period, again))
        if not self.held and not reserved:
            ledger = msgspec.structs.replace(ledger, source=source, through=noise_place.offset + RESERVED)
        if ledger != self._ledger:
            privacy_ledger.write(self._directory, self._path, ledger)
        self._ledger, self._allowed = ledger, None if self.held else period
        self._show()
        return not self.held

    def _paid(self, ledger: PrivacyLedger) -> PrivacyLedger:
        """`ledger` with the cost of its charges; or the present one, held, if the cost exceeds the budget."""
        from trainer.privacy import spent

        assert self._ledger is not None
        wanted, present = self._wanted, self._ledger
        after, before = spent(ledger.periods, wanted.delta), spent(present.periods, wanted.delta)
        self.held = len(ledger.periods) > len(present.periods) and after > wanted.epsilon * (1.0 + ROUNDING)
        if self.held:
            logger.error(
                "training holds: the privacy budget is spent, epsilon %.3g of %.3g after %d periods; serving continues; see "
                "docs/model/privacy.md for what a larger budget means",
                *(before, wanted.epsilon, len(present.periods)),
            )
        return msgspec.structs.replace(
            present if self.held else ledger,
            epsilon=wanted.epsilon,
            delta=wanted.delta,
            spent=before if self.held else after,
            held=self.held,
        )

    def _show(self) -> None:
        if self._ledger is not None:
            self._metrics.privacy_epsilon_spent.set(self._ledger.spent)
            self._metrics.privacy_held.set(self.held)
