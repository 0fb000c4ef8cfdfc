"""Quality of the churn prediction for `springtide status`, from the trainer's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.watch.scrape import Scrape

PREFIX = "springtide_trainer_churn_"
SERIES = {
    "examples": "examples",
    "waiting": "waiting",
    "dropped": "dropped",
    "left": "left_ratio",
    "log_loss": "log_loss",
    "auc": "auc",
    "calibration": "calibration_ratio",
    "calibration_error": "calibration_error",
}
"""By name of the figure, the suffix of its series."""


def look(trainer: Scrape) -> dict[str, float] | None:
    """Returns the figures by name; None if there are no examples and none wait, or if the trainer does not answer."""
    found = {name: trainer.value(PREFIX + end) or 0.0 for name, end in SERIES.items()}
    return found if found["examples"] or found["waiting"] else None


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the figures for `springtide status`: the area under the curve, and a description.

    >>> figures = dict.fromkeys(SERIES, 0.0) | {"examples": 2100.0, "waiting": 300.0, "left": 0.25, "auc": 0.8125}
    >>> word, text = as_text(figures | {"log_loss": 0.4, "calibration": 1.02, "calibration_error": 0.013})
    >>> word
    'AUC 0.812'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    2,100 examples, of recent ones 25.0 % left, log loss 0.400
    predicted over observed 1.02, 1.3 points apart in the mean
    300 rows wait until it is known
    >>> as_text(dict.fromkeys(SERIES, 0.0) | {"waiting": 300.0})
    ('-', 'nothing is known yet; 300 rows wait until it is known')
    """
    waits = f"{found['waiting']:,.0f} rows wait until it is known"
    if found["dropped"]:
        waits += f", {found['dropped']:,.0f} were dropped for want of room"
    if not found["examples"]:
        return "-", f"nothing is known yet; {waits}"
    return f"AUC {found['auc']:.3f}", (
        f"{found['examples']:,.0f} examples, of recent ones {100 * found['left']:.1f} % left, log loss {found['log_loss']:.3f}; "
        f"predicted over observed {found['calibration']:.2f}, {100 * found['calibration_error']:.1f} points apart in the mean; {waits}"
    )
