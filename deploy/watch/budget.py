"""The remaining privacy budget, from the trainer's metrics. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.watch.scrape import Scrape

SERIES = "springtide_trainer_privacy"


@dataclass(frozen=True)
class BudgetLeft:
    """The current privacy budget.

    Attributes:
        epsilon: The whole budget.
        left: The part that no period has used.
        spent: Whether training holds, because the next period would use more than is left.
    """

    epsilon: float
    left: float
    spent: bool


def budget_of(trainer: Scrape) -> BudgetLeft | None:
    """Returns the budget; None if none is set, or the trainer does not report it.

    >>> from deploy.watch.scrape import parsed
    >>> lines = (f"{SERIES}_{name} {value}" for name, value in (("epsilon_limit", 8), ("epsilon_spent", 6.5), ("held", 1)))
    >>> budget_of(Scrape(parsed(chr(10).join(lines)))), budget_of(Scrape(parsed(f"{SERIES}_epsilon_limit 0")))
    (BudgetLeft(epsilon=8.0, left=1.5, spent=True), None)
    """
    epsilon, taken, held = (trainer.value(f"{SERIES}_{name}") for name in ("epsilon_limit", "epsilon_spent", "held"))
    return BudgetLeft(epsilon, max(0.0, epsilon - (taken or 0.0)), bool(held)) if epsilon else None


def lines_of_budget(budget: BudgetLeft | None) -> list[Sequence[str]]:
    """Returns the cells of the budget's line; empty if no budget is set.

    >>> lines_of_budget(BudgetLeft(8.0, 1.5, False)), lines_of_budget(None)
    ([('privacy', '1.50 left', 'of epsilon 8.00')], [])
    """
    return [] if budget is None else [("privacy", f"{budget.left:.2f} left", f"of epsilon {budget.epsilon:.2f}")]
