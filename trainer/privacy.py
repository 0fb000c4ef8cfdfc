"""Differential privacy: the accountant, the keyed history that determines the noise, and the limits of what is learned.

**Accountant.** It computes epsilon of all updates that one unit may take part in, and the noise that a budget requires.
Each update releases two values that depend on a unit, each with Gaussian noise: its clipped gradient, and its part of the
counts. Gaussian noise composes exactly: k updates with noise s reveal as much as one with noise s / sqrt(k), even if
each is chosen adaptively (Dong, Roth and Su 2022, corollary 3.3). The cost of one release has a closed form (Balle
and Wang 2018), which `dp-accounting` computes. There is no amplification by sampling, because rows come in the order of
the log.

**History.** Keyed digests determine a record's noise and the ledger's charges:

    history   one digest over every record learned so far and the conditions of each
    line      the history at the record where the conditions last changed, with the new conditions

The noise of a record is a function of the key and of the history that includes the record. The same noise is therefore
added twice only to the same sum. The ledger charges each period once per line. A restart that reads the same records
under the same conditions repeats history and line; anything else makes new ones.

**Participation.** Each user takes part in a limited number of updates of a period, and each row has a limited number of
crosses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import mixed
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.process import private_files
from state.registry import log_line
from state.registry.log_line import LogLine
from state.registry.privacy_ledger import PrivacyPeriod

COUNT_NOISE = 4.0
"""The noise of counts relative to that of gradients. Counts are large, so they cost a sixteenth of the gradients."""

_OF_ONE = 1.0 + COUNT_NOISE**-2
"""The cost of an update in units of 1 / noise squared, if its gradient alone costs 1."""


def epsilon_of(noise: float, delta: float) -> float:
    """Epsilon of one number of sensitivity 1 that is released with Gaussian noise, at `delta`.

    >>> round(epsilon_of(3.73, 1e-5), 3), epsilon_of(math.inf, 1e-5)
    (1.0, 0.0)
    """
    # It loads SciPy's statistics, which takes a second and which a trainer without a budget does not need.
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(noise, delta))


def together(periods: Iterable[PrivacyPeriod]) -> float:
    """The noise with which one number reveals as much as all updates of these periods reveal of one unit.

    >>> together([]), round(together([PrivacyPeriod(1, 0, 17, 8.0), PrivacyPeriod(1, 1, 17, 8.0)]), 3)
    (inf, 1.331)
    """
    squared = sum(period.updates * _OF_ONE / period.noise**2 for period in periods)
    return 1.0 / math.sqrt(squared) if squared else math.inf


def spent(periods: Iterable[PrivacyPeriod], delta: float) -> float:
    """Epsilon of all updates of these periods."""
    return epsilon_of(together(periods), delta)


def noise_for(epsilon: float, delta: float, updates: int) -> float:
    """The standard deviation, over the clipping bound, with which `updates` updates of one unit cost `epsilon`.

    >>> round(noise_for(1.0, 1e-5, 1), 2), round(noise_for(1.0, 1e-5, 16), 2)
    (3.85, 15.38)
    """
    import dp_accounting

    return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * math.sqrt(updates * _OF_ONE)


NAMES = ("history", "conditions", "line")
_BYTES = 32
logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the code adds noise to another sum than before, for the same records and settings."""


@dataclass(frozen=True, slots=True)
class NoisePlace:
    """The position of a record, and everything but the records that determines its noised sum.

    Attributes:
        line: The branch of the log: the records that count in this epoch.
        mask: The rows of the record that are excluded, those of erased users among them.
        environment: `environment_digest` of the trainer: settings, code and machine.
    """

    topic_id: str
    partition: int
    offset: int
    epoch: int
    line: LogLine
    mask: Mask
    environment: str

    @property
    def conditions(self) -> bytes:
        """All fields but the offset, as bytes: equal for records that are learned under the same conditions."""
        fields = [FORMAT, self.topic_id, self.partition, self.epoch, log_line.to_json(self.line), self.mask.digest]
        return json.dumps([*fields, self.environment]).encode()


def environment_digest(environment: Mapping[str, str]) -> str:
    """SHA-256 of what the bits of a step depend on besides the log, as a manifest's `environment` lists it."""
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()


