"""Sets the applier's metrics about control and about the age of the data that answers use (see `state/metrics.py`)."""

from __future__ import annotations

from state.metrics import ApplierMetrics
from state.registry.control import Control
from state.rows.reader import Served


def show_control(control: Control, metrics: ApplierMetrics) -> None:
    """Sets the gauges for control's settings of serving."""
    metrics.control_generation.set(control.generation)
    metrics.pinned.set(control.serving.mode == "pin")
    metrics.masks.set(len(control.masks))


def show_ages(served: Served | None, newest_ms: int, now_ms: int, metrics: ApplierMetrics) -> None:
    """Records the age of the version and of the histories.

    Args:
        served: The served version; None while there is none.
        newest_ms: Time of the newest click in the histories; 0 while there is none.
        now_ms: The wall clock.
        metrics: The applier's metrics.
    """
    if served is not None:
        metrics.version_age_seconds.set((now_ms - served.created_at_ms) / 1000)
    if served is not None and served.event_time_ms:
        age_s = (now_ms - served.event_time_ms) / 1000
        metrics.weight_freshness_seconds.set(age_s)
        metrics.weight_age_seconds.observe(age_s, {"version": str(served.version)})
    if newest_ms:
        age_s = (now_ms - newest_ms) / 1000
        metrics.feature_freshness_seconds.set(age_s)
        metrics.feature_age_seconds.observe(age_s)
