"""How a record is learned where `privacy.epsilon` is set: by rows that see no other one, clipped by unit, with noise.

1. A row loses what other rows brought into it: its drawn negative, and the
   category of another row in its last slot.
2. Users who had their updates of the period take no part.
3. Each unit's rows together are scaled to `privacy.clip`, each loss to a share of it.
4. Noise is added, which the key and the history of the record decide. Only then
   is the sum seen by the guard, an optimizer or a version.

`trainer/PRIVACY.md` says what follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.config.settings import Settings
from trainer.engine.build import labelled
from trainer.engine.engine import Measured
from trainer.engine.private_crosses import Normal
from trainer.engine.record import Record
from trainer.engine.tensorflow.private import LOSSES, PrivateEngine
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.privacy.accounting import COUNT_NOISE, noise_for
from trainer.privacy.allowance import Participation
from trainer.privacy.history import History
from trainer.privacy.noise import Noise
from trainer.tables.index import U64
from trainer.tables.popular import ONE, Popular

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

NOISE_FLOOR = 0.3
"""What is added to the root of Adam's mean squared derivative, over the noise of a derivative. Adam alone makes a derivative that
is noise as large a step as one that is not: the more a part of the noise it is, the smaller its step is so (Reddi et al.
2021, where this number says how adaptive a step is)."""

FACTORS = tuple(name for names in LOSSES.values() for name in names)
"""Of `Targets`: the factors of a row's losses."""

ROUNDING = 1e-4
"""How much shorter than the bound a unit is made: more than what sums in float32 lose."""


class Units(NamedTuple):
    """The units of an update.

    Attributes:
        of: `[B]` int64, the number of each row's unit.
        learned: `[B]` bool, whether it takes part.
    """

    of: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Update:
    """An update of a record.

    Attributes:
        units: Of its rows.
        noise: The name of its noise.
    """

    units: Units
    noise: str


class PrivateLearning:
    """The mechanism of one trainer.

    Args:
        settings: All settings, with `privacy.epsilon` above 0.
        key: Of the noise.

    Attributes:
        updates: Of a period that one unit is in, at most.
        noise: Its standard deviation over the clipping bound.
        deviation: The noise on each derivative.
        allowance: Who has been in how many updates; part of each version.
        history: Names the noise of each record; part of each version.
    """

    def __init__(self, settings: Settings, key: bytes) -> None:
        wanted = settings.privacy
        self._by_user = wanted.unit == "user"
        self.updates = wanted.updates if self._by_user else 1
        self.noise = noise_for(wanted.epsilon, wanted.delta, self.updates * wanted.periods)
        self.allowance = Participation(wanted.updates, int(1000 * wanted.period_s))
        self.history, self._noise, self._clip = History(key), Noise(key), wanted.clip / HYPERPARAMETERS.loss_scale
        self.deviation = self.noise * self._clip
        # Each loss has a share of the bound, so that the one with the longer gradients leaves room for the other.
        self._losses = tuple(LOSSES) if labelled(settings) else ("interest",)

    def begin(self, users: U64, record: str, number: int) -> Update:
        """An update of a record; counts for each user that takes part.

        Args:
            users: `[B]` uint64.
            record: The name of the record's noise, of `History.take`.
            number: Of the update in it.
        """
        noise = f"{record} update {number}"
        if not self._by_user:
            return Update(Units(np.arange(users.size), np.ones(users.size, np.bool_)), noise)
        return Update(Units(np.unique(users, return_inverse=True)[1], self.allowance.admit(users)), noise)

    def measure(self, engine: PrivateEngine, record: Record, update: Update) -> Measured:
        """The scores of a record, and what an update may tell of its gradient.

        Args:
            engine: That of the trainer.
            record: Of `alone`.
            update: Of `begin`.
        """
        record = self.within(engine, engine.crossed(record), update.units)
        measured = engine.measure(record, move=False)
        return engine.told(measured, record, self._normal(update), self.deviation, self._by_user)

    def within(self, engine: PrivateEngine, record: Record, units: Units) -> Record:
        """The record whose losses are scaled, each loss of a unit by itself, so that no unit is longer than the bound.

        Args:
            engine: That of the trainer.
            record: Of `alone`.
            units: Of its rows.
        """
        lengths, bound = engine.lengths(record, self._losses), self._clip / len(self._losses)
        scaled = dict.fromkeys(FACTORS, np.zeros_like(record.targets.weight))
        for loss, length in zip(self._losses, lengths.T, strict=True):
            factors = clipped(length, units, bound)
            for name in LOSSES[loss]:
                scaled[name] = np.where(factors > 0, getattr(record.targets, name) * factors, np.float32(0.0))
        return replace(record, targets=record.targets._replace(**scaled))

    def count(self, popular: Popular, categories: U64, update: Update, log_ms: int) -> None:
        """Counts the categories of an update, `[B]` uint64, one click a unit, with noise on each that is known.

        Args:
            popular: Is changed.
            categories: 0 for none.
            update: Of `begin`.
            log_ms: Log time.
        """
        counted = (categories != 0) & update.units.learned
        known = np.union1d(popular.state()["ids"], categories[categories != 0])
        rows = np.bincount(update.units.of[counted], minlength=len(categories))
        amounts = np.zeros(known.size)
        np.add.at(amounts, np.searchsorted(known, categories[counted]), 1.0 / rows[update.units.of[counted]])
        amounts += self._normal(update)("counts", known.size) * (self.noise * COUNT_NOISE)
        popular.add(known, np.rint(amounts * ONE).astype(np.int64), log_ms)

    def _normal(self, update: Update) -> Normal:
        return lambda name, count: self._noise.normal(f"{update.noise} {name}", count)


def clipped(lengths: F32, units: Units, clip: float) -> F32:
    """The factor of each row's losses with which no unit is longer than `clip`, `[B]` float32; 0 in rows that take no part.

    Lengths of a unit's rows add up at most, whatever their directions.

    >>> units = Units(np.array([0, 0, 1, 2]), np.array([True, True, True, False]))
    >>> clipped(np.array([3.0, 1.0, 0.5, 9.0], np.float32), units, 2.0).round(3).tolist()
    [0.5, 0.5, 1.0, 0.0]

    Args:
        lengths: `[B]` float32, of each row's gradient; a row of none that is finite takes no part.
        units: Of the rows.
        clip: The bound.
    """
    learned = units.learned & np.isfinite(lengths)
    whole = np.bincount(units.of, np.where(learned, lengths, 0.0).astype(np.float64))
    bound = clip * (1.0 - ROUNDING)
    factors = np.where(whole > bound, bound / np.maximum(whole, bound), 1.0)
    found: F32 = (factors[units.of] * learned).astype(np.float32)
    return found
