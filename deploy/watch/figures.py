"""Computes the figures of the running loop from the metrics that its processes serve on /metrics.

Rates cover the last `RATE_S` seconds. Quantiles cover the last minute, or, for a single poll, the time since each
process started. Both compare with an earlier poll of the same process; a process that has restarted since then
counts as another one.

The metrics of `springtide up` add which processes keep dying and whether synthetic shoppers run.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.watch import progress
from deploy.watch.budget import BudgetLeft, budget_of
from deploy.watch.clocks_off import ClocksOff, clocks_off
from deploy.watch.quantiles import Buckets, Spread, between, spread
from deploy.watch.scrape import UP, Scrape
from deploy.watch.storage import full
from state.metrics import ANSWERING_ROUTES

OFTEN = 2
AWAY = Scrape()
RATE_S = 5.0
SPREAD_S = 60.0
SLACK_S = 0.5
Labels = Mapping[str, Collection[str]]
ANSWERS: Labels = {"route": tuple(one for one in ANSWERING_ROUTES if one != "explain")}
FAILED = (
    *("429", "INTERNAL", "UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"),
    *map(str, range(500, 600)),
)
"""The codes of failed answers; the recording rule job:springtide_requests_failed:rate5m counts the same ones."""

# The gauge of each process that changes when it restarts.
BORN = {
    "stream": "springtide_stream_began_seconds",
    "trainer": "springtide_trainer_began_seconds",
    "applier": "springtide_serving_began_seconds",
    "worker": "springtide_worker_began_seconds",
}

# Name of a quantile -> process, histogram, and the labels that count.
SPREADS: Mapping[str, tuple[str, str, Labels]] = {
    "features": ("applier", "springtide_serving_feature_age_seconds", {}),
    "weights": ("applier", "springtide_serving_weight_age_seconds", {}),
    "commit": ("stream", "springtide_stream_commit_seconds", {}),
    "step": ("trainer", "springtide_trainer_step_seconds", {}),
    "publication": ("trainer", "springtide_trainer_publish_seconds", {}),
    "answer": ("worker", "springtide_request_seconds", ANSWERS),
}


def dying(up: Scrape) -> dict[str, float]:
    r"""The processes that keep dying, and how often in a row they did, the worst first.

    >>> from deploy.watch.scrape import parsed
    >>> series = "springtide_up_deaths_in_a_row"
    >>> dying(Scrape(parsed(f'{series}{{part="trainer"}} 3\n{series}{{part="stream"}} 0\n{series}{{part="applier"}} 1')))
    {'trainer': 3.0}
    """
    found = up.by("springtide_up_deaths_in_a_row", "part")
    often = {part: count for part, count in found.items() if count >= OFTEN}
    return dict(sorted(often.items(), key=lambda one: -one[1]))


def runs_shoppers(up: Scrape) -> bool:
    r"""Whether `springtide up` runs synthetic shoppers.

    >>> from deploy.watch.scrape import parsed
    >>> runs_shoppers(Scrape(parsed('springtide_up_starts_total{part="shoppers"} 1'))), runs_shoppers(Scrape())
    (True, False)
    """
    return "shoppers" in up.by("springtide_up_starts_total", "part")


@dataclass(frozen=True)
class Figures:
    """The figures of the loop at one moment; None for unknown ones.

    Attributes:
        up_s: Process -> seconds since it started, of those that answer.
        away: Process -> why it does not answer.
        up: The state of `springtide up`: `starting` its processes, or `running`; empty if it does not answer.
        starting: Process that answers and does not work yet -> its phase, in words.
        behind: Process that stands still or falls behind -> the work that waits for it, in words.
        kafka_away: Whether no broker answers, as far as known.
        events: Positions of the clicks topic read since the stream's start.
        events_per_s: Their rate.
        lag_events: Positions of the clicks topic not yet read.
        lag_s: Wall time since the newest click read was appended to Kafka; 0 if none waits.
        dead: Reason -> dead letters since the stream's start.
        dead_per_s: Their rate.
        microbatches_per_s: Micro-batches written.
        microbatch_rows: Rows of one, on average.
        steps_per_s: Training steps.
        rows_per_s: Rows of the training log read, with any outcome.
        trainer_lag: Positions of the training log the trainer has not read.
        log_loss: Of the interests, scored before learning.
        auc: Of the engagement, scored before learning.
        top1: Share of rows whose category led, scored before learning.
        skipped_per_s: Rows of the training log that the guard skipped.
        held: Whether the guard holds training.
        budget: The privacy budget; None if none is set.
        paused: Whether an operator pauses training.
        publishing_held: Whether an operator holds the publishing of versions.
        version: Version that serving uses.
        epoch: Its epoch.
        newest_version: The trainer's newest.
        pinned: Whether an operator pins the version.
        serving_lag: Positions of the training log not in serving's histories.
        features_s: Age of the newest click in the histories that serving uses.
        weights_s: Age of the newest click trained into the version that serving uses.
        answers_per_s: Requests for profiles.
        answers: Their number since the worker's start.
        failed: Those of them that failed, or were refused because a worker had too many (429).
        failed_per_s: Their rate.
        cold_starts: Answers for unknown users.
        faults: Accounts that do not balance.
        corrupt: Versions that serving refused for their digests.
        differing: Sampled rows that were trained with other features than serving computes.
        refused: The newest version that failed its probe, if it is newer than the served one.
        full: What waits for disk space, and which data takes almost all of a share, in words.
        dying: Process that does not answer -> how often in a row it died, of those that `springtide up` restarts.
        shoppers: Whether `springtide up` runs synthetic shoppers.
        clocks_off: Direction -> the clicks whose clock is off.
        spreads: Name -> quantiles, in seconds.
        spread_s: The quantiles cover this many last seconds; None: since each process's start.
    """

    up_s: Mapping[str, float] = field(default_factory=dict)
    away: Mapping[str, str] = field(default_factory=dict)
    up: str = ""
    starting: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    kafka_away: bool = False
    events: float | None = None
    events_per_s: float | None = None
    lag_events: float | None = None
    lag_s: float | None = None
    dead: Mapping[str, float] = field(default_factory=dict)
    dead_per_s: float | None = None
    microbatches_per_s: float | None = None
    microbatch_rows: float | None = None
    steps_per_s: float | None = None
    rows_per_s: float | None = None
    trainer_lag: float | None = None
    log_loss: float | None = None
    auc: float | None = None
    top1: float | None = None
    skipped_per_s: float | None = None
    held: bool = False
    budget: BudgetLeft | None = None
    paused: bool = False
    publishing_held: bool = False
    version: float | None = None
    epoch: float | None = None
    newest_version: float | None = None
    pinned: bool = False
    serving_lag: float | None = None
    features_s: float | None = None
    weights_s: float | None = None
    answers_per_s: float | None = None
    answers: float | None = None
    failed: float | None = None
    failed_per_s: float | None = None
    cold_starts: float | None = None
    faults: float = 0.0
    corrupt: float = 0.0
    refused: float = 0.0
    differing: float = 0.0
    full: Sequence[str] = ()
    dying: Mapping[str, float] = field(default_factory=dict)
    shoppers: bool = False
    clocks_off: Mapping[str, ClocksOff] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    spread_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; a name ends with its unit."""
        found = dataclasses.asdict(self)
        found["spreads"] = {
            f"{name}_s": {key: value for key, value in one.items() if key != "most"}
            for name, one in found["spreads"].items()
        }
        return found

    def with_kafka(self, kafka: Mapping[str, Any]) -> Figures:
        """The figures with those of a broker: whether it answers and, if the stream does not report it, the lag.

        >>> Figures().with_kafka({"answers": True, "lag": 7}).lag_events
        7
        >>> Figures().with_kafka({"answers": False, "away": True}).kafka_away
        True

        Args:
            kafka: Of `kafka_lag`.
        """
        if not kafka["answers"]:
            return dataclasses.replace(self, kafka_away=self.kafka_away or kafka["away"])
        lag_events = kafka["lag"] if self.lag_events is None else self.lag_events
        dying = {part: count for part, count in self.dying.items() if part != "kafka"}
        return dataclasses.replace(self, lag_events=lag_events, dying=dying)


