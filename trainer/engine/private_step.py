"""The training step with a privacy budget (`privacy.epsilon`): each update releases only clipped sums with noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from trainer.engine.optimizers.adam import Adam
from trainer.engine.private import NOISE_FLOOR, PrivateLearning
from trainer.engine.private import Update as PrivateUpdate
from trainer.engine.record import Record
from trainer.engine.report import Report, Update
from trainer.engine.step import Trainer
from trainer.engine.tensorflow.private import PrivateEngine
from trainer.model.preprocessing import Preprocessing
from trainer.privacy.key import own_key
from trainer.privacy.place import NoisePlace
from trainer.tables.index import U64


class PrivateTrainer(Trainer):
    """A `Trainer` that learns with differential privacy. The metrics of a step stay exact; only the operator sees them.

    Args:
        settings: All settings, with a budget.
        spec: The feature spec of the micro-batches.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.

    Attributes:
        private: Clips, adds noise, and remembers who took part.

    Raises:
        SettingsError: The key of the noise is missing.
    """

    def __init__(self, settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None = None) -> None:
        self.private = PrivateLearning(settings, own_key(settings))
        super().__init__(settings, spec, preprocessing)
        assert isinstance(self.optimizer, Adam)
        self.optimizer.epsilon = np.float32(NOISE_FLOOR * self.private.deviation)
        self._record_noise, self._number = "", 0
        self._under_way: PrivateUpdate | None = None

    def clear(self) -> None:
        """See `Trainer`."""
        super().clear()
        self.private.allowance.clear()
        self.private.history.clear()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """See `Trainer`."""
        kept = self.private.allowance.state() | self.private.history.state()
        return super().state() | {f"privacy.{name}": value for name, value in kept.items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Trainer`."""
        super().load(state)
        mine = {name.removeprefix("privacy."): value for name, value in state.items() if name.startswith("privacy.")}
        self.private.allowance.load(mine)
        self.private.history.load(mine)

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None, place: NoisePlace | None = None) -> Report:
        """See `Trainer`.

        Raises:
            TrainingHeld: The guard has held training.
            ValueError: The batch has no row, or has no `place`. Without it, its noise would be that of another record.
        """
        if place is None:
            raise ValueError("a record that is learned privately has a place in the log")
        # A refused record leaves no trace in the history.
        if not self.guard.held and len(batch):
            self._record_noise, self._number = self.private.history.take(place, batch), 0
        return super().step(batch, seed)

    def _update(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Update:
        assert isinstance(self.engine, PrivateEngine)
        self.private.allowance.begin(self.counters.log_ms)
        self._under_way = self.private.begin(batch.user, self._record_noise, self._number)
        self._number += 1
        record = self._record(batch, crosses, seed)
        measured = self.private.measure(self.engine, record, self._under_way)
        return self._judge_and_apply(batch, record, measured)

    def _judged(self, loss: float) -> float:
        # An exact loss that decided about a step would leak information. The guard's norm includes noise.
        return 0.0

    def _teaching(self, rows: int, taught: bool) -> int:
        # Skipping a step because a row is missing would reveal that it is missing. The norm of the noise does not
        # depend on the rows, so the guard compares updates as if each had one row.
        return 1

    def _count(self, batch: MicroBatch, record: Record) -> None:
        assert self._under_way is not None
        self.private.count(self.popular, batch.category, self._under_way, self.counters.log_ms)
