"""What a run of `make chaos ARGS=--flink` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.streaming.distributed.shop import Place


@dataclass
class FlinkFindings:
    """What a run found.

    Attributes:
        back_s: What happened -> seconds until all clicks of the second after it had their rows.
        clicks: How many there were.
        rows: Rows that a trainer would learn from, or that histories need.
        again: Rows that came again.
        lost: Rows that only the undisturbed log has.
        invented: Rows that it does not have.
        changed: Rows with other bytes.
        differs: What was compared beside -> both values, where they are not equal.
    """

    back_s: dict[str, list[float]] = field(default_factory=dict)
    clicks: int = 0
    rows: int = 0
    again: int = 0
    lost: int = 0
    invented: int = 0
    changed: int = 0
    differs: dict[str, str] = field(default_factory=dict)

    def compare_rows(self, ours: Mapping[Place, bytes], undisturbed: Mapping[Place, bytes]) -> None:
        """Compares what two logs have, each row once."""
        self.rows = len(ours)
        self.lost = len(undisturbed.keys() - ours.keys())
        self.invented = len(ours.keys() - undisturbed.keys())
        self.changed = sum(ours[place] != undisturbed[place] for place in ours.keys() & undisturbed.keys())

    def compare(self, what: str, ours: object, wanted: object) -> None:
        """Compares two values."""
        if ours != wanted:
            self.differs[what] = f"{ours!s:.200}, not {wanted!s:.200}"

    def problems(self) -> list[str]:
        """The promises that were broken."""
        rows = {"lost": self.lost, "invented": self.invented, "changed": self.changed}
        found = [f"{count} rows are {what}" for what, count in rows.items() if count]
        return found + [f"{what}: {values}" for what, values in self.differs.items()]

    def lines(self) -> list[str]:
        """The figures, then what is wrong."""
        back = (
            f"{what}: caught up after {', '.join(f'{s:.0f}' for s in took)} s" for what, took in self.back_s.items()
        )
        rows = f"{self.rows} rows of {self.clicks} clicks, {self.again} came again: "
        rows += f"{self.lost} lost, {self.invented} doubled or invented, {self.changed} changed"
        return [*back, rows, *(f"WRONG  {one}" for one in self.problems())]