@dataclass(frozen=True)
class Seen:
    """One process now and at an earlier poll, if there was one.

    Attributes:
        now: Its metrics.
        earlier: Its metrics then.
        elapsed_s: The time between.
    """

    now: Scrape
    earlier: Scrape | None = None
    elapsed_s: float = 0.0

    def rate(self, series: str, **labels: Collection[str]) -> float | None:
        """Growth of a counter per second; None without an earlier poll.

        >>> from deploy.watch.scrape import parsed
        >>> counted = [Scrape(parsed(f"steps_total {steps}")) for steps in (10, 30)]
        >>> Seen(counted[1], counted[0], 4.0).rate("steps_total")
        5.0
        """
        if self.earlier is None or not self.elapsed_s > 0 or self.now.problem:
            return None
        grown = self._grown(series, **labels)
        return grown / self.elapsed_s if grown >= 0 else None

    def count(self, series: str, **labels: Collection[str]) -> float | None:
        """A counter since the process's start; 0 before its first event, None if the process is unreachable."""
        return self.now.total(series, **labels) or (0.0 if self.now.values else None)

    def buckets(self, series: str, **labels: Collection[str]) -> Buckets:
        """A histogram's growth; all of it without an earlier poll."""
        after = self.now.buckets(series, **labels)
        return after if self.earlier is None else between(after, self.earlier.buckets(series, **labels))

    def mean(self, series: str) -> float | None:
        """The mean of a histogram's observations since the earlier poll; None without an observation."""
        total, count = (self._grown(f"{series}_{part}") for part in ("sum", "count"))
        return total / count if count > 0 else None

    def _grown(self, series: str, **labels: Collection[str]) -> float:
        # A counter with labels has no series before its first event.
        before = self.earlier.total(series, **labels) if self.earlier else None
        return (self.now.total(series, **labels) or 0.0) - (before or 0.0)


