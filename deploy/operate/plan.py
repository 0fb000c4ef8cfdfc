"""What a rollback does, in figures and words: worked out before anything changes where it is a dry run. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.operate.answers import Turning
from deploy.operate.exact import ExactPlan
from deploy.operate.log_scan import Counted
from deploy.operate.masking import describe, mask_document
from deploy.operate.times import age
from state.features.mask import Mask
from state.registry.control import Mode


@dataclass(frozen=True)
class Plan:
    """A rollback.

    Attributes:
        to: The version gone back to.
        age_s: Its age.
        mode: Whether the stream goes back too.
        topic: Name of the training log.
        partition: Its partition.
        first: Offset that the trainer goes back to.
        end: End of the log; the newest version's offset where Kafka did not answer.
        mask: The events left out from now on.
        turning: How answers turn.
        then_follow: Whether they follow once the trainer has caught up.
        counted: What lies between in the log; None where Kafka did not answer.
        rows_per_s: How fast the trainer learns, as measured; None where it does not answer.
        exact: What an exact rollback does besides.
    """

    to: int
    age_s: float
    mode: Mode
    topic: str
    partition: int
    first: int
    end: int
    mask: Mask
    turning: Turning
    then_follow: bool = False
    counted: Counted | None = None
    rows_per_s: float | None = None
    exact: ExactPlan | None = None

    @property
    def replay_s(self) -> float | None:
        """About how long the trainer learns until it is where it was; None where that is not known."""
        if self.counted is None or not self.rows_per_s:
            return None
        return (self.counted.rows - self.counted.masked) / self.rows_per_s

    def lines(self) -> list[str]:
        """The plan for people, one line per fact.

        >>> counted = Counted(60, 5000, 120, {1, 2}, 30, {1: (120, {1, 2})})
        >>> plan = Plan(40, 90.0, "fast", "log", 0, 100, 160, Mask.NONE, Turning(True, True), False, counted, 2000.0)
        >>> print(plan.lines()[2])
        replay        log, partition 0, offsets 100 to 160: 5,000 rows in 60 records, about 2.4 s at 2,000 rows/s
        """
        answers = (
            "follow once the trainer has caught up" if self.then_follow else "stay there until `springtide follow`"
        )
        found = [
            f"go back to    version {self.to}, {age(self.age_s)} old",
            f"answers       {self.turning.line()}; they {answers}",
            f"{'replay ' if self.exact is None else 'abandon'}       {self.topic}, partition {self.partition}, offsets "
            f"{self.first} to {self._replay()}",
            f"leave out     {describe(self.mask)}{self._masked()}",
        ]
        if self.mode == "fast" and self.counted is not None and self.counted.after:
            found.append(
                f"windows       up to {self.counted.after:,} later rows of these users still count what is left out; "
                "--mode exact makes them anew"
            )
        return [*found, *([] if self.exact is None else self.exact.lines())]

    def document(self) -> dict[str, Any]:
        """The plan as JSON values; users are counted, not listed."""
        found: dict[str, Any] = {
            "to": self.to,
            "age_s": round(self.age_s, 3),
            "mode": self.mode,
            "log": {"topic": self.topic, "partition": self.partition, "first": self.first, "end": self.end},
            "end_is_exact": self.counted is not None,
            "answers": self.turning.document(),
            "then_follow": self.then_follow,
            "replay_s": None if self.replay_s is None else round(self.replay_s, 1),
            "mask": mask_document(self.mask),
        }
        if (counted := self.counted) is not None:
            found |= {
                "records": counted.records,
                "rows": counted.rows,
                "masked": counted.masked,
                "users": len(counted.users),
                "after": counted.after if self.mode == "fast" else 0,
                "masks": {
                    str(number): {"rows": rows, "users": len(users)}
                    for number, (rows, users) in counted.by_mask.items()
                },
            }
        return found if self.exact is None else found | {"exact": self.exact.document()}

    def _replay(self) -> str:
        if self.counted is None:
            return f"at least {self.end} (Kafka does not answer: rows are not counted)"
        speed = "how long is not known: no trainer answers"
        if self.replay_s is not None:
            speed = f"about {age(self.replay_s)} at {self.rows_per_s:,.0f} rows/s"
        return f"{self.end}: {self.counted.rows:,} rows in {self.counted.records:,} records, {speed}"

    def _masked(self) -> str:
        if self.counted is None or not self.mask:
            return ""
        return f": {self.counted.masked:,} rows; what is new hits {len(self.counted.users):,} users"
