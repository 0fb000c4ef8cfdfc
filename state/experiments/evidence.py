"""Evidence about the two arms of a rollout: exposures, and the engagements that followed them. Pure.

An engagement counts for the arm and step of its user's last exposure before it became known to the stream. The rate
is engagements per answer. Arms are compared within each step, because users behave differently at different hours
(`state/statistics/confidence_sequence.py`). The variance is that of sums per user.

Failures, latencies and the sample ratio are those of the newest step. A user who changes arms when the share grows
contributes to both. Their difference then varies less than the interval assumes.

Exposures are records of `kafka.exposures_topic`, one for each answer to a user during a rollout.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from state.disk import documents
from state.events.identity import Salt
from state.statistics import confidence_sequence
from state.statistics.confidence_sequence import ALPHA, BlockSums, Contrast, SampleRatio, Strata

Arm = Literal["trial", "live"]
TRIAL: Arm = "trial"
LIVE: Arm = "live"
ARMS = (TRIAL, LIVE)


def position_of(salt: Salt, name: str, user: int) -> float:
    """Returns a user's position between 0 and 1.

    It is the HMAC-SHA-256 of the rollout's name and the pseudonym, keyed by the salt. So without the salt, a client
    cannot choose an id that falls into a given arm. Positions in two rollouts are independent.

    >>> salt = Salt(b"not a secret")
    >>> position_of(salt, "wider", 7) == position_of(salt, "wider", 7) != position_of(salt, "deeper", 7)
    True
    """
    digest = hmac.digest(salt.key, b"rollout " + name.encode() + b" " + user.to_bytes(8, "big"), "sha256")
    return int.from_bytes(digest[:8], "big") / 2**64


def arm_of(position: float, share: float) -> Arm:
    """Returns the arm of a user when the trial has the given share. A user in the trial at 5 % is also in it at 50 %.

    >>> arm_of(0.04, 0.05), arm_of(0.04, 0.5), arm_of(0.4, 0.05), arm_of(0.99, 1.0)
    ('trial', 'trial', 'live', 'trial')
    """
    return TRIAL if position < share else LIVE


class Exposure(msgspec.Struct, frozen=True):
    """An answer to a user during a rollout.

    Attributes:
        user: The pseudonym, 16 hexadecimal digits.
        rollout: The experiment's name.
        step: Step of the rollout.
        share: Share of users in the arm `trial` at this step.
        arm: The user's arm, even if the trial failed and the live version answered: the failure counts for the trial.
        at_ms: When the request arrived, wall clock.
        took_us: Latency in microseconds; None in a batch, because the arms answer parts of different sizes.
        failed: Whether the arm could not answer.
    """

    user: str
    rollout: str
    step: int
    share: float
    arm: Arm
    at_ms: int
    took_us: int | None
    failed: bool = False


def encode_exposure(exposure: Exposure) -> bytes:
    """Encodes a record's value.

    >>> encode_exposure(Exposure("00000000000000ff", "wider", 0, 0.01, "live", 5, 900))[:38]
    b'{"user":"00000000000000ff","rollout":"'
    """
    return msgspec.json.encode(exposure)


def decode_exposure(value: bytes) -> Exposure | None:
    """Decodes the exposure of a record; None if it is not one, so that other writers cannot distort a verdict.

    >>> decode_exposure(b"{}") is None
    True
    """
    try:
        return documents.decode(value, Exposure)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


PLANNED_ANSWERS = 20_000
"""Number of answers of the smaller arm for which intervals are narrowest."""

MOST_USERS = 1_000_000
"""Maximum number of tracked users, up to 500 bytes each. Later users count only for failures and latencies."""

MISMATCH_ALPHA = 0.001
"""False alarm rate of the sample ratio test. It is low, because an alarm stops a rollout that may be good."""


BINS = 160
LEAST_US, RATIO = 100.0, 1.1
"""Upper edge of the first bin of a latency histogram, and the ratio between the edges of adjacent bins. The bins have
equal ratios, so that quantiles are accurate within 10 %. The last edge is about 6 min."""


def no_latencies() -> NDArray[np.int64]:
    """Returns an empty histogram, `[BINS]` int64."""
    return np.zeros(BINS, np.int64)


def latency_bin(took_us: float) -> int:
    """Returns the bin of a duration.

    >>> latency_bin(0), latency_bin(100), latency_bin(101), latency_bin(1e12) == BINS - 1
    (0, 0, 1, True)
    """
    if took_us <= LEAST_US:
        return 0
    return min(BINS - 1, math.ceil(round(math.log(took_us / LEAST_US) / math.log(RATIO), 9)))


def quantile_ms(counts: NDArray[np.int64], share: float) -> float:
    """Returns a quantile (0 to 1) of a `[BINS]` int64 histogram, ms: the upper edge of its bin; 0 if it is empty.

    >>> counts = no_latencies()
    >>> counts[latency_bin(1000)] += 99
    >>> counts[latency_bin(50_000)] += 1
    >>> 1.0 <= quantile_ms(counts, 0.5) <= 1.1, 50 <= quantile_ms(counts, 0.999) <= 55
    (True, True)
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    edge = int(np.searchsorted(np.cumsum(counts), share * total))
    return float(LEAST_US * RATIO ** min(edge, BINS - 1) / 1000)


@dataclass
class StepSums:
    """Sums of one arm in one step: exposures, exposures for which it could not answer, and users.

    Attributes:
        took: `[BINS]` int64, histogram of the latencies of answers outside of batches.
    """

    answers: int = 0
    failures: int = 0
    took: NDArray[np.int64] = field(default_factory=no_latencies)
    users: int = 0


