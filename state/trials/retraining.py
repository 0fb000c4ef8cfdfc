"""What is known of the scheduled retrain: since when, the newest one, and what became of it. The schedule is pure.

    trials/retrain.json    this; sealed as a manifest is, replaced as a whole

The next one is due a span after the last one began, or after the schedule was
first looked at; never while one is under way. A time that was missed is not
made up for. A retrain is a trial of its name; what becomes of it is written here
once, when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from state import layout
from state.disk import files as durable
from state.errors import RegistryError
from state.registry import sealed

Outcome = Literal["", "promoted", "dropped", "failed"]
"""Empty while it is under way; `failed` where it could not be judged."""
OUTCOMES = ("promoted", "dropped", "failed")


@dataclass(frozen=True)
class Retraining:
    """The schedule and the newest retrain.

    Attributes:
        since_ms: When the schedule was first looked at, wall clock.
        name: Of the newest one's trial; empty before the first.
        begun_at_ms: When it began.
        outcome: What became of it.
        reason: Why.
        ended_at_ms: When that was known; 0 while it is under way.
        judged_at_ms: When one was last judged, promoted or dropped; 0 for never.
        promoted_at_ms: When one was last promoted; 0 for never.
    """

    since_ms: int
    name: str = ""
    begun_at_ms: int = 0
    outcome: Outcome = ""
    reason: str = ""
    ended_at_ms: int = 0
    judged_at_ms: int = 0
    promoted_at_ms: int = 0

    @property
    def under_way(self) -> bool:
        """Whether one began and is not over.

        >>> schedule = Retraining(0)
        >>> schedule.under_way, schedule.begin(5).under_way, schedule.begin(5).end("dropped", "worse", 9).under_way
        (False, True, False)
        """
        return bool(self.name) and not self.outcome

    def due_ms(self, every_ms: float) -> int:
        """When the next one is to begin, where none is under way.

        >>> Retraining(100).due_ms(1000), Retraining(100).begin(5000).end("dropped", "worse", 5900).due_ms(1000)
        (1100, 6000)
        """
        return max(self.since_ms, self.begun_at_ms) + round(every_ms)

    def is_due(self, every_ms: float, now_ms: int) -> bool:
        """Whether one is to begin now.

        >>> schedule = Retraining(0).begin(1000)
        >>> schedule.is_due(500, 9000), schedule.end("dropped", "worse", 1200).is_due(500, 1499)
        (False, False)
        """
        return not self.under_way and now_ms >= self.due_ms(every_ms)

    def begin(self, now_ms: int) -> Retraining:
        """Once one begins; it is named after the moment.

        >>> Retraining(0).begin(1_795_737_600_000).name
        'retrain-20261127-000000'
        """
        name = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("retrain-%Y%m%d-%H%M%S")
        return replace(self, name=name, begun_at_ms=now_ms, outcome="", reason="", ended_at_ms=0)

    def end(self, outcome: Outcome, reason: str, now_ms: int) -> Retraining:
        """Once it is over."""
        ended = replace(self, outcome=outcome, reason=reason, ended_at_ms=now_ms)
        if outcome != "failed":
            ended = replace(ended, judged_at_ms=now_ms)
        return replace(ended, promoted_at_ms=now_ms) if outcome == "promoted" else ended


class Retrainings:
    """The document under a state directory. One process changes it, under `retrain.lock`.

    Args:
        state: The state directory.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / layout.TRIALS / layout.RETRAIN

    def read(self) -> Retraining | None:
        """What is known; None before anybody looked at the schedule.

        Raises:
            RegistryError: It is damaged.
        """
        try:
            return sealed.decode(self.path.read_bytes(), Retraining)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{self.path} cannot be read: {error}",
                "remove it: the schedule begins anew, a trial that runs is yours to judge",
            ) from error

    def change(self, transition: Callable[[Retraining | None], Retraining]) -> Retraining:
        """Takes it on; durable when this returns.

        Raises:
            RegistryError: It is damaged.
            OSError: The disk refused; what was there stays.
        """
        before = self.read()
        after = transition(before)
        if after != before:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self.path, sealed.encode(after))
        return after
