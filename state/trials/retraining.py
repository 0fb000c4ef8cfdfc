"""State of the scheduled retrain: start of the schedule, the newest retrain, and its outcome. The schedule is pure.

    trials/retrain.json    this; sealed like a manifest, replaced as a whole

The next retrain is due one interval after the last one began, or after the
schedule was first read. It never begins while another is in progress. A missed
time is not made up for. A retrain is a trial of its name; its outcome is written
here once, when it is over.
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
"""Empty while the retrain is in progress; `failed` if it could not be judged."""
OUTCOMES = ("promoted", "dropped", "failed")


@dataclass(frozen=True)
class Retraining:
    """The schedule and the newest retrain.

    Attributes:
        since_ms: When the schedule was first read, wall clock.
        name: Name of the newest retrain's trial; empty before the first.
        begun_at_ms: When it began.
        outcome: Its outcome.
        reason: Why.
        ended_at_ms: When the outcome was known; 0 while it is in progress.
        judged_at_ms: When a retrain was last judged, promoted or dropped; 0 for never.
        promoted_at_ms: When a retrain was last promoted; 0 for never.
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
        """Whether a retrain began and is not over.

        >>> schedule = Retraining(0)
        >>> schedule.under_way, schedule.begin(5).under_way, schedule.begin(5).end("dropped", "worse", 9).under_way
        (False, True, False)
        """
        return bool(self.name) and not self.outcome

    def due_ms(self, every_ms: float) -> int:
        """When the next retrain is due, if none is in progress.

        >>> Retraining(100).due_ms(1000), Retraining(100).begin(5000).end("dropped", "worse", 5900).due_ms(1000)
        (1100, 6000)
        """
        return max(self.since_ms, self.begun_at_ms) + round(every_ms)

    def is_due(self, every_ms: float, now_ms: int) -> bool:
        """Whether a retrain is due now.

        >>> schedule = Retraining(0).begin(1000)
        >>> schedule.is_due(500, 9000), schedule.end("dropped", "worse", 1200).is_due(500, 1499)
        (False, False)
        """
        return not self.under_way and now_ms >= self.due_ms(every_ms)

    def begin(self, now_ms: int) -> Retraining:
        """The state when a retrain begins; its name is its time.

        >>> Retraining(0).begin(1_795_737_600_000).name
        'retrain-20261127-000000'
        """
        name = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("retrain-%Y%m%d-%H%M%S")
        return replace(self, name=name, begun_at_ms=now_ms, outcome="", reason="", ended_at_ms=0)

    def end(self, outcome: Outcome, reason: str, now_ms: int) -> Retraining:
        """The state when the retrain is over."""
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
        """Reads the document; None before the schedule was first read.

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
        """Applies a transition; durable when this returns.

        Raises:
            RegistryError: The document is damaged.
            OSError: The disk refused; the document is unchanged.
        """
        before = self.read()
        after = transition(before)
        if after != before:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self.path, sealed.encode(after))
        return after
