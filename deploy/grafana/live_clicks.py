"""Live clicks against the baseline, as the validation holds them."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelKind, PanelQuery, rate

NOT_YET = "no window has ended yet, or the validation does not run"

VALIDATION = (
    Panel(
        "Distance from the baseline",
        (
            PanelQuery(
                'max by (feature) (springtide_validation_distance_ratio{against="baseline"})',
                "{{feature}}",
                empty=NOT_YET,
            ),
        ),
        "none",
        "L-infinity distance of a categorical feature, Jensen-Shannon divergence of a numeric one; the newest window.",
        "each around its own level, below its threshold in the schema.",
        "`springtide schema diff` names what differs most; if it stays so, `springtide schema accept`.",
        "live-clicks-have-changed",
        alerts=("SpringtideDrift",),
    ),
    Panel(
        "Distance from the window before",
        (
            PanelQuery(
                'max by (feature) (springtide_validation_distance_ratio{against="previous"})',
                "{{feature}}",
                empty=NOT_YET,
            ),
        ),
        "none",
        "The same, against the window before: what has changed at once.",
        "near 0.",
        "a jump is an event, a bot or a producer that changed: look at the newest clicks.",
        "live-clicks-have-changed",
    ),
    Panel(
        "Missing values",
        (
            PanelQuery(
                "max by (feature) (springtide_validation_missing_ratio) > 0",
                "{{feature}}",
                empty="no value is missing, or no window has ended yet",
            ),
        ),
        "percentunit",
        "Share of a feature's rows without a value; features that miss none are not drawn.",
        "as in the baseline.",
        "a producer changed a field, or attributes do not arrive.",
        "live-clicks-have-changed",
    ),
    Panel(
        "Anomalies",
        (PanelQuery("max by (type) (springtide_validation_anomalies)", "{{type}}", empty=NOT_YET),),
        "none",
        "Features of the newest window that have an anomaly, by type as TensorFlow Data Validation names it.",
        "none, but SCHEMA_NEW_COLUMN.",
        "`springtide schema diff` names the features, with numbers.",
        "live-clicks-have-changed",
        alerts=("SpringtideDataAnomaly",),
    ),
    Panel(
        "Rows looked at",
        (
            PanelQuery(rate("springtide_validation_rows_total"), "rows", empty=NOT_YET),
            PanelQuery("max(springtide_validation_lag_records)", "records that wait", empty=NOT_YET),
        ),
        "short",
        "Rows a second that the validation looks at, and positions of the training log that it has not looked at.",
        "some rows, and few that wait.",
        "none: the validation is away; read its log.",
        "a-part-cannot-run",
    ),
    Panel(
        "Windows by outcome",
        (
            PanelQuery(
                "sum by (outcome) (increase(springtide_validation_windows_total[1d]))", "{{outcome}}", empty=NOT_YET
            ),
        ),
        "none",
        "Windows of the last day, by what was said of them.",
        "judged.",
        "few_rows: too few clicks to say anything. no_baseline: it comes from the bootstrap.",
        "live-clicks-have-changed",
        kind=PanelKind.STAT,
    ),
)
