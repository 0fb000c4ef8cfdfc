"""The gate: a better trial is taken to everybody, a worse one is stopped at 1 %, equal ones are called equal; what fails, is slow or loses users does not go on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from state.config.sections import RolloutSettings
from state.events.identity import Salt, user_id
from state.experiments.evidence import ARMS, LIVE, TRIAL, Evidence, Exposure, arm_of, position_of
from state.experiments.experiment import GATE, STEPS, By, Change, Experiment
from state.experiments.gate import RolloutReport, as_lines, decide, report
from state.statistics.confidence_sequence import BLOCKS

SALT = Salt(b"0123456789abcdef")
SETTINGS = RolloutSettings()
USERS = 40_000
PSEUDONYMS = [user_id(SALT, f"user-{n}") for n in range(USERS)]
POSITIONS = [position_of(SALT, "wider", user) for user in PSEUDONYMS]
ROUND_MS = 1_000


def running(steps: tuple[float, ...], every_s: float) -> Experiment:
    """An experiment at the first step of its rollout."""
    by = By("ann", "try it", 0)
    shadow = Experiment("wider", "shadow", "live", 1, 1, {}, (Change(0, "shadow", None, 0.0, "ann", "see"),))
    return shadow.start_rollout(steps, every_s, 0, 0, by).begin(by)


class Traffic:
    """Users who come again and again, and engage at the rate of their arm; the gate looks after each hundred of them."""

    def __init__(self, rates: dict[str, float], seed: int = 1) -> None:
        self.random, self.rates, self.now_ms = np.random.default_rng(seed), rates, 0
        self.evidence = Evidence("wider")
        self.experiment = running(STEPS, 30.0)
        self.history = [self.experiment]

    def run(self, rounds: int = 400, failing: float = 0.0, slower_us: int = 0, losing: float = 0.0) -> None:
        """Until it is over, so many times a thousand answers at most."""
        for _ in range(rounds):
            self.now_ms += ROUND_MS
            for who in self.random.integers(0, USERS, (5, 200)).tolist():
                self._answer(who, failing, slower_us, losing)
                decision = decide(self.experiment, self.evidence, SETTINGS, self.now_ms)
                if decision is not None:
                    now = self.experiment
                    take = {"next": now.next_step, "halt": now.halt, "back": now.back}[decision.action]
                    self.experiment = take(By(GATE, decision.reason, self.now_ms))
                    self.history.append(self.experiment)
            if self.experiment.phase != "running":
                return

    def _answer(self, who: list[int], failing: float, slower_us: int, losing: float) -> None:
        exposures, engaged = [], []
        chances = self.random.random((len(who), 4)).tolist()
        for number, (one, other, third, fourth) in zip(who, chances, strict=True):
            arm = arm_of(POSITIONS[number], self.experiment.share)
            took_us = 2_000 + (slower_us if arm == TRIAL and third < 0.05 else 0)
            if one < self.rates[arm]:
                engaged.append(PSEUDONYMS[number])
            if arm == TRIAL and fourth < losing:
                continue
            exposures.append(
                Exposure(
                    f"{PSEUDONYMS[number]:016x}",
                    "wider",
                    self.step,
                    self.experiment.share,
                    arm,
                    self.now_ms,
                    took_us,
                    arm == TRIAL and other < failing,
                )
            )
        self.evidence.expose(exposures)
        self.evidence.engage(np.array(engaged, np.uint64), self.now_ms)

    @property
    def step(self) -> int:
        assert self.experiment.rollout is not None
        return self.experiment.rollout.step

    def report(self) -> RolloutReport:
        return report(self.experiment, self.evidence, self.now_ms)


def test_arms_are_nested_as_large_as_their_shares_and_independent_of_other_splits() -> None:
    positions, shares = np.array(POSITIONS), (0.0, 0.01, 0.05, 0.5, 1.0)
    for share in shares[1:4]:
        assert abs(np.less(positions, share).mean() - share) < 4 * np.sqrt(share * (1 - share) / USERS)
    arms = [[arm_of(position, share) for position in POSITIONS] for share in shares]
    for fewer, more in itertools.pairwise(arms):
        assert all(then == TRIAL for now, then in zip(fewer, more, strict=True) if now == TRIAL)
    assert {*arms[0]} == {LIVE} and {*arms[-1]} == {TRIAL}
    for other in (
        [position_of(SALT, "deeper", user) for user in PSEUDONYMS],
        [position_of(Salt(b"another salt, 16"), "wider", user) for user in PSEUDONYMS],
        [user % BLOCKS for user in PSEUDONYMS],
        [user % 64 for user in PSEUDONYMS],
    ):
        assert abs(np.corrcoef(positions, other)[0, 1]) < 4 / np.sqrt(USERS)


def test_a_better_trial_comes_to_everybody() -> None:
    traffic = Traffic({TRIAL: 0.36, LIVE: 0.30})
    traffic.run()
    assert [one.share for one in traffic.history] == [0.01, 0.05, 0.5, 1.0, 1.0] and traffic.experiment.phase == "done"
    found = traffic.report()
    assert found.finding == "better" and found.lift is not None and (found.lift.low or 0) < 0.2 < (found.lift.high or 0)
    assert found.arms[TRIAL].rate == pytest.approx(0.36, abs=0.01)
    assert found.arms[LIVE].rate == pytest.approx(0.30, abs=0.01)
    assert "better: +" in as_lines(found, traffic.experiment)[-1]


def test_a_worse_trial_is_stopped_at_one_percent() -> None:
    traffic = Traffic({TRIAL: 0.10, LIVE: 0.30})
    traffic.experiment = traffic.history[0] = running(STEPS, 1800.0)
    traffic.run()
    assert [(one.share, one.phase) for one in traffic.history] == [(0.01, "running"), (0.0, "back")]
    assert "it is worse" in traffic.experiment.newest.reason and traffic.report().finding == "worse"


def test_equal_arms_are_called_equal() -> None:
    traffic = Traffic({TRIAL: 0.30, LIVE: 0.30})
    traffic.run()
    assert traffic.experiment.phase == "done"
    assert traffic.report().finding == "equal" and "equal within 5%" in traffic.report().verdict


@pytest.mark.parametrize(
    ("failing", "slower_us", "reason", "answers"),
    [(0.5, 0, "it fails in", 200), (0.0, 40_000, "slowest hundredth", 100_000)],
)
def test_a_trial_that_fails_or_is_slower_goes_back(failing: float, slower_us: int, reason: str, answers: int) -> None:
    traffic = Traffic({TRIAL: 0.30, LIVE: 0.30})
    traffic.run(failing=failing, slower_us=slower_us)
    assert traffic.experiment.phase == "back" and reason in traffic.experiment.newest.reason
    assert traffic.evidence.of_step[TRIAL].answers < answers


def test_no_latency_is_compared_by_batches() -> None:
    traffic = Traffic({TRIAL: 0.30, LIVE: 0.30})
    traffic.experiment = running((50.0,), 1800.0)
    traffic.evidence.expose(
        Exposure(f"{user:016x}", "wider", 0, 0.5, TRIAL if place % 2 else LIVE, 5, None)
        for place, user in enumerate(PSEUDONYMS[:2000])
    )
    assert {arm: int(sums.took.sum()) for arm, sums in traffic.evidence.of_step.items()} == {TRIAL: 0, LIVE: 0}
    assert {arm: sums.answers for arm, sums in traffic.evidence.of_step.items()} == {TRIAL: 1000, LIVE: 1000}
    assert decide(traffic.experiment, traffic.evidence, SETTINGS, 10) is None


def test_lost_exposures_halt_it_and_spoil_the_verdict() -> None:
    traffic = Traffic({TRIAL: 0.30, LIVE: 0.30})
    traffic.experiment = running((50.0,), 1800.0)
    traffic.run(losing=1 / 3)
    assert traffic.experiment.phase == "halted" and "sample ratio mismatch" in traffic.experiment.newest.reason
    assert traffic.report().finding == "mismatch"
    assert decide(traffic.experiment, traffic.evidence, SETTINGS, traffic.now_ms) is None, "it is halted once"


def test_a_step_goes_on_only_once_the_trial_has_answered() -> None:
    traffic = Traffic({TRIAL: 0.3, LIVE: 0.3})
    assert decide(traffic.experiment, traffic.evidence, SETTINGS, 10**9) is None
    live = Exposure("00000000000000ff", "wider", 0, 0.01, "live", 5, 900)
    traffic.evidence.expose([live])
    assert decide(traffic.experiment, traffic.evidence, SETTINGS, 10**9) is None
    trial = Exposure("00000000000000fe", "wider", 0, 0.01, "trial", 5, 900)
    traffic.evidence.expose([trial])
    decision = decide(traffic.experiment, traffic.evidence, SETTINGS, 10**9)
    assert decision is not None and decision.action == "next"
    assert decide(traffic.experiment, traffic.evidence, SETTINGS, 29_999) is None, "the step lasts half a minute"


def counted(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """By arm answers and engagements."""
    return {arm: (evidence.answers(arm), evidence.engagements(arm)) for arm in ARMS}


def test_an_engagement_is_of_the_arm_and_the_step_that_its_user_was_shown_when_it_became_known() -> None:
    evidence, user = Evidence("wider"), np.array([7, 8], np.uint64)
    evidence.expose([Exposure(f"{7:016x}", "wider", 0, 0.05, "live", 1_000, 900)])
    evidence.engage(user, 999)
    assert counted(evidence) == {TRIAL: (0, 0), LIVE: (1, 0)}
    evidence.engage(user, 1_000)
    assert counted(evidence) == {TRIAL: (0, 0), LIVE: (1, 1)}
    # With a larger share the user comes into the other arm, and what follows counts there.
    evidence.expose([Exposure(f"{7:016x}", "wider", 1, 0.5, "trial", 2_000, 900)])
    evidence.engage(user, 2_500)
    # Also where it is read late, as after a restart, when all exposures are known first.
    evidence.engage(user, 1_500)
    assert counted(evidence) == {TRIAL: (1, 1), LIVE: (1, 2)}
    assert evidence.users == {TRIAL: 1, LIVE: 1}
    evidence.expose([Exposure(f"{7:016x}", "wider", 2, 1.0, "trial", 3_000, 900)])
    evidence.engage(user, 3_500)
    assert [of_step[TRIAL].rows for of_step in evidence.rates.values()] == [0, 1, 1]
    assert [float(of_step[TRIAL].totals.sum()) for of_step in evidence.rates.values()] == [0, 1, 1]
    assert evidence.users == {TRIAL: 1, LIVE: 1}


def test_exposures_of_another_rollout_count_nothing() -> None:
    evidence = Evidence("wider")
    evidence.expose([Exposure(f"{7:016x}", "deeper", 3, 0.05, "live", 1_000, 900)])
    assert evidence.step == -1 and counted(evidence) == {TRIAL: (0, 0), LIVE: (0, 0)}
