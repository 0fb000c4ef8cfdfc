"""Reports on a rollout's arms, and decides from the evidence how the rollout continues. Pure.

The checks, in this order:

1. The trial fails more often than the live arm: roll back to no users.
2. The trial is slower: roll back.
3. The split of users between the arms contradicts the share, so engagements are meaningless: halt.
4. The trial has fewer engagements per answer, by an interval that is valid at any time: roll back.
5. The step is over, and the trial has answered: next step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from state.config.sections import RolloutSettings
from state.experiments.evidence import ARMS, LIVE, TRIAL, Evidence, StepSums, quantile_ms
from state.experiments.experiment import Experiment
from state.statistics.confidence_sequence import Contrast

LEAST_FAILURES = 10
"""Minimum number of failures in a step before failures are compared."""

MOST_EXCESS = 0.01
"""Maximum by which the failure rate of the trial may exceed that of the live arm."""

LEAST_ANSWERS = 500
"""Minimum answers of each arm before latencies are compared, so that the slowest hundredth is a few answers."""

EQUAL_WITHIN = 0.05
"""Arms are equal if the whole interval of the lift is within plus and minus this."""

Finding = Literal["mismatch", "too early", "better", "worse", "equal", "undecided"]


class ArmFigures(msgspec.Struct, frozen=True):
    """Figures of one arm over the whole rollout; failures and latencies are those of the newest step.

    Attributes:
        rate: Engagements per answer.
    """

    users: int
    answers: int
    engagements: int
    rate: float
    failures: int
    p50_ms: float
    p99_ms: float


class Interval(msgspec.Struct, frozen=True):
    """A value with the ends of its interval; None where they are infinite."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, contrast: Contrast) -> Interval:
        """Returns the interval of a contrast."""
        return cls(*(end if math.isfinite(end) else None for end in (contrast.value, contrast.low, contrast.high)))

    def as_text(self, form: str) -> str:
        """Formats a value with its interval.

        >>> Interval(0.1, 0.05, 0.15).as_text("+.1%"), Interval(0.1, None, None).as_text("+.1%")
        ('+10.0% (+5.0% to +15.0%)', '+10.0%')
        """
        value = "-" if self.value is None else f"{self.value:{form}}"
        if self.low is None or self.high is None:
            return value
        return f"{value} ({self.low:{form}} to {self.high:{form}})"


class RolloutReport(msgspec.Struct, frozen=True):
    """A report on a rollout, for display.

    Attributes:
        arms: Figures by arm.
        difference: Engagements per answer of the trial minus those of the live arm, compared within each step.
        lift: The same relative to the live arm; None if an arm has no engagements.
        mismatch_p: P-value of the sample ratio test.
    """

    name: str
    started_ms: int
    judged_ms: int
    arms: Mapping[str, ArmFigures]
    difference: Interval
    lift: Interval | None
    mismatch_p: float
    finding: Finding
    verdict: str

    def is_of(self, experiment: Experiment) -> bool:
        """Whether it is about the newest rollout of an experiment."""
        rollout = experiment.rollout
        return rollout is not None and (self.name, self.started_ms) == (experiment.name, rollout.started_ms)


class Decision(NamedTuple):
    """The next action for a rollout, and the reason."""

    action: Literal["next", "halt", "back"]
    reason: str


def decide(experiment: Experiment, evidence: Evidence, settings: RolloutSettings, now_ms: int) -> Decision | None:
    """Decides the next action for a rollout from the evidence; None for no action."""
    rollout = experiment.rollout
    if rollout is None or experiment.stage != "rollout" or rollout.phase not in ("running", "halted"):
        return None
    against = _against(evidence, settings)
    if against is not None:
        return None if (against.action, rollout.phase) == ("halt", "halted") else against
    over = now_ms - rollout.since_ms >= 1000 * rollout.every_s
    if rollout.phase != "running" or not over or evidence.step != rollout.step:
        return None
    trial = evidence.of_step[TRIAL]
    if not trial.answers:
        return None
    return Decision("next", f"no check failed after {trial.answers:,} answers to {trial.users:,} users")


