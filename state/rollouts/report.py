"""Report on a rollout: figures by arm, the lift with its interval, and a verdict in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from state.rollouts.assignment import ARMS, LIVE, TRIAL
from state.rollouts.evidence import Evidence
from state.rollouts.latencies import quantile_ms
from state.rollouts.rollout import Rollout
from state.statistics.arms import Contrast

Finding = Literal["mismatch", "too early", "better", "worse", "equal", "undecided"]


class ArmFigures(NamedTuple):
    """Figures of one arm.

    Attributes:
        users: Users ever exposed in it.
        answers: Answers over the whole rollout.
        engagements: Engagements after its users' exposures.
        rate: Engagements per answer.
        failures: Failures of the newest step.
        p50_ms: Median latency of the newest step.
        p99_ms: 99th percentile of it.
    """

    users: int
    answers: int
    engagements: int
    rate: float
    failures: int
    p50_ms: float
    p99_ms: float


class RolloutReport(NamedTuple):
    """A report on a rollout.

    Attributes:
        arms: Figures by arm.
        difference: Engagements per answer of the trial minus those of the live arm, compared within each step.
        lift: The same relative to the live arm; None if an arm has no engagements.
        mismatch_p: P-value of the sample ratio test.
        finding: The result in a word.
        verdict: The result in a sentence.
    """

    arms: Mapping[str, ArmFigures]
    difference: Contrast
    lift: Contrast | None
    mismatch_p: float
    finding: Finding
    verdict: str


def report(evidence: Evidence, equal_within: float) -> RolloutReport:
    """Builds the report from the evidence.

    Args:
        evidence: Evidence about the arms.
        equal_within: Arms are equal if the whole interval of the lift is within plus and minus this.
    """
    lift = evidence.lift()
    finding, verdict = _verdict(evidence, lift, equal_within)
    figures: dict[str, ArmFigures] = {}
    for arm in ARMS:
        step, answers, engagements = evidence.of_step[arm], evidence.answers(arm), evidence.engagements(arm)
        figures[arm] = ArmFigures(
            evidence.users[arm], answers, engagements, engagements / max(answers, 1), step.failures,
            quantile_ms(step.took, 0.5), quantile_ms(step.took, 0.99),
        )  # fmt: skip
    return RolloutReport(figures, evidence.difference(), lift, evidence.mismatch_p, finding, verdict)


def _verdict(evidence: Evidence, lift: Contrast | None, equal_within: float) -> tuple[Finding, str]:
    if evidence.mismatch:
        return (
            "mismatch",
            f"users come to the arms otherwise than the share says (p = {evidence.mismatch_p:.2g}): look for lost exposures "
            "or failing answers; nothing else that is compared counts",
        )
    if lift is None or not math.isfinite(lift.high):
        return "too early", "too early: an arm has too few engagements to say anything"
    between = f"{lift.low:+.1%} to {lift.high:+.1%} engagements an answer beside the live versions"
    if lift.low > 0:
        return "better", f"better: {between}"
    if lift.high < 0:
        return "worse", f"worse: {between}"
    if -equal_within < lift.low and lift.high < equal_within:
        return "equal", f"equal within {equal_within:.0%}: {between}"
    return "undecided", f"undecided: {between}"


def figures(found: RolloutReport) -> dict[str, Any]:
    """Figures and finding as JSON values; infinite interval ends are null."""
    return {
        "arms": {arm: one._asdict() for arm, one in found.arms.items()},
        "difference": _ends(found.difference),
        "lift": None if found.lift is None else _ends(found.lift),
        "mismatch_p": found.mismatch_p,
        "finding": found.finding,
        "verdict": found.verdict,
    }


def as_document(found: RolloutReport, generations: Sequence[Rollout]) -> dict[str, Any]:
    """The report as JSON values."""
    newest = generations[-1]
    return {
        "name": newest.name,
        "phase": newest.phase,
        "share": newest.share,
        **figures(found),
        "history": [
            {"at_ms": one.at_ms, "phase": one.phase, "share": one.share, "actor": one.actor, "reason": one.reason}
            for one in generations
        ],
    }


def as_lines(found: RolloutReport, generations: Sequence[Rollout]) -> list[str]:
    """The report as text lines."""
    newest = generations[-1]
    lines = [f"{newest.name}: {newest.phase}, {newest.share:g} of the users ({newest.actor}: {newest.reason})"]
    lines.append(
        f"{'arm':<6}{'users':>10}{'answers':>12}{'engagements':>13}{'rate':>9}{'failures':>10}{'p50 ms':>9}{'p99 ms':>9}"
    )
    for arm in (TRIAL, LIVE):
        one = found.arms[arm]
        lines.append(
            f"{arm:<6}{one.users:>10,}{one.answers:>12,}{one.engagements:>13,}{one.rate:>9.4f}{one.failures:>10,}"
            f"{one.p50_ms:>9.1f}{one.p99_ms:>9.1f}"
        )
    lines.append(f"difference   {interval(found.difference, '+.4f')} engagements an answer")
    if found.lift is not None:
        lines.append(f"lift         {interval(found.lift, '+.1%')}")
    return [*lines, f"sample ratio p = {found.mismatch_p:.2g}", found.verdict]


def interval(contrast: Contrast, form: str) -> str:
    """Formats a value with its interval.

    >>> interval(Contrast(0.1, 0.05, 0.15), "+.1%"), interval(Contrast(0.1, -math.inf, math.inf), "+.1%")
    ('+10.0% (+5.0% to +15.0%)', '+10.0%')
    """
    if not math.isfinite(contrast.low) or not math.isfinite(contrast.high):
        return f"{contrast.value:{form}}"
    return f"{contrast.value:{form}} ({contrast.low:{form}} to {contrast.high:{form}})"


def _ends(contrast: Contrast) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in contrast._asdict().items()}
