"""A rollout: whom the trial answers, and what users do then beside those of the live versions."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelQuery

NONE = "there is no rollout"

ROLLOUT = (
    Panel(
        "Users whom a trial answers",
        (
            PanelQuery("max by (trial) (springtide_rollout_share_ratio)", "{{trial}}", empty=NONE),
            PanelQuery(
                "max by (trial) (springtide_rollout_stopped)", "{{trial}} stopped by its gate", empty=NONE, dashed=True
            ),
        ),
        "percentunit",
        "The share of the users whom a trial answers; dashed: 1 where its gate halted it or took it back.",
        "nothing, or stairs upwards; the dashed line is at 0.",
        "`springtide status` says why the gate stopped it, `springtide trial report NAME` how the arms compare.",
        "a-rollout-was-stopped",
        alerts=("SpringtideRolloutStopped", "SpringtideRolloutUnwatched"),
        width=12,
    ),
    Panel(
        "Engagements an answer of a trial",
        (PanelQuery("max by (trial, end) (springtide_rollout_lift_ratio)", "{{trial}} {{end}}", empty=NONE),),
        "percentunit",
        "By which part they are more than those of the live versions: the mean, and the interval that holds at all looks.",
        "an interval that becomes narrower; all of it above 0 where the trial is better.",
        "below 0: the gate takes it back as soon as the whole interval is.",
        "a-rollout-was-stopped",
        width=12,
    ),
)