class Watch:
    """Computes figures from successive polls of the loop.

    Args:
        spread_s: How far back the quantiles reach; None: to the start of each process.
    """

    def __init__(self, spread_s: float | None = SPREAD_S) -> None:
        self._spread_s = spread_s
        self._looks: deque[tuple[float, Mapping[str, Scrape]]] = deque()

    def look(self, scrapes: Mapping[str, Scrape], now_s: float, wall_s: float) -> Figures:
        """The figures of now.

        Args:
            scrapes: Process -> its metrics.
            now_s: Monotonic time of the poll.
            wall_s: Seconds since 1970, for how long a process is up.
        """
        longest_s = max(RATE_S, self._spread_s or 0.0) + SLACK_S
        while self._looks and self._looks[0][0] < now_s - longest_s:
            self._looks.popleft()
        lately = {name: self._seen(name, scrapes, now_s, RATE_S) for name in BORN}
        if self._spread_s is None:
            spanned = {name: Seen(one.now) for name, one in lately.items()}
        else:
            spanned = {name: self._seen(name, scrapes, now_s, self._spread_s) for name in BORN}
        self._looks.append((now_s, scrapes))
        figures = read(*(lately[name] for name in ("stream", "trainer", "applier", "worker")))
        born = {name: one.value(BORN[name]) for name, one in scrapes.items() if name in BORN}
        up, kafka_runs = scrapes.get(UP, AWAY), progress.kafka_runs(scrapes)
        answering = {name for name, one in scrapes.items() if one.values} | ({"kafka"} if kafka_runs else set())
        behind = {
            name: progress.falls_behind(name, one.now, one.earlier, one.elapsed_s) for name, one in lately.items()
        }
        return dataclasses.replace(
            figures,
            up_s={name: max(0.0, wall_s - at_s) for name, at_s in born.items() if at_s is not None},
            # Processes may run without `springtide up`; its own figures are then missing.
            away={name: one.problem for name, one in scrapes.items() if one.problem and name != UP},
            up=progress.state_of_up(up),
            starting=progress.starting(scrapes),
            behind={name: words for name, words in behind.items() if words},
            kafka_away=kafka_runs is False,
            full=full(scrapes.values()),
            dying={part: deaths for part, deaths in dying(up).items() if part not in answering},
            shoppers=runs_shoppers(up),
            clocks_off=clocks_off(scrapes.get("stream", AWAY), wall_s),
            spreads={
                name: spread(spanned[process].buckets(series, **labels))
                for name, (process, series, labels) in SPREADS.items()
            },
            spread_s=self._spread_s,
        )

    def _seen(self, name: str, scrapes: Mapping[str, Scrape], now_s: float, within_s: float) -> Seen:
        """The process now and at its oldest poll within that time, or else at its last poll."""
        now = scrapes.get(name, AWAY)
        born = now.value(BORN[name])
        looks = [(at_s, seen[name]) for at_s, seen in self._looks if name in seen and not seen[name].problem]
        same = [(at_s, seen) for at_s, seen in looks if seen.value(BORN[name]) == born and at_s < now_s]
        if not same:
            return Seen(now)
        at_s, earlier = next((look for look in same if look[0] >= now_s - within_s - SLACK_S), same[-1])
        return Seen(now, earlier, now_s - at_s)


