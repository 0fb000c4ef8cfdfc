"""Desired state of a rollout in numbered generations, with pure transitions from one to the next.

The gate or an operator writes the next generation. Workers apply it within a
quarter of a second. A generation never changes. All of them together are the
audit log of decisions, actors and reasons (`state/rollouts/rollouts.py`).

    starting  no users yet: the trial cannot answer so far
    running   the share of the step; the gate advances it to the next one
    halted    the share stays as it is until somebody resumes the rollout
    done      the last step is over: its share stays until somebody ends the rollout
    back      the live trainer's versions serve all users again
    ended     likewise, and the rollout needs no more attention
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from state.errors import ControlConflict, SettingsError

Phase = Literal["starting", "running", "halted", "done", "back", "ended"]
OPEN = ("running", "halted", "done")
OVER = ("back", "ended")
STEPS = (1.0, 5.0, 50.0, 100.0)
EVERY_S = 1800.0
GATE = "gate"
"""The actor of decisions that nobody commanded."""


@dataclass(frozen=True)
class Rollout:
    """A generation of the desired state of a rollout.

    Attributes:
        generation: Its number; the newest one is in force.
        name: Name of the trial that is rolled out.
        steps: Shares of the users in percent, ascending.
        every_s: Minimum duration of a step.
        step: Index of the current step, from 0.
        phase: One of the phases above.
        started_ms: When the rollout began, wall clock.
        since_ms: When this step began.
        at_ms: When this generation was decided.
        actor: Who decided.
        reason: Why.
        exposures_from: Offset at which its exposures begin in their topic.
        log_from: Offset of the training log when the rollout began.
    """

    generation: int
    name: str
    steps: tuple[float, ...]
    every_s: float
    step: int
    phase: Phase
    started_ms: int
    since_ms: int
    at_ms: int
    actor: str
    reason: str
    exposures_from: int
    log_from: int

    @property
    def is_open(self) -> bool:
        """Whether users are split between the arms."""
        return self.phase in OPEN

    @property
    def is_over(self) -> bool:
        """Whether the trial serves nobody any more."""
        return self.phase in OVER

    @property
    def is_stopped(self) -> bool:
        """Whether the gate halted it or rolled it back, and nobody has decided anything since."""
        return self.phase in ("halted", "back") and self.actor == GATE

    @property
    def is_told(self) -> bool:
        """Whether it should be reported: it is not over, or the gate stopped it."""
        return self.is_stopped or not self.is_over

    @property
    def share(self) -> float:
        """The share of the users whom the trial serves, 0 to 1."""
        return self.steps[self.step] / 100 if self.is_open else 0.0


def require_steps(steps: tuple[float, ...]) -> None:
    """Refuses invalid steps.

    >>> require_steps((1.0, 5.0, 50.0, 100.0))

    Raises:
        SettingsError: They are empty, not ascending, or not percentages.
    """
    if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] <= 100:
        shown = ",".join(f"{one:g}" for one in steps)
        raise SettingsError(f"--steps {shown} are no steps", "give ascending percentages above 0, such as 1,5,50,100")


def start(
    before: Rollout | None,
    name: str,
    steps: tuple[float, ...],
    every_s: float,
    places: tuple[int, int],
    *,
    actor: str,
    reason: str,
    now_ms: int,
) -> Rollout:
    """Starts a rollout, which waits until its trial can answer.

    Args:
        before: The newest generation; None before the first.
        name: Name of the trial.
        steps: Shares of the users in percent.
        every_s: Minimum duration of a step.
        places: End offsets of the exposures and of the training log.
        actor: Who starts it.
        reason: Why.
        now_ms: Wall clock.

    >>> first = start(None, "wider", STEPS, 1800, (0, 0), actor="ann", reason="try it", now_ms=5)
    >>> first.generation, first.share, first.phase
    (1, 0.0, 'starting')

    Raises:
        SettingsError: The steps are invalid.
        ControlConflict: Another rollout is open.
    """
    require_steps(steps)
    if before is not None and not before.is_over:
        raise ControlConflict(
            f"the rollout of {before.name} is {before.phase} at {before.share:.0%} of the users",
            f"end it first: `springtide rollout {before.name} --end`",
        )
    generation = 1 if before is None else before.generation + 1
    return Rollout(generation, name, steps, every_s, 0, "starting", now_ms, now_ms, now_ms, actor, reason, *places)


def begin(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Begins the first step, once the trial can answer; returns the same rollout if it has begun.

    >>> first = begin(start(None, "wider", STEPS, 60, (0, 0), actor="ann", reason="try it", now_ms=0), actor="gate",
    ...               reason="it answers", now_ms=5)
    >>> first.share, first.phase, first.since_ms
    (0.01, 'running', 5)
    """
    return (
        _next(rollout, actor, reason, now_ms, phase="running", since_ms=now_ms)
        if rollout.phase == "starting"
        else rollout
    )


def next_step(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Advances to the next share, or to `done` after the last one.

    >>> first = start(None, "wider", (50.0, 100.0), 60, (0, 0), actor="ann", reason="try it", now_ms=0)
    >>> first = begin(first, actor="gate", reason="it answers", now_ms=0)
    >>> whole = next_step(first, actor="gate", reason="nothing against it", now_ms=60_000)
    >>> whole.share, whole.since_ms, next_step(whole, actor="gate", reason="over", now_ms=120_000).phase
    (1.0, 60000, 'done')

    Raises:
        ControlConflict: It is not running.
    """
    _require(rollout, ("running",), "go on")
    if rollout.step + 1 == len(rollout.steps):
        return _next(rollout, actor, reason, now_ms, phase="done")
    return _next(rollout, actor, reason, now_ms, step=rollout.step + 1, since_ms=now_ms)


def halt(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Halts the rollout at its share; returns the same rollout if it is halted.

    Raises:
        ControlConflict: It is not running or halted.
    """
    _require(rollout, ("running", "halted"), "be halted")
    return rollout if rollout.phase == "halted" else _next(rollout, actor, reason, now_ms, phase="halted")


def resume(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Resumes the rollout at the beginning of its step; returns the same rollout if it is running.

    Raises:
        ControlConflict: It is not running or halted.
    """
    _require(rollout, ("running", "halted"), "be resumed")
    if rollout.phase == "running":
        return rollout
    return _next(rollout, actor, reason, now_ms, phase="running", since_ms=now_ms)


def back(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Rolls back to no users; returns the same rollout if that is done.

    Raises:
        ControlConflict: The rollout was ended.
    """
    _require(rollout, ("starting", *OPEN, "back"), "go back")
    return rollout if rollout.phase == "back" else _next(rollout, actor, reason, now_ms, phase="back")


def end(rollout: Rollout, *, actor: str, reason: str, now_ms: int) -> Rollout:
    """Ends the rollout: users are no longer split, and no finding needs attention. The same rollout if it was ended."""
    return rollout if rollout.phase == "ended" else _next(rollout, actor, reason, now_ms, phase="ended")


def _require(rollout: Rollout, phases: tuple[str, ...], verb: str) -> None:
    if rollout.phase not in phases:
        raise ControlConflict(
            f"the rollout of {rollout.name} is {rollout.phase} and cannot {verb}",
            f"look at what became of it: `springtide trial report {rollout.name}`",
        )


def _next(rollout: Rollout, actor: str, reason: str, now_ms: int, **changes: Any) -> Rollout:
    return replace(rollout, generation=rollout.generation + 1, at_ms=now_ms, actor=actor, reason=reason, **changes)
