"""Serving: are answers given, how fast, by which version, and how fresh is what they know."""

from __future__ import annotations

from deploy.grafana import headlines, histories, registry_place
from deploy.grafana.panel import RATE_INTERVAL, Board, Panel, PanelKind, PanelQuery, PanelRow, both, quantile, rate

ANSWERS = (
    Panel(
        "Requests by route",
        (PanelQuery(rate("springtide_requests_total", "route"), "{{route}}"),),
        "reqps",
        "Requests a second, by route, HTTP and gRPC.",
        "what your clients ask for; scrapes and health checks are among them.",
        "a route that stops while others go on: its clients are gone or refused.",
        "answers-fail",
    ),
    Panel(
        "Failures by route",
        (
            PanelQuery(
                f"sum by (route) (rate({headlines.FAILED}[{RATE_INTERVAL}]))"
                f" / clamp_min({rate('springtide_requests_total', 'route')}, 1e-9)",
                "{{route}}",
                empty="no request has failed",
            ),
        ),
        "percentunit",
        "Share of a route's requests that end with 5xx, or with gRPC's INTERNAL or UNAVAILABLE.",
        "none.",
        "ask /readyz what is missing, and read the worker's log.",
        "answers-fail",
        alarm=0.01,
        alerts=("SpringtideErrors",),
    ),
    Panel(
        "Slow answers by route",
        (PanelQuery(quantile(0.99, "springtide_request_seconds", "route"), "{{route}}"),),
        "s",
        "The slowest of a hundred, by route.",
        "milliseconds; recommendations some tens of them.",
        "see the machine's load; raise serving.workers or add a host.",
        "answers-fail",
    ),
    headlines.REQUESTS,
    headlines.FAILING,
    headlines.LATENCY,
    Panel(
        "Answers for unknown users",
        (PanelQuery(rate("springtide_cold_starts_total"), "cold starts"),),
        "cps",
        "Answers a second for users without a history.",
        "few beside all answers, unless many users are new.",
        "nearly all of them: histories are empty (see users below) or the salt is another one.",
        "the-salt-is-lost",
    ),
    Panel(
        "Connections refused",
        (
            PanelQuery(
                rate("springtide_connections_refused_total", "reason"), "{{reason}}", empty="no connection was refused"
            ),
        ),
        "cps",
        "Connections a second ended before a request was one, by reason.",
        "none.",
        "`connections`: more clients than serving.max_connections; the others are a client that is broken or hostile.",
        "answers-fail",
    ),
    Panel(
        "Starts of workers",
        (PanelQuery(f"sum(increase(springtide_worker_starts_total[{RATE_INTERVAL}]))", "starts"),),
        "none",
        "Workers that began to answer.",
        "none, but at a start.",
        "`serving worker N ended` in the worker's log says how the one before ended.",
        "answers-fail",
    ),
)