def read(stream: Seen, trainer: Seen, applier: Seen, worker: Seen) -> Figures:
    """The figures of the four processes, without those that `Watch` adds."""
    learned = bool(trainer.now.total("springtide_trainer_steps_total"))
    dead = stream.now.by("springtide_stream_dead_letters_total", "reason")
    accounts = {"stream": stream, "trainer": trainer}.items()
    return Figures(
        events=stream.count("springtide_stream_events_total"),
        events_per_s=stream.rate("springtide_stream_events_total"),
        lag_events=stream.now.value("springtide_stream_lag_events"),
        lag_s=stream.now.value("springtide_stream_lag_seconds"),
        dead=dict(sorted(dead.items(), key=lambda one: (-one[1], one[0]))),
        dead_per_s=stream.rate("springtide_stream_dead_letters_total"),
        microbatches_per_s=stream.rate("springtide_stream_microbatches_total"),
        microbatch_rows=stream.mean("springtide_stream_microbatch_rows"),
        steps_per_s=trainer.rate("springtide_trainer_steps_total"),
        rows_per_s=trainer.rate("springtide_trainer_rows_total"),
        trainer_lag=trainer.now.value("springtide_trainer_lag_records"),
        # Before the first step the gauges have their first value, which is no score.
        log_loss=trainer.now.value("springtide_trainer_log_loss") if learned else None,
        auc=trainer.now.value("springtide_trainer_auc") if learned else None,
        top1=trainer.now.value("springtide_trainer_top1_ratio") if learned else None,
        skipped_per_s=trainer.rate("springtide_trainer_rows_total", outcome=("skipped",)),
        held=bool(trainer.now.value("springtide_trainer_held")),
        budget=budget_of(trainer.now),
        paused=bool(trainer.now.value("springtide_trainer_paused")),
        publishing_held=bool(trainer.now.value("springtide_trainer_publishing_held")),
        # Versions and epochs begin with 1.
        newest_version=trainer.now.value("springtide_trainer_version") or None,
        version=applier.now.value("springtide_serving_version") or None,
        epoch=applier.now.value("springtide_serving_epoch") or None,
        pinned=bool(applier.now.value("springtide_serving_pinned")),
        serving_lag=applier.now.value("springtide_serving_microbatch_lag_records"),
        # A gauge that is exactly 0 was never set.
        features_s=applier.now.value("springtide_serving_feature_freshness_seconds") or None,
        weights_s=applier.now.value("springtide_serving_weight_freshness_seconds") or None,
        answers_per_s=worker.rate("springtide_requests_total", **ANSWERS),
        answers=worker.count("springtide_requests_total", **ANSWERS),
        failed=worker.count("springtide_requests_total", **ANSWERS, code=FAILED),
        failed_per_s=worker.rate("springtide_requests_total", **ANSWERS, code=FAILED),
        cold_starts=worker.now.total("springtide_cold_starts_total"),
        faults=sum(one.now.value(f"springtide_accounting_{name}_faults") or 0.0 for name, one in accounts),
        corrupt=applier.now.total("springtide_serving_corrupt_versions_total") or 0.0,
        differing=applier.now.total("springtide_serving_parity_rows_total", outcome=("differs",)) or 0.0,
        refused=applier.now.value("springtide_serving_refused_version") or 0.0,
    )
