"""Charges the ledger before records are learned, and holds training where too little of the budget is left.

A record is learned only under a charge for its period and its line
(`trainer/privacy/history.py`). The ledger is written before the record is
learned. It also names an offset, `through`, before which records may have been
learned; it is raised by `RESERVED` offsets at a time. What changes at or behind
that offset costs nothing: no record from there on was learned before.
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
from state.process import secret_file
from state.registry import privacy_ledger
from state.registry.control import Control
from state.registry.privacy_ledger import PrivacyLedger, PrivacyPeriod
from trainer.engine.step import Trainer
from trainer.intake import Intake
from trainer.place import TrainingPlace
from trainer.privacy.key import own_key
from trainer.privacy.place import NoisePlace, environment_digest

ROUNDING = 1e-6
"""By so much of itself epsilon may be above the budget: what a search leaves."""

RESERVED = 256
"""Offsets of the training log that one write of the ledger reserves."""

logger = logging.getLogger(__name__)


class PrivacyBudget:
    """The budget of one trainer. The step thread calls every method.

    Args:
        settings: All settings; with `privacy.epsilon` 0 nothing is ever asked.
        trainer: Whose records they are.
        metrics: What is shown.
        environment: What the bits of a step depend on beside the log, as in manifests.

    Attributes:
        held: Whether training holds, for the next period would take more than is left.
    """

    def __init__(
        self, settings: Settings, trainer: Trainer, metrics: TrainerMetrics, environment: Mapping[str, str]
    ) -> None:
        self._wanted, self._path, self._metrics = settings.privacy, settings.privacy_ledger_path, metrics
        self._trainer, self.held = trainer, False
        self._ledger: PrivacyLedger | None = None
        self._environment = environment_digest(environment)
        self._allowed: PrivacyPeriod | None = None
        self._learned: tuple[str, int] | None = None
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
        # Source and offset before which others may have learned; None where nobody did.
        self._learned = (self._ledger.source, self._ledger.through) if self._ledger.periods else None
        self._allowed = None
        self._show()

    def noise_place(self, found: Intake, source: Source, offset: int, control: Control) -> NoisePlace:
        """The record at `offset` as its noise sees it.

        Args:
            found: What is learned of it.
            source: Of the training log.
            offset: Of the record.
            control: That the trainer is at.
        """
        mask = control.mask_at(found.batch.header.mask_generation)
        return NoisePlace(
            source.topic_id, source.partition, offset, control.epoch, control.log, mask, self._environment
        )

    def allows(self, at: NoisePlace, found: Intake, place: TrainingPlace, leader_epoch: int) -> bool:
        """Whether a record may be learned; when this returns True, the ledger has its charge durably.

        Args:
            at: Of `noise_place`.
            found: What is learned of it; no row costs nothing.
            place: Before the record.
            leader_epoch: Kafka's epoch of the leader that wrote the record.

        Raises:
            OSError: The disk refused.
        """
        if self._ledger is None or not len(found.batch):
            return True
        self._metrics.privacy_rows_left_out.set(self._private.allowance.left_out)
        log_ms = max(self._trainer.counters.log_ms, int(found.batch.at_ms.max()))
        number = int(log_ms // (1000 * self._wanted.period_s)) if self._wanted.unit == "user" else 0
        # A rewritten log and accepted losses change which records a line has; the history sees them only afterwards.
        lost = place.left_out + place.gap + sum(first - mark for _, mark, first in found.gaps)
        line = self._private.history.line_at(at) + f"leader {leader_epoch} lost {lost}".encode()
        name = hashlib.blake2b(line, digest_size=16).hexdigest()
        period = PrivacyPeriod(at.epoch, number, self._private.updates, self._private.noise, (name,))
        source = f"{at.topic_id}:{at.partition}"
        reserved = source == self._ledger.source and at.offset < self._ledger.through
        if period == self._allowed and reserved:
            return True
        ledger = self._ledger
        if not privacy_ledger.is_charged(ledger, period):
            again = self._learned is not None and (source != self._learned[0] or at.offset < self._learned[1])
            ledger = self._paid(privacy_ledger.charged(ledger, period, again))
        if not self.held and not reserved:
            ledger = msgspec.structs.replace(ledger, source=source, through=at.offset + RESERVED)
        if ledger != self._ledger:
            privacy_ledger.write(self._path, ledger)
        self._ledger, self._allowed = ledger, None if self.held else period
        self._show()
        return not self.held

    def _paid(self, ledger: PrivacyLedger) -> PrivacyLedger:
        """`ledger` with what its charges cost; or the present one, held, where that is more than the budget."""
        from trainer.privacy.accounting import spent

        assert self._ledger is not None
        wanted, present = self._wanted, self._ledger
        after, before = spent(ledger.periods, wanted.delta), spent(present.periods, wanted.delta)
        self.held = len(ledger.periods) > len(present.periods) and after > wanted.epsilon * (1.0 + ROUNDING)
        if self.held:
            logger.error(
                "training holds: the privacy budget is spent, epsilon %.3g of %.3g after %d periods; answers go on; see "
                "trainer/PRIVACY.md for what a larger budget means",
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
