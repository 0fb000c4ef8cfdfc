"""Panels that stand on the overview and on the board of their part as well."""

from __future__ import annotations

from deploy.grafana.panel import RATE_INTERVAL, Panel, PanelKind, PanelQuery, both, rate

FAILED = 'springtide_requests_total{code=~"5..|INTERNAL|UNAVAILABLE"}'
ANSWERS = (
    '{route=~"profile|batch|explain|rank|recommendations|similar|predict|'
    '/springtide.*|/tensorflow.serving.PredictionService/.*"}'
)
"""Routes that a version answers: no scrapes, and no questions of the state of health."""
HELD = {0: ("no", "green"), 1: ("yes", "orange")}

FAILING = Panel(
    "Answers that fail",
    (
        PanelQuery(
            f"(sum(rate({FAILED}[{RATE_INTERVAL}])) or vector(0)) / clamp_min({rate('springtide_requests_total')}, 1e-9)",
            "failed",
        ),
    ),
    "percentunit",
    "Share of all requests that end with 5xx, or with gRPC's INTERNAL or UNAVAILABLE.",
    "0.",
    "ask /readyz what is missing, and read the logs of worker and applier.",
    "answers-fail",
    alarm=0.01,
    alerts=("SpringtideErrors",),
)
REQUESTS = Panel(
    "Requests by code",
    (PanelQuery(rate("springtide_requests_total", "code"), "{{code}}"),),
    "reqps",
    "Answers given, by HTTP status or gRPC code, over all routes.",
    "200 and OK. 429 is refused for load; 4xx is the client's.",
    "5xx: see which route fails, on the board of serving. None at all: see whether clients reach the port.",
    "answers-fail",
)
LATENCY = Panel(
    "Time of an answer",
    both("springtide_request_seconds", only=ANSWERS),
    "s",
    "From a request's arrival to its answer, over all routes that a version answers.",
    "milliseconds.",
    "see on the board of serving which route is slow, then the machine's load; raise serving.workers or add a host.",
    "answers-fail",
)
FEATURES = Panel(
    "Feature freshness",
    (PanelQuery("max(springtide_serving_feature_freshness_seconds)", "features"),),
    "s",
    "Age of the newest click in the histories that answers use; of several hosts the worst.",
    "below a second while clicks arrive. Without clicks it grows, as it should.",
    "the applier does not follow the training log: see its lag below, then its log.",
    "answers-do-not-see-new-clicks",
    kind=PanelKind.STAT,
    goal=1,
    alarm=60,
    alerts=("SpringtideFeaturesStale",),
    width=4,
)
WEIGHTS = Panel(
    "Weight freshness",
    (PanelQuery("max(springtide_serving_weight_freshness_seconds)", "weights"),),
    "s",
    "Age of the newest click trained into the version that answers use; of several hosts the worst.",
    "below a second while clicks arrive. It grows while answers are pinned, and without clicks.",
    "if published versions move and served ones do not, read the applier's log; if neither moves, the trainer's.",
    "no-new-version",
    kind=PanelKind.STAT,
    goal=1,
    alarm=60,
    alerts=("SpringtideWeightsStale",),
    width=4,
)
WAITING = Panel(
    "Clicks that wait",
    (PanelQuery("sum(springtide_stream_lag_events)", "clicks"),),
    "short",
    "Positions of the clicks topic that the stream has not read.",
    "near 0; a few hundred for a moment.",
    "if it grows, more clicks come than are read: see the machine's load, then give the stream a core of its own or a faster machine.",
    "clicks-wait",
    kind=PanelKind.STAT,
    alarm=10_000,
    alerts=("SpringtideLagGrowing",),
    width=4,
)
LAG = Panel(
    "What waits, in offsets",
    (
        PanelQuery("sum(springtide_stream_lag_events)", "clicks, for the stream"),
        PanelQuery("max(springtide_trainer_lag_records)", "training log, for the trainer"),
        PanelQuery("max(springtide_serving_microbatch_lag_records)", "training log, for serving"),
    ),
    "short",
    "Positions not yet read, each in its own log; of several hosts the worst.",
    "near 0, all of them. After a rollback the trainer reads its log again, and its line falls.",
    "the first line that grows names the part that is slow or away.",
    "clicks-wait",
)
AGES = Panel(
    "How old what is known is",
    (
        PanelQuery("max(springtide_stream_lag_seconds)", "the stream's newest click"),
        PanelQuery("max(springtide_serving_feature_freshness_seconds)", "features of answers"),
        PanelQuery("max(springtide_serving_weight_freshness_seconds)", "weights of answers"),
    ),
    "s",
    "Seconds since the newest click that the stream, the histories and the weights know.",
    "below a second while clicks arrive.",
    "the stream's line first: the others cannot be newer. Then that of features, then that of weights.",
    "answers-do-not-see-new-clicks",
    goal=1,
    alarm=60,
    alerts=("SpringtideFeaturesStale",),
)
FAULTS = Panel(
    "Accounts that do not balance",
    (PanelQuery("sum(springtide_accounting_stream_faults) + sum(springtide_accounting_trainer_faults)", "faults"),),
    "none",
    "Accounts of stream and trainer in which a click is missing or counted twice.",
    "0, always.",
    "`springtide status` says which one and by how many. Answers are not worse for it; keep logs and state.",
    "an-account-is-wrong",
    kind=PanelKind.STAT,
    alarm=1,
    alerts=("SpringtideAccountWrong",),
    width=4,
)
HOLDS = Panel(
    "Pinned, paused, held",
    (
        PanelQuery("max(springtide_serving_pinned)", "answers pinned"),
        PanelQuery("max(springtide_trainer_paused)", "training paused"),
        PanelQuery("max(springtide_trainer_publishing_held)", "publishing held"),
        PanelQuery("max(springtide_trainer_withheld)", "versions wait for the guard"),
        PanelQuery("max(springtide_trainer_held)", "guard holds training"),
    ),
    "none",
    "What an operator holds, and what the guard holds.",
    "no, in all lines.",
    "`springtide history` names who and why. The opposite commands: follow, resume, release. For the guard see the trainer's log first.",
    "an-operator-holds-something",
    kind=PanelKind.STATES,
    states=HELD,
    alerts=("SpringtideHeldByOperator", "SpringtidePinned", "SpringtideTrainingHeld"),
)
VERSIONS = Panel(
    "Versions",
    (
        PanelQuery("max(springtide_trainer_version)", "published"),
        PanelQuery("max(springtide_trainer_durable_version)", "durable"),
        PanelQuery("max(springtide_serving_version)", "answers, newest host"),
        PanelQuery("min(springtide_serving_version)", "answers, oldest host"),
    ),
    "none",
    "Numbers of the newest version published, of the newest durable one, and of those that answer.",
    "all lines rise together. A rollback turns the answers' line back, a pin keeps it level.",
    "a level line of published ones is the trainer's, of answers without a pin the applier's.",
    "no-new-version",
    alerts=("SpringtideNoNewVersion",),
)
DEATHS = Panel(
    "Deaths of parts",
    (
        PanelQuery(
            f"sum by (part) (increase(springtide_up_deaths_total[{RATE_INTERVAL}]))",
            "{{part}}",
            empty="no part has died, or parts run without `springtide up`",
        ),
        PanelQuery(
            "springtide_up_deaths_in_a_row",
            "{{part}}, in a row",
            empty="no part has died, or parts run without `springtide up`",
        ),
    ),
    "none",
    "Parts that ended though nobody asked for it, and how often in a row.",
    "none. One death is repaired by itself; the next start comes after 30 s at the latest.",
    "read the last line of the part's log: it says what happened and what to type.",
    "a-part-cannot-run",
    alarm=3,
    alerts=("SpringtidePartDying",),
)
LOG_LOSS = Panel(
    "Log loss of the interests",
    (PanelQuery("max(springtide_trainer_log_loss)", "log loss"),),
    "none",
    "Of the user's next category, over the candidates that serving has; scored before learning: lower is better.",
    "moves slowly around its own level.",
    "a jump is a change of what arrives: look at the newest clicks; if they are poison, turn back.",
    "quality-falls",
    alerts=("SpringtideQualityFalling",),
)
AUC = Panel(
    "AUC of the engagement",
    (PanelQuery("max(springtide_trainer_auc)", "AUC"),),
    "percentunit",
    "How often an engaged row is ranked above one that was not, scored before learning; 50 % is chance.",
    "well above 50 %, around its own level.",
    "falling to 50 %: labels mean something else than before; look at what arrives.",
    "quality-falls",
    falling=True,
    alarm=0.5,
)
TOP = Panel(
    "Top 1",
    (PanelQuery("max(springtide_trainer_top1_ratio)", "the category led"),),
    "percentunit",
    "Share of rows whose category was the first of the answer, scored before learning.",
    "moves slowly around its own level.",
    "see log loss beside it.",
    "quality-falls",
)
DEAD_SHARE = (
    f"(sum(rate(springtide_stream_dead_letters_total[{RATE_INTERVAL}])) or vector(0))"
    f" / clamp_min({rate('springtide_stream_events_total')}, 1e-9)"
)
