"""Fairness: are answers as good for each kind of user and item, and how far are the best and the worst apart."""

from __future__ import annotations

from deploy.grafana.panel import Board, Panel, PanelQuery, PanelRow

NO_SLICES = "no attribute is measured by (attributes.slices)"
ENOUGH_ROWS = 200
"""A value with fewer recent rows says nothing of the gap."""


def gap(measure: str) -> str:
    """Between the best and the worst value of each attribute, of those with enough rows.

    Args:
        measure: A gauge by attribute and value.
    """
    told = f"({measure} and springtide_trainer_slice_rows >= {ENOUGH_ROWS})"
    return f"max by (attribute) {told} - min by (attribute) {told}"


SLICES = (
    Panel(
        "AUC by attribute",
        (PanelQuery("springtide_trainer_slice_auc", "{{attribute}} {{value}}", empty=NO_SLICES),),
        "percentunit",
        "Engagement, by the value of an attribute of attributes.slices; scored before learning.",
        "lines close together, each around its own level.",
        "one line that falls alone: look at what arrives from those users or of those items.",
        "turn-back-fast",
        width=12,
    ),
    Panel(
        "Log loss by attribute",
        (PanelQuery("springtide_trainer_slice_log_loss", "{{attribute}} {{value}}", empty=NO_SLICES),),
        "none",
        "Interests, by the value of an attribute of attributes.slices; scored before learning.",
        "lines close together; who has more to choose from has a higher one.",
        "one line that rises alone: look at what arrives from those users or of those items.",
        "turn-back-fast",
        width=12,
    ),
)

GAPS = (
    Panel(
        "Gap in AUC",
        (
            PanelQuery(
                gap("springtide_trainer_slice_auc"), "{{attribute}}", empty=f"{NO_SLICES}, or rows are still few"
            ),
        ),
        "percentunit",
        f"Between the best and the worst value of each attribute, of those with {ENOUGH_ROWS} recent rows.",
        "small, and level.",
        "growing: some are served worse than they were; see which above.",
        "turn-back-fast",
    ),
    Panel(
        "Gap in log loss",
        (
            PanelQuery(
                gap("springtide_trainer_slice_log_loss"), "{{attribute}}", empty=f"{NO_SLICES}, or rows are still few"
            ),
        ),
        "none",
        f"Between the best and the worst value of each attribute, of those with {ENOUGH_ROWS} recent rows.",
        "small, and level.",
        "growing: some are served worse than they were; see which above.",
        "turn-back-fast",
    ),
    Panel(
        "Rows by attribute",
        (PanelQuery("springtide_trainer_slice_rows", "{{attribute}} {{value}}", empty=NO_SLICES),),
        "short",
        "Recent rows of each value: of few, a measure says little.",
        "as your users are.",
        "one that takes over the others: a flood; look at what arrives.",
        "turn-back-fast",
    ),
)

BOARD = Board(
    "springtide-fairness",
    "Springtide: fairness",
    "Are answers as good for each kind of user and item, and how far are the best and the worst apart?",
    (PanelRow("By attribute", SLICES), PanelRow("Between the best and the worst", GAPS)),
)
