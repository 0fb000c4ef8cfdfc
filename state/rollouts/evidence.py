"""What is known of the two arms of a rollout: its exposures, and what users did after theirs. Pure.

An engagement counts for the arm and the step that its user was last exposed in
when it became known, by the clocks of this system's own processes. The rate is
engagements an answer. Arms are compared within each step, for users do other
things at other hours (`state/statistics/strata.py`), with the variance of users'
sums.

Failures, latencies and the sample ratio are those of the newest step. A user who
comes from one arm into the other, with a larger share, has a part in both, which
makes their difference vary less than it is taken to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from state.rollouts import latencies
from state.rollouts.assignment import ARMS, LIVE, TRIAL, Arm
from state.rollouts.exposure import Exposure
from state.statistics import arms
from state.statistics.arms import Contrast
from state.statistics.confidence_sequence import ALPHA, BlockSums
from state.statistics.sample_ratio import SampleRatio
from state.statistics.strata import StratifiedArm, stratified

MOST_USERS = 1_000_000
"""Users that are told apart; of those who come later nothing counts but failures and latencies. Up to 500 bytes each."""

MISMATCH_ALPHA = 0.001
"""The rate of false alarms of the sample ratio: it ends a rollout that may have been good."""


@dataclass
class StepSums:
    """What one arm did in one step.

    Attributes:
        answers: Exposures.
        failures: Of them those that the arm could not answer.
        took: `[BINS]` int64, how long those outside of batches took.
        users: Who they were of.
    """

    answers: int = 0
    failures: int = 0
    took: NDArray[np.int64] = field(default_factory=latencies.empty)
    users: int = 0


class Evidence:
    """The sums of one rollout.

    Args:
        name: Of the trial.
        planned_answers: After how many answers of the smaller arm intervals shall be narrowest for what they are.

    Attributes:
        step: The newest step that was heard of; -1 before the first.
        of_step: By arm what was done in it.
        rates: By step and arm engagements over answers.
        users: By arm how many were ever exposed in it.
    """

    def __init__(self, name: str, planned_answers: int) -> None:
        self._name, self._planned = name, planned_answers
        self.step = -1
        self.of_step = {arm: StepSums() for arm in ARMS}
        self.rates: dict[int, dict[Arm, BlockSums]] = {}
        self.users = dict.fromkeys(ARMS, 0)
        # Of each user since when in which step and arm: after a restart all exposures are read before the engagements.
        self._since: dict[int, tuple[tuple[int, int, Arm], ...]] = {}
        self._in_step: set[int] = set()
        self._ratio: SampleRatio | None = None

    def expose(self, exposures: Iterable[Exposure]) -> None:
        """Takes exposures; those of other rollouts are passed over, and late ones of an earlier step count in the rates alone."""
        found: dict[tuple[int, Arm], list[int]] = {}
        came = dict.fromkeys(ARMS, 0)
        for one in exposures:
            if one.rollout != self._name:
                continue
            if one.step > self.step:
                self._count(came)
                self._begin(one.step, one.share)
            if one.step == self.step:
                self._in_newest(one, came)
            user = int(one.user, 16)
            if self._is_known(user, one):
                found.setdefault((one.step, one.arm), []).append(user)
        self._count(came)
        for (step, arm), users in found.items():
            self._sums(step)[arm].add(np.zeros(len(users)), np.array(users, np.uint64))

    def engage(self, users: NDArray[np.uint64], known_ms: int) -> None:
        """Takes engagements.

        Args:
            users: `[n]` uint64, whose they are.
            known_ms: When they became known to the stream, wall clock.
        """
        found: dict[tuple[int, Arm], list[int]] = {}
        for user in users.tolist():
            shown = [(step, arm) for since_ms, step, arm in self._since.get(user, ()) if since_ms <= known_ms]
            if shown:
                found.setdefault(shown[-1], []).append(user)
        for (step, arm), engaged in found.items():
            self._sums(step)[arm].credit(np.ones(len(engaged)), np.array(engaged, np.uint64))

    def difference(self) -> Contrast:
        """Engagements an answer of the trial, less those of the live one."""
        return arms.difference(*self._both(), ALPHA, self._planned)

    def lift(self) -> Contrast | None:
        """By which part those of the trial are more; None where one arm has none."""
        return arms.lift(*self._both(), ALPHA, self._planned)

    @property
    def mismatch(self) -> bool:
        """Whether users came to the arms otherwise than the shares say."""
        return self._ratio is not None and self._ratio.mismatch(MISMATCH_ALPHA)

    @property
    def mismatch_p(self) -> float:
        """How probable it is that chance alone makes so much of a difference; valid at all looks."""
        return 1.0 if self._ratio is None else self._ratio.p_value

    def answers(self, arm: Arm) -> int:
        """Exposures of an arm, of the whole rollout."""
        return sum(of_step[arm].rows for of_step in self.rates.values())

    def engagements(self, arm: Arm) -> int:
        """Those that followed them."""
        return round(sum(float(of_step[arm].totals.sum()) for of_step in self.rates.values()))

    def _both(self) -> tuple[StratifiedArm, StratifiedArm]:
        return stratified([(of_step[TRIAL], of_step[LIVE]) for of_step in self.rates.values()])

    def _sums(self, step: int) -> dict[Arm, BlockSums]:
        return self.rates.setdefault(step, {arm: BlockSums() for arm in ARMS})

    def _begin(self, step: int, share: float) -> None:
        self.step, self._in_step = step, set()
        self.of_step = {arm: StepSums() for arm in ARMS}
        # Of everybody there is no ratio.
        if 0 < share < 1:
            shares = [share, 1 - share]
            if self._ratio is None:
                self._ratio = SampleRatio(shares)
            else:
                self._ratio.change(shares)

    def _in_newest(self, one: Exposure, came: dict[Arm, int]) -> None:
        sums = self.of_step[one.arm]
        sums.answers += 1
        sums.failures += one.failed
        if one.took_us is not None:
            sums.took[latencies.bin_of(one.took_us)] += 1
        user = int(one.user, 16)
        if user not in self._in_step and len(self._in_step) < MOST_USERS:
            self._in_step.add(user)
            sums.users += 1
            came[one.arm] += one.share < 1

    def _count(self, came: dict[Arm, int]) -> None:
        if self._ratio is not None and any(came.values()):
            self._ratio.add([came[arm] for arm in ARMS])
        came.update(dict.fromkeys(ARMS, 0))

    def _is_known(self, user: int, one: Exposure) -> bool:
        """Whether the user is told apart; notes step and arm, and since when."""
        before = self._since.get(user, ())
        if not before and len(self._since) >= MOST_USERS:
            return False
        if not before or (before[-1][1] < one.step and before[-1][0] < one.at_ms):
            self._since[user] = (*before, (one.at_ms, one.step, one.arm))
            self.users[one.arm] += all(arm != one.arm for _, _, arm in before)
        return True