class Evidence:
    """The sums of one rollout.

    Attributes:
        step: The newest step seen; -1 before the first.
        of_step: Sums of that step, by arm.
        rates: Engagements and answers by step and arm.
        users: Number of users ever exposed, by arm.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.step = -1
        self.of_step = {arm: StepSums() for arm in ARMS}
        self.rates: dict[int, dict[Arm, BlockSums]] = {}
        self.users = dict.fromkeys(ARMS, 0)
        # user -> (since ms, step, arm) for each step of the user. After a restart all exposures are read before the
        # engagements.
        self._since: dict[int, tuple[tuple[int, int, Arm], ...]] = {}
        self._in_step: set[int] = set()
        self._ratio: SampleRatio | None = None

    def expose(self, exposures: Iterable[Exposure]) -> None:
        """Adds exposures. Skips those of other rollouts; late ones of an earlier step count only in the rates."""
        users_of: dict[tuple[int, Arm], list[int]] = {}
        counts = dict.fromkeys(ARMS, 0)
        for exposure in exposures:
            if exposure.rollout != self._name:
                continue
            if exposure.step > self.step:
                self._count(counts)
                self._begin(exposure.step, exposure.share)
            if exposure.step == self.step:
                self._in_newest(exposure, counts)
            user = int(exposure.user, 16)
            if self._is_known(user, exposure):
                users_of.setdefault((exposure.step, exposure.arm), []).append(user)
        self._count(counts)
        for (step, arm), users in users_of.items():
            self._sums(step)[arm].add(np.zeros(len(users)), np.array(users, np.uint64))

    def engage(self, users: NDArray[np.uint64], known_ms: int) -> None:
        """Adds engagements.

        Args:
            users: `[n]` uint64, the user of each engagement.
            known_ms: When they became known to the stream, wall clock.
        """
        engagements_of: dict[tuple[int, Arm], list[int]] = {}
        for user in users.tolist():
            shown = [(step, arm) for since_ms, step, arm in self._since.get(user, ()) if since_ms <= known_ms]
            if shown:
                engagements_of.setdefault(shown[-1], []).append(user)
        for (step, arm), engaged in engagements_of.items():
            self._sums(step)[arm].credit(np.ones(len(engaged)), np.array(engaged, np.uint64))

    def difference(self) -> Contrast:
        """Engagements per answer of the trial, minus those of the live arm."""
        return confidence_sequence.difference(self._strata(), ALPHA, PLANNED_ANSWERS)

    def lift(self) -> Contrast | None:
        """The relative difference of the trial's rate to the live arm's; None if an arm has no engagements."""
        return confidence_sequence.lift(self._strata(), ALPHA, PLANNED_ANSWERS)

    @property
    def mismatch(self) -> bool:
        """Whether the split of users between the arms contradicts the shares."""
        return self._ratio is not None and self._ratio.mismatch(MISMATCH_ALPHA)

    @property
    def mismatch_p(self) -> float:
        """P-value of the sample ratio test, valid at any time."""
        return 1.0 if self._ratio is None else self._ratio.p_value

    def answers(self, arm: Arm) -> int:
        """Exposures of an arm over the whole rollout."""
        return sum(of_step[arm].rows for of_step in self.rates.values())

    def engagements(self, arm: Arm) -> int:
        """Engagements that followed an arm's exposures."""
        return round(sum(float(of_step[arm].totals.sum()) for of_step in self.rates.values()))

    def _strata(self) -> Strata:
        return [(of_step[TRIAL], of_step[LIVE]) for of_step in self.rates.values()]

    def _sums(self, step: int) -> dict[Arm, BlockSums]:
        return self.rates.setdefault(step, {arm: BlockSums() for arm in ARMS})

    def _begin(self, step: int, share: float) -> None:
        self.step, self._in_step = step, set()
        self.of_step = {arm: StepSums() for arm in ARMS}
        # With all users in one arm, there is no ratio to test.
        if 0 < share < 1:
            shares = [share, 1 - share]
            if self._ratio is None:
                self._ratio = SampleRatio(shares)
            else:
                self._ratio.change(shares)

    def _in_newest(self, exposure: Exposure, counts: dict[Arm, int]) -> None:
        sums = self.of_step[exposure.arm]
        sums.answers += 1
        sums.failures += exposure.failed
        if exposure.took_us is not None:
            sums.took[latency_bin(exposure.took_us)] += 1
        user = int(exposure.user, 16)
        if user not in self._in_step and len(self._in_step) < MOST_USERS:
            self._in_step.add(user)
            sums.users += 1
            counts[exposure.arm] += exposure.share < 1

    def _count(self, counts: dict[Arm, int]) -> None:
        if self._ratio is not None and any(counts.values()):
            self._ratio.add([counts[arm] for arm in ARMS])
        counts.update(dict.fromkeys(ARMS, 0))

    def _is_known(self, user: int, exposure: Exposure) -> bool:
        """Whether the user is tracked; records step, arm and time of a new step."""
        before = self._since.get(user, ())
        if not before and len(self._since) >= MOST_USERS:
            return False
        if not before or (before[-1][1] < exposure.step and before[-1][0] < exposure.at_ms):
            self._since[user] = (*before, (exposure.at_ms, exposure.step, exposure.arm))
            self.users[exposure.arm] += all(arm != exposure.arm for _, _, arm in before)
        return True