class History:
    """The digests of one trainer; part of each version. They are keyed: without the key they reveal nothing about rows."""

    def __init__(self, key: bytes) -> None:
        # BLAKE2b accepts keys of at most 64 bytes.
        self._key = hashlib.blake2b(key, digest_size=64, person=b"springtide past").digest()
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._history = self._conditions = self.line = bytes(_BYTES)

    def line_at(self, record: NoisePlace) -> bytes:
        """The line of the record that is learned next; has no side effects."""
        conditions = self._digest(record.conditions)
        return self.line if conditions == self._conditions else self._digest(self._history, conditions)

    def take(self, record: NoisePlace, batch: MicroBatch) -> str:
        """Appends a record with the rows `batch`; returns the name of its noise."""
        self.line, self._conditions = self.line_at(record), self._digest(record.conditions)
        content = hashlib.blake2b(repr((batch.header.spec, batch.header.ranges)).encode())
        for name, column in batch.columns.items():
            content.update(f"{name} {column.dtype.str} {column.shape} ".encode())
            content.update(np.ascontiguousarray(column).data)
        self._history = self._digest(self._history, self.line, str(record.offset).encode(), content.digest())
        return self._history.hex()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The whole state, by name: `[32]` uint8 each."""
        values = (self._history, self._conditions, self.line)
        return {name: np.frombuffer(value, np.uint8) for name, value in zip(NAMES, values, strict=True)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; a version of a release without it starts a new history."""
        self.clear()
        if all(name in state for name in NAMES):
            self._history, self._conditions, self.line = (np.asarray(state[name], np.uint8).tobytes() for name in NAMES)

    def _digest(self, *parts: bytes) -> bytes:
        digest = hashlib.blake2b(key=self._key, digest_size=_BYTES)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()


def own_key(settings: Settings) -> bytes:
    """The key of a state directory. Only its fingerprint may be shown.

    Raises:
        SettingsError: It is missing, cannot be read, or is too short.
    """
    path = settings.privacy_key_path
    if not path.exists():
        if settings.privacy_ledger_path.exists():
            raise SettingsError(
                f"there is no key of the noise at {path}, and versions were learned with one",
                "restore the file",
            )
        if private_files.make_key(path):
            logger.warning(
                "made a new key of the noise at %s: keep a copy, for without it no version can be verified", path
            )
    return private_files.read_key(path, "the key of the noise")


U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

PLACES = 1 << 20
"""Number of buckets: 2 MB of a durable version before compression. With a million users in a period, a user shares the
bucket with one other on average."""


class Participation:
    """Counts the updates of the period that users took part in; part of each version.

    No id is stored. A user is counted in a bucket that is a hash of the id. Users with the same bucket share its
    allowance, so no user ever gets more.
    """

    def __init__(self, updates: int, period_ms: int) -> None:
        self._updates, self.period_ms = updates, period_ms
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._period, self.left_out = -1, 0
        self._used: npt.NDArray[np.uint16] = np.zeros(PLACES, np.uint16)

    @property
    def began(self) -> bool:
        """Whether anything was learned under a budget."""
        return self._period >= 0

    def begin(self, log_ms: int) -> None:
        """Sets the log time to `log_ms`. A new period resets all counts."""
        if (period := log_ms // self.period_ms) > self._period:
            self._period = period
            self._used[:] = 0

    def admit(self, users: U64) -> Flags:
        """Which rows of an update take part, `[n]` bool: all rows of a user, or none.

        >>> allowance = Participation(1, 1000)
        >>> allowance.begin(500)
        >>> users = np.array([7, 8, 7], np.uint64)
        >>> allowance.admit(users).tolist(), allowance.admit(users[:2]).tolist(), allowance.left_out
        ([True, True, True], [False, False], 2)
        >>> allowance.begin(1000)
        >>> allowance.admit(users[:1]).tolist()
        [True]
        """
        counters = (mixed(users) & np.uint64(PLACES - 1)).astype(np.int64)
        admitted: Flags = self._used[counters] < self._updates
        self._used[np.unique(counters[admitted])] += 1
        self.left_out += int(users.size - admitted.sum())
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of the whole state, by name."""
        return {"period": np.array(self._period), "left_out": np.array(self.left_out), "used": self._used.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; an empty state resets the counts."""
        self.clear()
        if "used" in state:
            self._period, self.left_out = int(state["period"]), int(state["left_out"])
            self._used = np.array(state["used"], np.uint16)


RELEASED = ("context", "user attribute")
"""Kinds of crosses that are released with noise: their values are few and public, and many rows have each."""


class LearnedCrosses(NamedTuple):
    """The crosses of a row that are learned, by their index among all.

    Attributes:
        released: `[T]` int64, those that are released with noise.
        own: `[O]` int64, those that contain the user; only that user's requests read them.
    """

    released: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]

    @property
    def both(self) -> npt.NDArray[np.int64]:
        """`[T + O]` int64, in this order."""
        return np.concatenate(self)

    @classmethod
    def of(cls, kinds: Sequence[str], unit: str) -> LearnedCrosses:
        """Selects from crosses of these kinds, for a setting `privacy.unit`.

        With unit `example`, crosses of users are not learned, because a single row would affect the gradients of all
        later rows of its user.

        >>> LearnedCrosses.of(("every", "user", "context", "user*item", "user attribute"), "user").both.tolist()
        [2, 4, 1, 3]
        >>> LearnedCrosses.of(("user", "context", "user*item"), "example").both.tolist()
        [1]
        """
        own = [unit == "user" and (kind == "user" or kind.startswith("user*")) for kind in kinds]
        return cls(np.flatnonzero([kind in RELEASED for kind in kinds]), np.flatnonzero(own))
