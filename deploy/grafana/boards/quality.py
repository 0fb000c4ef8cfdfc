"""Quality: how good are the answers, now and before."""

from __future__ import annotations

from deploy.grafana import headlines
from deploy.grafana.panel import Board, Panel, PanelQuery, PanelRow, rate

LEARNED = (
    Panel(
        "Rows that are learned from",
        (PanelQuery(rate("springtide_trainer_rows_total", "outcome"), "{{outcome}}"),),
        "cps",
        "Rows of the training log a second, by what the trainer did with them.",
        "trained.",
        "skipped: the guard refused whole steps. masked: an operator left clicks out.",
        "training-is-held",
        width=12,
    ),
    Panel(
        "Verdicts of the guard",
        (PanelQuery(rate("springtide_trainer_guard_total", "verdict"), "{{verdict}}"),),
        "cps",
        "Steps a second, by what the guard said of them.",
        "accept.",
        "the trainer's log has offset and loss of what was skipped.",
        "training-is-held",
        width=12,
    ),
)

BOARD = Board(
    "springtide-quality",
    "Springtide: quality",
    "How good are the answers, now and before?",
    (
        PanelRow("Scored before learning", (headlines.LOG_LOSS, headlines.AUC, headlines.TOP)),
        PanelRow("What is learned from", LEARNED),
    ),
)