VERSION = (
    Panel(
        "Version by host",
        (PanelQuery("springtide_serving_version", "{{instance}}"),),
        "none",
        "The version that each host answers with.",
        "all the same, within some versions, and rising.",
        "one host behind: read its applier's log. All level: pinned, or nothing is published.",
        "no-new-version",
    ),
    Panel(
        "Versions behind",
        (
            PanelQuery(
                "max(springtide_trainer_version) - min(springtide_serving_version)", "the oldest host, of the newest"
            ),
        ),
        "short",
        "How many versions the host that is furthest behind has still to apply.",
        "a few. It grows while answers are pinned.",
        "if nothing is pinned, see the time to apply below and the applier's log.",
        "no-new-version",
        alarm=300,
        alerts=("SpringtideVersionBehind",),
    ),
    headlines.HOLDS,
    Panel(
        "Time to apply a version",
        both("springtide_serving_apply_seconds"),
        "s",
        "Until a version's rows are where answers read them.",
        "some milliseconds.",
        "rows lie on the disk (see their place), or the machine is loaded.",
        "no-new-version",
    ),
    Panel(
        "Place of the rows",
        (PanelQuery("sum by (instance, place) (springtide_serving_rows_bytes)", "{{instance}}, {{place}}"),),
        "bytes",
        "What the rows that answers read take, in memory or on the disk.",
        "in memory.",
        "on the disk: memory is full. Answers go on, more slowly.",
        "the-disk-is-full",
    ),
    Panel(
        "Versions refused",
        (
            PanelQuery(f"sum(increase(springtide_serving_corrupt_versions_total[{RATE_INTERVAL}]))", "digest fails"),
            PanelQuery(f"sum(increase(springtide_serving_failed_probes_total[{RATE_INTERVAL}]))", "answers otherwise"),
        ),
        "none",
        "Versions that a host did not take, because a file fails its digest or because it answers otherwise than its trainer did.",
        "none.",
        "answers stay at the last good version; the applier's log names file or difference.",
        "a-version-is-refused",
        alarm=1,
        alerts=("SpringtideVersionRefused", "SpringtideCorruptVersion"),
    ),
    Panel(
        "Epoch by host",
        (PanelQuery("springtide_serving_epoch", "{{instance}}"),),
        "none",
        "The epoch of the version that each host answers with.",
        "all the same; one more after a rollback.",
        "a host that stays behind has not seen the rollback: read its applier's log.",
        "turn-back-fast",
        kind=PanelKind.STAT,
        width=4,
    ),
    Panel(
        "Control generation by host",
        (PanelQuery("springtide_serving_control_generation", "{{instance}}"),),
        "none",
        "The newest command of operators that each host has seen.",
        "all the same.",
        "a host that stays behind does not see the registry: look after its disk or mount.",
        "an-operator-holds-something",
        kind=PanelKind.STAT,
        width=4,
    ),
    Panel(
        "Epoch of the histories",
        (PanelQuery("springtide_serving_history_epoch", "{{instance}}"),),
        "none",
        "The epoch of the training log whose records the histories of each host take.",
        "all the same.",
        "a host that stays behind does not follow the log: read its applier's log.",
        "answers-do-not-see-new-clicks",
        kind=PanelKind.STAT,
        width=4,
    ),
    Panel(
        "Age of the version",
        (PanelQuery("max(springtide_serving_version_age_seconds)", "age"),),
        "s",
        "Time since the version that answers use was made; of several hosts the worst.",
        "a second or so. It grows while answers are pinned, and without clicks.",
        "see versions behind: if none are, the trainer publishes nothing.",
        "no-new-version",
        kind=PanelKind.STAT,
        goal=60,
        width=4,
    ),
    Panel(
        "Masks",
        (
            PanelQuery("max(springtide_serving_masks)", "answers"),
            PanelQuery("max(springtide_trainer_masks)", "training"),
        ),
        "none",
        "Masks of clicks that answers and training leave out, as each has seen control.",
        "both the same.",
        "`springtide masks` lists them, with who set them and why; `springtide unmask N` lifts one.",
        "a-mask-was-wrong",
        kind=PanelKind.STAT,
        width=4,
    ),
    Panel(
        "Version refused by its probe",
        (PanelQuery("max(springtide_serving_refused_version)", "version"),),
        "none",
        "The newest version that failed its probe and is newer than the one that answers; 0 for none.",
        "0.",
        "compare the packages of this host with the trainer's, and look after its memory and processor.",
        "a-version-is-refused",
        kind=PanelKind.STAT,
        alarm=1,
        width=4,
    ),
)

FRESH = (
    headlines.AGES,
    Panel(
        "Freshness of answers",
        (
            *both("springtide_serving_feature_age_seconds", name="features"),
            *both("springtide_serving_weight_age_seconds", name="weights"),
        ),
        "s",
        "How old the newest click known was, sampled ten times a second.",
        "both medians well below a second.",
        "see which line rose, then the lag on the overview.",
        "answers-do-not-see-new-clicks",
        goal=1,
    ),
    Panel(
        "Within a second",
        tuple(
            PanelQuery(
                f'sum(rate(springtide_serving_{name}_age_seconds_bucket{{le="1.0"}}[{RATE_INTERVAL}]))'
                f" / {rate(f'springtide_serving_{name}_age_seconds_count')}",
                f"{name}s",
            )
            for name in ("feature", "weight")
        ),
        "percentunit",
        "Share of the samples in which the newest click known was at most a second old.",
        "near 100 % while clicks arrive.",
        "see the graph beside it.",
        "answers-do-not-see-new-clicks",
    ),
)

PARITY = (
    Panel(
        "Rows computed again",
        (PanelQuery(rate("springtide_serving_parity_rows_total", "outcome"), "{{outcome}}"),),
        "cps",
        "Sampled rows of the training log a second, computed again from serving's histories.",
        "equal; unknown after a start in the middle of the log.",
        "none: clicks do not reach serving, or serving.parity_every_s is 0.",
        "answers-and-training-see-different-features",
        width=12,
    ),
    Panel(
        "Rows that differ",
        (
            PanelQuery(
                'sum(increase(springtide_serving_parity_rows_total{outcome="differs"}[10m]))',
                "in ten minutes",
                empty="no row has differed",
            ),
        ),
        "none",
        "Rows in ten minutes that were trained with other features than answers have.",
        "none.",
        "the applier's log names record, click and the first number; compare the releases of both hosts.",
        "answers-and-training-see-different-features",
        alarm=1,
        alerts=("SpringtideParityBroken",),
        width=12,
    ),
)

BOARD = Board(
    "springtide-serving",
    "Springtide: serving",
    "Are answers given, how fast, by which version, and how fresh is what they know?",
    (
        PanelRow("Answers", ANSWERS),
        PanelRow("Version", VERSION),
        PanelRow("Freshness", FRESH),
        PanelRow("Shared registry", registry_place.SHARED),
        PanelRow("Histories", histories.SERVING),
        PanelRow("Training and answers agree", PARITY),
    ),
)
