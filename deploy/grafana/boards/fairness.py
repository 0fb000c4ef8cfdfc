"""Fairness: are answers as good for each kind of user and item, and how far are the best and the worst apart."""

from __future__ import annotations

from deploy.grafana.panel import Board, Panel, PanelQuery, PanelRow

NO_SLICES = "too few rows were scored yet"
SLICE = "{{attribute}} {{value}}"

SLICES = (
    Panel(
        "AUC by slice",
        (PanelQuery("springtide_trainer_slice_auc", SLICE, empty=NO_SLICES),),
        "percentunit",
        "Engagement, by action, by new and known users and by the values of attributes.slices; scored before learning.",
        "lines close together, each around its own level.",
        "one line that falls alone: look at what arrives from those users or of those items.",
        "quality-falls",
        width=12,
    ),
    Panel(
        "Log loss by slice",
        (PanelQuery("springtide_trainer_slice_log_loss", SLICE, empty=NO_SLICES),),
        "none",
        "Of the user's next category, by the same; scored before learning.",
        "lines close together; who has more to choose from has a higher one, and new users have.",
        "one line that rises alone: look at what arrives from those users or of those items.",
        "quality-falls",
        width=12,
    ),
    Panel(
        "Calibration by slice",
        (PanelQuery("springtide_trainer_slice_calibration_ratio", SLICE, empty=NO_SLICES),),
        "none",
        "Predicted over observed engagement; 1 is right, above 1 promises too much.",
        "around 1, all lines.",
        "one line that leaves the others: their labels come later or not at all, or a producer changed.",
        "quality-falls",
        width=12,
    ),
    Panel(
        "Rows by slice",
        (PanelQuery("springtide_trainer_slice_rows", SLICE, empty=NO_SLICES),),
        "short",
        "Recent rows of each slice: of few, a measure says little.",
        "as your users are.",
        "one that takes over the others: a flood; look at what arrives.",
        "quality-falls",
        width=12,
    ),
)

GAPS = tuple(
    Panel(
        title,
        (PanelQuery(f"max by (attribute, measure) ({metric})", "{{attribute}}, {{measure}}", empty=NO_SLICES),),
        "none",
        says,
        "small, and level.",
        "growing: some are served worse than they were; see which above, then look at what arrives from them.",
        "quality-falls",
        width=12,
    )
    for title, metric, says in (
        (
            "Gap between the best and the worst",
            "springtide_trainer_slice_gap",
            "By how much the worst slice of an attribute is worse than the best, by measure.",
        ),
        (
            "Gap that is sure",
            "springtide_trainer_slice_gap_sure",
            "What is left of it between the ends of their confidence intervals: above 0 it is not chance.",
        ),
    )
)

ERRORS = (
    Panel(
        "Uncertainty of the AUC",
        (PanelQuery("springtide_trainer_slice_auc_error", SLICE, empty=NO_SLICES),),
        "percentunit",
        "Half the width of the 95 % confidence interval of each slice's AUC.",
        "small where rows are many.",
        "wide: do not compare that slice yet.",
        "quality-falls",
        width=12,
    ),
    Panel(
        "Uncertainty of the log loss",
        (PanelQuery("springtide_trainer_slice_log_loss_error", SLICE, empty=NO_SLICES),),
        "none",
        "Half the width of the 95 % confidence interval of each slice's log loss.",
        "small where rows are many.",
        "wide: do not compare that slice yet.",
        "quality-falls",
        width=12,
    ),
)

BOARD = Board(
    "springtide-fairness",
    "Springtide: fairness",
    "Are answers as good for each kind of user and item, and how far are the best and the worst apart?",
    (
        PanelRow("Between the best and the worst", GAPS),
        PanelRow("By slice", SLICES),
        PanelRow("How sure that is", ERRORS),
    ),
)
