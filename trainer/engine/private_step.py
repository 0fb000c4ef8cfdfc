"""The training step with a privacy budget (`privacy.epsilon`): rows in isolation, clipped by unit, with noise.

1. A row loses what comes from other rows: its drawn negative, and another row's category in its last slot.
2. Users who reached their number of updates for the period take no part.
3. The rows of each unit together are scaled to `privacy.clip`, each loss to a share of it.
4. Noise is added. The key and the history of the record determine it. Only then does the guard, an optimizer or a
   version see the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from trainer.engine.build import labelled
from trainer.engine.engine import F32, Measured
from trainer.engine.private_engine import LOSSES, Normal, PrivateEngine
from trainer.engine.record import Record
from trainer.engine.report import Report, Update
from trainer.engine.step import Trainer
from trainer.engine.tensorflow_engine import Adam
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.model import Analysed, Preprocessing
from trainer.privacy import COUNT_NOISE, History, NoisePlace, Participation, noise_for, own_key
from trainer.tables.index import U64
from trainer.tables.lists import ONE, Popular

F64 = npt.NDArray[np.float64]

_UNIT = 2.0**-53


class Noise:
    """The noise of one key."""

    def __init__(self, key: bytes) -> None:
        # BLAKE2b accepts keys of at most 64 bytes.
        self._key = hashlib.blake2b(key, digest_size=64, person=b"springtide noise").digest()

    def normal(self, name: str, count: int) -> F64:
        """Standard normal numbers, `[count]` float64. The first ones are the same for any `count`; `name` is unique to their use.

        >>> one, other = Noise(b"a key of a test"), Noise(b"another one")
        >>> bool((one.normal("here", 3) == one.normal("here", 8)[:3]).all())
        True
        >>> bool((one.normal("here", 3) == other.normal("here", 3)).any() or (one.normal("there", 3) == one.normal("here", 3)).any())
        False
        """
        key = hashlib.blake2b(name.encode(), key=self._key, digest_size=32).digest()
        pairs = -(-count // 2)
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16 * pairs))
        words = np.frombuffer(stream, "<u8").reshape(pairs, 2) >> np.uint64(11)
        # In (0, 1], so that its logarithm is finite: at most 8.57 standard deviations.
        length = np.sqrt(-2.0 * np.log((words[:, 0] + np.uint64(1)).astype(np.float64) * _UNIT))
        angle = words[:, 1].astype(np.float64) * (2.0 * np.pi * _UNIT)
        numbers = np.empty((pairs, 2))
        numbers[:, 0], numbers[:, 1] = length * np.cos(angle), length * np.sin(angle)
        return numbers.reshape(-1)[:count]


NOISE_FLOOR = 0.3
"""Added to the root of Adam's mean squared derivative, in units of the noise of a derivative (Reddi et al. 2021).

The larger the share of noise, the smaller the step.
"""

FACTORS = tuple(name for names in LOSSES.values() for name in names)
"""Fields of `Targets`: the factors of a row's losses."""

ROUNDING = 1e-4
"""Relative margin by which a unit's norm stays below the bound: more than the rounding errors of float32 sums."""


class Units(NamedTuple):
    """The privacy units of an update.

    Attributes:
        of: `[B]` int64, the index of each row's unit.
        learned: `[B]` bool, whether the row takes part.
    """

    of: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PrivateUpdate:
    """One private update of a record: the units of its rows, and the name that determines its noise."""

    units: Units
    noise: str


PERIOD_MS = 86_400_000
"""Log time of a period, in which a user takes part in at most `privacy.updates` updates."""


