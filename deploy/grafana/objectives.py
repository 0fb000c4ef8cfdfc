"""How fast each objective's error budget is used, as `deploy/prometheus/rules/objectives.yml` records it."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelQuery

WINDOWS = ("1h", "6h", "3d")


def burn(title: str, ratio: str, budget: float, objective: str, otherwise: str, runbook: str, alert: str) -> Panel:
    """The burn rates of one objective over the windows of its alerts.

    Args:
        title: Of the panel.
        ratio: What is recorded, up to its window.
        budget: The share that may be bad.
        objective: In words.
        otherwise: What to do.
        runbook: Anchor of the section.
        alert: The name of the alerts, up to their window.
    """
    return Panel(
        title,
        tuple(
            PanelQuery(f"max({ratio}{window}) / {budget:g}", f"over {window}", empty="nothing was asked lately")
            for window in WINDOWS
        ),
        "none",
        f"{objective} At 1 the budget of 30 days lasts 30 days. Alerts come at 14.4 over 1 h, 6 over 6 h, 1 over 3 d.",
        "below 1, all of them.",
        otherwise,
        runbook,
        goal=1,
        alarm=14.4,
        alerts=tuple(f"{alert}{window}" for window in WINDOWS),
    )


OBJECTIVES = (
    burn(
        "Budget of availability",
        "job:springtide_requests_failed:ratio",
        0.001,
        "Of the answers 99.9 % do not fail.",
        "ask /readyz what is missing, and read the worker's log.",
        "answers-fail",
        "SpringtideAvailabilityBurn",
    ),
    burn(
        "Budget of latency",
        "job:springtide_request_seconds_above_50ms:ratio",
        0.01,
        "Of the answers to one user 99 % come within 50 ms.",
        "see what takes the machine's time; more workers (serving.workers) or another host answer more at once.",
        "answers-are-slow",
        "SpringtideLatencyBurn",
    ),
    burn(
        "Budget of weight freshness",
        "job:springtide_serving_weight_freshness_seconds_above_5s:ratio",
        0.01,
        "For 99 % of the time answers use weights that have learned a click of the last 5 s.",
        "if published versions move and served ones do not, read the applier's log; if neither moves, the trainer's.",
        "no-new-version",
        "SpringtideFreshnessBurn",
    ),
)
