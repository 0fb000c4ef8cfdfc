"""What becomes of a retrain: promoted, dropped or failed, and why, by its trial, its comparison and a rollout. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from deploy.operate.times import age
from deploy.trials.telling import difference
from state.config.sections import RetrainSettings
from state.config.spans import span_ms
from state.rollouts.rollout import Rollout
from state.trials.retraining import Outcome
from state.trials.trial import Trial

ACTOR = "retrain"
"""Who decides where nobody commanded it."""


class RetrainDecision(NamedTuple):
    """What is to become of a retrain.

    Attributes:
        outcome: What.
        reason: Why, in words.
    """

    outcome: Outcome
    reason: str


def judge(
    trial: Trial,
    compared: Mapping[str, Any] | None,
    held: str | None,
    rollout: Rollout | None,
    settings: RetrainSettings,
    begun_at_ms: int,
    now_ms: int,
) -> RetrainDecision | None:
    """Judges a retrain; None while that is too early.

    1. What somebody decided of its trial counts, and what ended it.
    2. A rollout of it that is open is waited for, and one that went back drops it.
    3. The interval that holds at all looks: worse, or better; better alone is enough where no rollout is asked for. While
       the trial's guard holds it, its comparison decides nothing.
    4. So many rows, or so much time, and neither.

    Args:
        trial: Its trial.
        compared: The figures of its comparison; None before anything was compared.
        held: What the trial's guard holds, in words; None for nothing.
        rollout: The newest rollout; None where there was none.
        settings: After how many rows, and how much time.
        begun_at_ms: When it began, wall clock.
        now_ms: Wall clock.
    """
    # 1.
    if trial.wanted == "promoting":
        # One that we ourselves promote goes on where that was cut short.
        return RetrainDecision("promoted", trial.reason) if trial.actor == ACTOR else None
    if (over := _decided(trial)) is not None:
        return over
    # 2.
    phase = rollout.phase if rollout is not None and rollout.name == trial.name else ""
    if phase in ("starting", "running", "halted"):
        return None
    if rollout is not None and phase == "back":
        return RetrainDecision("dropped", f"its rollout went back: {rollout.reason} ({rollout.actor})")
    rows, verdict = (0, "undecided") if compared is None else (int(compared["rows"]), str(compared["verdict"]))
    told = f"{difference(compared or {})} nats a row against the live trainer, over {rows:,} rows"
    # 3.
    if held is not None:
        if now_ms - begun_at_ms < (span_ms(settings.limit) or 0.0):
            return None
        return RetrainDecision("failed", f"held by its guard: {held}")
    if verdict == "worse":
        return RetrainDecision("dropped", f"worse: {told}")
    if phase == "done":
        return RetrainDecision("promoted", f"its rollout is done with nothing against it, and it is not worse: {told}")
    if verdict == "better" and settings.rollout == "off":
        return RetrainDecision("promoted", f"better: {told}")
    # 4.
    return _too_late(trial, rows, verdict, told, settings, now_ms - begun_at_ms)


def _too_late(
    trial: Trial, rows: int, verdict: str, told: str, settings: RetrainSettings, took_ms: int
) -> RetrainDecision | None:
    """What becomes of one that so many rows, or so much time, did not decide; None before that."""
    if rows >= settings.rows and verdict != "better":
        return RetrainDecision("dropped", f"no better: {told}")
    if took_ms < (span_ms(settings.limit) or 0.0):
        return None
    after = f"after {age(took_ms / 1000)} (retrain.limit)"
    if not rows:
        return RetrainDecision(
            "failed", f"not a row could be compared {after}: logs/trial-{trial.name}.log says how far it came"
        )
    if verdict == "better":
        return RetrainDecision("dropped", f"better, and no rollout of it is done {after}: {told}")
    return RetrainDecision("dropped", f"no better {after}: {told}")


def _decided(trial: Trial) -> RetrainDecision | None:
    """What others decided, or we before a crash."""
    by = "" if trial.actor == ACTOR else f"by {trial.actor}: "
    if trial.wanted == "promoted":
        return RetrainDecision("promoted", f"{by}{trial.reason}")
    if trial.wanted == "stopped":
        return RetrainDecision("dropped", f"{by}{trial.reason}")
    return RetrainDecision("dropped", f"it ended: {trial.reason}") if trial.wanted == "ended" else None