class PrivateLearning:
    """The differential privacy mechanism of one trainer: participation, clipping and noise.

    Attributes:
        updates: The most updates of a period that one unit takes part in.
        noise: Standard deviation of the noise, divided by the clipping bound.
        deviation: Standard deviation of the noise on each derivative.
    """

    def __init__(self, settings: Settings, key: bytes) -> None:
        wanted = settings.privacy
        self._by_user = wanted.unit == "user"
        self.updates = wanted.updates if self._by_user else 1
        self.noise = noise_for(wanted.epsilon, wanted.delta, self.updates * wanted.periods)
        self.allowance = Participation(wanted.updates, PERIOD_MS)
        self.history, self._noise, self._clip = History(key), Noise(key), wanted.clip / HYPERPARAMETERS.loss_scale
        self.deviation = self.noise * self._clip
        # Each loss has a share of the bound, so that the loss with the longer gradients does not displace the other.
        self._losses = tuple(LOSSES) if labelled(settings) else ("interest",)

    def begin(self, users: U64, record: str, number: int) -> PrivateUpdate:
        """Starts update `number` of a record, and counts it for each user that takes part; `record` is from `History.take`."""
        noise = f"{record} update {number}"
        if not self._by_user:
            return PrivateUpdate(Units(np.arange(users.size), np.ones(users.size, np.bool_)), noise)
        return PrivateUpdate(Units(np.unique(users, return_inverse=True)[1], self.allowance.admit(users)), noise)

    def measure(self, engine: PrivateEngine, record: Record, update: PrivateUpdate) -> Measured:
        """The scores of a record, and the clipped gradient of an update with noise."""
        record = self.within(engine, record, update.units)
        measured = engine.measure(record, move=False)
        return engine.noised(measured, record, self._normal(update), self.deviation, self._by_user)

    def within(self, engine: PrivateEngine, record: Record, units: Units) -> Record:
        """Scales the losses of a record, each loss separately, so that no unit's gradient is longer than the bound."""
        lengths, bound = engine.lengths(record, self._losses), self._clip / len(self._losses)
        scaled = dict.fromkeys(FACTORS, np.zeros_like(record.targets.weight))
        for loss, length in zip(self._losses, lengths.T, strict=True):
            factors = clipped(length, units, bound)
            for name in LOSSES[loss]:
                scaled[name] = np.where(factors > 0, getattr(record.targets, name) * factors, np.float32(0.0))
        return replace(record, targets=record.targets._replace(**scaled))

    def count(self, popular: Popular, categories: U64, update: PrivateUpdate, log_ms: int) -> None:
        """Counts the categories of an update, one click a unit, with noise on the count of each known category."""
        is_counted = (categories != 0) & update.units.learned
        distinct = np.union1d(popular.state()["ids"], categories[categories != 0])
        rows = np.bincount(update.units.of[is_counted], minlength=len(categories))
        amounts = np.zeros(distinct.size)
        np.add.at(amounts, np.searchsorted(distinct, categories[is_counted]), 1.0 / rows[update.units.of[is_counted]])
        amounts += self._normal(update)("counts", distinct.size) * (self.noise * COUNT_NOISE)
        popular.add(distinct, np.rint(amounts * ONE).astype(np.int64), log_ms)

    def _normal(self, update: PrivateUpdate) -> Normal:
        return lambda name, count: self._noise.normal(f"{update.noise} {name}", count)


def clipped(lengths: F32, units: Units, clip: float) -> F32:
    """The factor of each row's losses that keeps each unit within `clip`, `[B]` float32; 0 in rows that take no part.

    The norm of a unit is at most the sum of the norms of its rows, whatever their directions. A row whose length is not
    finite takes no part.

    >>> units = Units(np.array([0, 0, 1, 2]), np.array([True, True, True, False]))
    >>> clipped(np.array([3.0, 1.0, 0.5, 9.0], np.float32), units, 2.0).round(3).tolist()
    [0.5, 0.5, 1.0, 0.0]
    """
    learned = units.learned & np.isfinite(lengths)
    norms = np.bincount(units.of, np.where(learned, lengths, 0.0).astype(np.float64))
    bound = clip * (1.0 - ROUNDING)
    factors = np.where(norms > bound, bound / np.maximum(norms, bound), 1.0)
    row_factors: F32 = (factors[units.of] * learned).astype(np.float32)
    return row_factors


class PrivateTrainer(Trainer):
    """A `Trainer` that learns with differential privacy. The metrics of a step stay exact; only the operator sees them.

    Raises:
        SettingsError: The key of the noise is missing.
    """

    def __init__(
        self, settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | Analysed | None = None
    ) -> None:
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
        state = self.private.allowance.state() | self.private.history.state()
        return super().state() | {f"privacy.{name}": value for name, value in state.items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Trainer`."""
        super().load(state)
        own = {name.removeprefix("privacy."): value for name, value in state.items() if name.startswith("privacy.")}
        self.private.allowance.load(own)
        self.private.history.load(own)

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
