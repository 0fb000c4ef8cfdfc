"""The privacy budget for `springtide status`: what the trainer's ledger reports as spent and left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from state.config.settings import Settings
from state.errors import SpringtideError
from state.registry import privacy_ledger
from state.registry.privacy_ledger import PrivacyLedger


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the budget as JSON values; None if there is no budget or the ledger cannot be read."""
    try:
        ledger = privacy_ledger.read(settings.privacy_ledger_path)
    except (SpringtideError, OSError):
        return None
    return None if ledger is None or not settings.privacy.epsilon else document(ledger, settings.privacy.periods)


def document(ledger: PrivacyLedger, periods: int) -> dict[str, Any]:
    """Returns what is spent and left as JSON values.

    Args:
        ledger: The trainer's ledger.
        periods: How many periods the budget covers.
    """
    return {
        "unit": ledger.unit,
        "epsilon": ledger.epsilon,
        "delta": ledger.delta,
        "spent": ledger.spent,
        "left": max(0.0, ledger.epsilon - ledger.spent),
        "periods": len(ledger.periods),
        "of_periods": periods,
        "held": ledger.held,
        "key": ledger.key,
    }


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the budget for `springtide status`: a keyword and a description.

    >>> from state.registry.privacy_ledger import PrivacyPeriod
    >>> ledger = PrivacyLedger("1f", "user", (PrivacyPeriod(1, 7, 8, 9.0),), 8.0, 1e-06, 1.5)
    >>> as_text(document(ledger, 30))
    ('counts', 'epsilon 1.50 of 8.00 spent, 6.50 left (delta 1e-06, unit user); 1 of 30 periods begun')
    """
    text = (
        f"epsilon {found['spent']:.2f} of {found['epsilon']:.2f} spent, {found['left']:.2f} left (delta "
        f"{found['delta']:g}, unit {found['unit']}); {found['periods']} of {found['of_periods']} periods begun"
    )
    if not found["held"]:
        return "counts", text
    return "SPENT", f"{text}; training holds and answers go on; trainer/PRIVACY.md says what a larger budget means"