def _against(evidence: Evidence, settings: RolloutSettings) -> Decision | None:
    """The first check that fails; None if none does."""
    trial, live = evidence.of_step[TRIAL], evidence.of_step[LIVE]
    excess = _failing(trial) - _failing(live)
    if trial.failures >= LEAST_FAILURES and excess > MOST_EXCESS:
        return Decision(
            "back", f"it fails in {_failing(trial):.1%} of its answers, the live one in {_failing(live):.1%}"
        )
    if min(int(trial.took.sum()), int(live.took.sum())) >= LEAST_ANSWERS:
        slow, usual = quantile_ms(trial.took, 0.99), quantile_ms(live.took, 0.99)
        if slow - usual > settings.slower_ms:
            return Decision(
                "back", f"its slowest hundredth of answers takes {slow:.0f} ms, the live one's {usual:.0f} ms"
            )
    if evidence.mismatch:
        counts = " and ".join(f"{evidence.of_step[arm].users:,} ({arm})" for arm in ARMS)
        return Decision("halt", f"sample ratio mismatch: {counts} users, p = {evidence.mismatch_p:.2g}")
    difference = Interval.of(evidence.difference())
    if difference.high is not None and difference.high < 0:
        return Decision("back", f"it is worse: {difference.as_text('+.4f')} engagements per answer")
    return None


def _failing(sums: StepSums) -> float:
    return sums.failures / max(sums.answers, 1)


def report(experiment: Experiment, evidence: Evidence, now_ms: int) -> RolloutReport:
    """Builds the report on the newest rollout of an experiment, which must have one."""
    assert experiment.rollout is not None
    lift = evidence.lift()
    finding, verdict = _verdict(evidence, lift)
    return RolloutReport(
        name=experiment.name,
        started_ms=experiment.rollout.started_ms,
        judged_ms=now_ms,
        arms={arm: _figures(evidence, arm) for arm in ARMS},
        difference=Interval.of(evidence.difference()),
        lift=None if lift is None else Interval.of(lift),
        mismatch_p=evidence.mismatch_p,
        finding=finding,
        verdict=verdict,
    )


def _figures(evidence: Evidence, arm: Literal["trial", "live"]) -> ArmFigures:
    step, answers, engagements = evidence.of_step[arm], evidence.answers(arm), evidence.engagements(arm)
    return ArmFigures(
        users=evidence.users[arm],
        answers=answers,
        engagements=engagements,
        rate=engagements / max(answers, 1),
        failures=step.failures,
        p50_ms=quantile_ms(step.took, 0.5),
        p99_ms=quantile_ms(step.took, 0.99),
    )


def _verdict(evidence: Evidence, lift: Contrast | None) -> tuple[Finding, str]:
    if evidence.mismatch:
        return (
            "mismatch",
            f"sample ratio mismatch (p = {evidence.mismatch_p:.2g}): look for lost exposures or failing answers; no other "
            "figure can be trusted",
        )
    if lift is None or not math.isfinite(lift.high):
        return "too early", "too early: an arm has too few engagements"
    between = f"{lift.low:+.1%} to {lift.high:+.1%} engagements per answer, relative to the live versions"
    if lift.low > 0:
        return "better", f"better: {between}"
    if lift.high < 0:
        return "worse", f"worse: {between}"
    if lift.low > -EQUAL_WITHIN and lift.high < EQUAL_WITHIN:
        return "equal", f"equal within {EQUAL_WITHIN:.0%}: {between}"
    return "undecided", f"undecided: {between}"


def as_document(report: RolloutReport, experiment: Experiment) -> dict[str, Any]:
    """Returns the report as JSON values, with the history of the rollout."""
    return {
        **msgspec.to_builtins(report),
        "phase": experiment.phase,
        "share": experiment.share,
        "history": msgspec.to_builtins(experiment.rollout_history),
    }


def as_lines(report: RolloutReport, experiment: Experiment) -> list[str]:
    """Formats the report as lines of text."""
    newest = experiment.newest
    lines = [f"{report.name}: {experiment.phase}, {experiment.share:g} of the users ({newest.actor}: {newest.reason})"]
    lines.append(
        f"{'arm':<6}{'users':>10}{'answers':>12}{'engagements':>13}{'rate':>9}{'failures':>10}{'p50 ms':>9}{'p99 ms':>9}"
    )
    for arm, figures in report.arms.items():
        lines.append(
            f"{arm:<6}{figures.users:>10,}{figures.answers:>12,}{figures.engagements:>13,}{figures.rate:>9.4f}{figures.failures:>10,}"
            f"{figures.p50_ms:>9.1f}{figures.p99_ms:>9.1f}"
        )
    lines.append(f"difference   {report.difference.as_text('+.4f')} engagements per answer")
    if report.lift is not None:
        lines.append(f"lift         {report.lift.as_text('+.1%')}")
    return [*lines, f"sample ratio p = {report.mismatch_p:.2g}", report.verdict]
