"""Quality: how good are the answers, now and before, and are they better than what is simple."""

from __future__ import annotations

from deploy.grafana import headlines, live_clicks, retrains, rollouts, segments
from deploy.grafana.panel import Board, Panel, PanelQuery, PanelRow, rate

FEW = "too few rows were scored yet"

AGAINST = (
    Panel(
        "Lift of top 1",
        (PanelQuery("max(springtide_trainer_lift_top1_ratio)", "lift"),),
        "percentunit",
        "Share of rows whose category was the first of the answer, less that of the best of what is simple.",
        "above 0, around its own level.",
        "below 0 the most popular, the previous or the next category answers better: look at what arrives.",
        "quality-falls",
        alerts=("SpringtideModelWorseThanSimple",),
        falling=True,
        alarm=0,
        width=6,
    ),
    Panel(
        "Lift of log loss",
        (PanelQuery("max(springtide_trainer_lift_log_loss)", "lift"),),
        "none",
        "Log loss of the best of what is simple, less that of the model.",
        "above 0, around its own level.",
        "below 0 the model is worse than what is simple: look at what arrives; if it is poison, turn back.",
        "quality-falls",
        falling=True,
        alarm=0,
        width=6,
    ),
    Panel(
        "Top 1, by predictor",
        (PanelQuery('max by (predictor) (springtide_trainer_quality_top1_ratio{users="all"})', "{{predictor}}"),),
        "percentunit",
        "Of the model, of what was popular in the last hour, of the user's previous category, of what came next after it.",
        "the model above the others.",
        "see which of the simple ones passed it: what is popular rises in a flood.",
        "quality-falls",
        width=6,
    ),
    Panel(
        "Log loss, by predictor",
        (PanelQuery('max by (predictor) (springtide_trainer_quality_log_loss{users="all"})', "{{predictor}}"),),
        "none",
        "Of the same, over the same candidates, a miss counted as a miss: they can be compared.",
        "the model below the others.",
        "all rise: what arrives is harder to guess. The model alone: it learned what is wrong.",
        "quality-falls",
        width=6,
    ),
)

USERS = (
    Panel(
        "Log loss, by users",
        (
            PanelQuery(
                'max by (users) (springtide_trainer_quality_log_loss{predictor="model", users!="all"})',
                "{{users}}",
                empty=FEW,
            ),
        ),
        "none",
        "Of the model, of users whom it knows and of new ones.",
        "known below new.",
        "known alone rises: their histories may be lost, see the users on the board of serving.",
        "quality-falls",
    ),
    Panel(
        "Top 1 and top 5, by users",
        (
            PanelQuery(
                'max by (users) (springtide_trainer_quality_top1_ratio{predictor="model"})',
                "top 1, {{users}}",
                empty=FEW,
            ),
            PanelQuery(
                'max by (users) (springtide_trainer_quality_top5_ratio{predictor="model"})',
                "top 5, {{users}}",
                empty=FEW,
            ),
        ),
        "percentunit",
        "Share of rows whose category was the first, or among the first five, of the answer.",
        "known above new.",
        "see log loss beside it.",
        "quality-falls",
    ),
    Panel(
        "Rank and misses",
        (
            PanelQuery(
                'max by (users) (springtide_trainer_quality_reciprocal_rank{predictor="model"})',
                "1 / rank, {{users}}",
                empty=FEW,
            ),
            PanelQuery(
                'max by (users) (springtide_trainer_quality_missed_ratio{predictor="model"})',
                "missed, {{users}}",
                empty=FEW,
            ),
        ),
        "percentunit",
        "Mean of 1 / rank of the category among the candidates, and the share of rows in which it was none of them.",
        "both around their own levels.",
        "misses rise: categories are new, or renamed by a producer.",
        "quality-falls",
    ),
)

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
    "How good are the answers, now and before, and are they better than what is simple?",
    (
        PanelRow("Scored before learning", (headlines.LOG_LOSS, headlines.AUC, headlines.TOP)),
        PanelRow("Against what is simple", AGAINST),
        PanelRow("Known and new users", USERS),
        PanelRow("Live clicks against the baseline", live_clicks.VALIDATION),
        PanelRow("A trial among users", rollouts.ROLLOUT),
        PanelRow("Models learned anew", retrains.RETRAINS),
        PanelRow("Segments", segments.SEGMENTS),
        PanelRow("What is learned from", LEARNED),
    ),
)
