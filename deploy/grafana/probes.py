"""What a probe user sees: a click sent on its way, until an answer shows it."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelKind, PanelQuery, both

NO_PROBE = "`springtide probe --continuously` does not run"

PROBES = (
    Panel(
        "From click to answer",
        tuple(
            PanelQuery(query.expr, query.legend, empty=NO_PROBE)
            for query in (
                *both("springtide_probe_feature_seconds", name="features"),
                *both("springtide_probe_weight_seconds", name="weights"),
            )
        ),
        "s",
        "From sending a probe user's click until an answer's features show it, and until its version has learned from it.",
        "features well below a second, weights below one.",
        "features alone: the stream or serving's histories. Weights alone: the trainer or its versions.",
        "a-probe-does-not-come-through",
        goal=1,
        alarm=5,
        alerts=("SpringtideProbeSlow",),
        width=12,
    ),
    Panel(
        "Probes that fail",
        (PanelQuery("sum by (reason) (increase(springtide_probe_failures_total[10m]))", "{{reason}}", empty=NO_PROBE),),
        "none",
        "Probes in ten minutes that did not come through, by reason.",
        "none.",
        "kafka: the click could not be sent. answers: nobody answers. features, weights: not in time, see their graph.",
        "a-probe-does-not-come-through",
        alarm=3,
        alerts=("SpringtideProbeFails",),
        width=8,
    ),
    Panel(
        "Last probe that came through",
        (PanelQuery("max(springtide_probe_last_success_timestamp_seconds) * 1000", "through", empty=NO_PROBE),),
        "dateTimeFromNow",
        "When a probe user's click last came all the way.",
        "moments ago.",
        "long ago: see which of the other panels shows the break.",
        "a-probe-does-not-come-through",
        kind=PanelKind.STAT,
        width=4,
    ),
)
