"""Decides how a rollout continues, from the evidence about its arms. Pure.

Checks in this order:

1. The trial fails more often than the live arm: roll back to no users.
2. It is slower: roll back.
3. The split of users between the arms contradicts the share: halt. The engagements are then meaningless.
4. It has fewer engagements per answer, by an interval that is valid at any time: roll back.
5. The step is over, and the trial has answered: next step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from state.config.sections import RolloutSettings
from state.rollouts.assignment import LIVE, TRIAL
from state.rollouts.evidence import Evidence, StepSums
from state.rollouts.latencies import quantile_ms
from state.rollouts.rollout import Rollout

LEAST_FAILURES = 10
"""Minimum number of failures in a step before the trial is judged by them."""

LEAST_ANSWERS = 500
"""Minimum answers of each arm before latencies are compared, so that the slowest hundredth is a few answers."""


class Decision(NamedTuple):
    """The next action for a rollout, and the reason."""

    action: Literal["next", "halt", "back"]
    reason: str


def decide(rollout: Rollout, evidence: Evidence, settings: RolloutSettings, now_ms: int) -> Decision | None:
    """Decides the next action; None for no action.

    Args:
        rollout: Its newest generation.
        evidence: Evidence about its arms.
        settings: The bounds.
        now_ms: Wall clock.
    """
    if rollout.phase not in ("running", "halted"):
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
    return Decision("next", f"nothing against it after {trial.answers:,} answers to {trial.users:,} users")


def _against(evidence: Evidence, settings: RolloutSettings) -> Decision | None:
    """The first check that fails; None if none does."""
    trial, live = evidence.of_step[TRIAL], evidence.of_step[LIVE]
    more = _failing(trial) - _failing(live)
    if trial.failures >= LEAST_FAILURES and more > settings.max_failures:
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
        counts = " and ".join(f"{evidence.of_step[arm].users:,} ({arm})" for arm in (TRIAL, LIVE))
        return Decision(
            "halt", f"users come to the arms otherwise than the share says: {counts}, p = {evidence.mismatch_p:.2g}"
        )
    found = evidence.difference()
    if found.high < 0:
        return Decision(
            "back",
            f"it is worse: {found.value:+.4f} engagements an answer, between {found.low:+.4f} and {found.high:+.4f}",
        )
    return None


def _failing(sums: StepSums) -> float:
    return sums.failures / max(sums.answers, 1)
