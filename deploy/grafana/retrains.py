"""Scheduled retrains: what became of them."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelQuery

NONE = "retrain.every is not set"

RETRAINS = (
    Panel(
        "Scheduled retrain",
        (
            PanelQuery("max by (outcome) (springtide_retrain_outcome)", "{{outcome}}", empty=NONE),
            PanelQuery("max(springtide_retrain_under_way)", "under way", empty=NONE, dashed=True),
        ),
        "short",
        "What became of the newest one: 1 of promoted, dropped or failed; dashed: 1 while one is under way.",
        "promoted or dropped; both are right.",
        "failed: `springtide status` says why. Answers go on with the live model.",
        "a-retrain-fails",
        alerts=("SpringtideRetrainFailed", "SpringtideRetrainOverdue"),
        width=24,
    ),
)
