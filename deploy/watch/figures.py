"""Computes the figures of the running loop from the metrics that its processes serve on /metrics. Pure.

Rates cover the last `RATE_S` seconds. Quantiles cover the last minute, or, for a single poll, the time since each
process started. A process that has restarted since the earlier poll counts as another one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deploy.formats import shown
from deploy.watch.scrape import SEGMENTS, UP, Scrape
from state import storage
from state.metrics import ANSWERING_ROUTES

DEATHS = 2
UNREACHABLE = Scrape()
RATE_S = 5.0
SPREAD_S = 60.0
SLACK_S = 0.5
LEAST_BETWEEN_S = 0.9
FEW_RECORDS = 100  # of the training log: about ten seconds
QUEUED_S = 10.0
FEW_USERS = 20_000  # who wait for the process of segments: evaluated within six seconds
NEAR_LIMIT = 0.9
STALE_S = 20.0

Labels = Mapping[str, Collection[str]]
Buckets = Mapping[float, float]
"""By upper bound, how many observations were at most that; the last bound is infinite."""
ANSWERS: Labels = {"route": tuple(route for route in ANSWERING_ROUTES if route != "explain")}
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

# A process has loaded its state once its version is not 0. An operator or the guard can stop training on purpose.
VERSIONS = {"trainer": "springtide_trainer_version", "applier": "springtide_serving_version"}
STOPPED = tuple(f"springtide_trainer_{name}" for name in ("held", "paused", "privacy_held"))

# Part of the disk -> the process that waits if it is full.
WAITS = {
    storage.REGISTRY: "publishing",
    storage.STREAM: "the stream",
    storage.SERVING: "serving",
    storage.KAFKA: "Kafka",
    storage.LOGS: "a log",
}


STANDS_BY = "stands by for another trainer"
FORMING = "waits for worker"


class Backlog(NamedTuple):
    """The gauge of items that wait for a process, and the counter of processed items.

    Attributes:
        waiting_s: Name of the gauge with their waiting time; without one, `FEW_RECORDS` of them may wait.
    """

    waiting: str
    done: str
    what: str
    waiting_s: str = ""


BACKLOGS = {
    "stream": Backlog(
        "springtide_stream_lag_events", "springtide_stream_events_total", "clicks", "springtide_stream_lag_seconds"
    ),
    "trainer": Backlog("springtide_trainer_lag_records", "springtide_trainer_rows_total", "records"),
    "applier": Backlog("springtide_serving_microbatch_lag_records", "springtide_serving_history_rows_total", "records"),
}


@dataclass(frozen=True)
class Spread:
    """Count, median and 99th percentile of a distribution; None without observations.

    Attributes:
        most: The highest finite bound; a quantile that reaches it may be larger.
    """

    count: float = 0.0
    p50: float | None = None
    p99: float | None = None
    most: float = math.inf


def quantile(buckets: Buckets, q: float) -> float | None:
    """Returns the q-quantile, interpolated linearly within its bucket; None without observations.

    If the quantile is beyond the highest finite bound, that bound is returned.

    >>> quantile({1: 50, 2: 100, math.inf: 100}, 0.75)
    1.5
    >>> quantile({0.1: 1, math.inf: 100}, 0.99), quantile({0.1: 0, math.inf: 0}, 0.5)
    (0.1, None)
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]] > 0:
        return None
    rank = q * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


def between(after: Buckets, before: Buckets) -> Buckets:
    """Returns what was counted after `before`; all of `after` if the process has restarted since.

    >>> between({1.0: 3, math.inf: 5}, {1.0: 1, math.inf: 2})
    {1.0: 2, inf: 3}
    """
    grown = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    counts = [grown[bound] for bound in sorted(grown)]
    cumulative = all(low <= high for low, high in itertools.pairwise([0.0, *counts]))
    return grown if cumulative else after


def spread(buckets: Buckets) -> Spread:
    """Computes the median and the 99th percentile."""
    finite = [bound for bound in buckets if not math.isinf(bound)]
    if not finite:
        return Spread()
    return Spread(max(buckets.values()), quantile(buckets, 0.5), quantile(buckets, 0.99), max(finite))


@dataclass(frozen=True)
class BudgetLeft:
    """The privacy budget.

    Attributes:
        left: The part that no period has used.
        spent: Whether training holds, because the next period would use more than is left.
    """

    epsilon: float
    left: float
    spent: bool


def _budget_of(trainer: Scrape) -> BudgetLeft | None:
    epsilon, spent, held = (
        trainer.value(f"springtide_trainer_privacy_{name}") for name in ("epsilon_limit", "epsilon_spent", "held")
    )
    return BudgetLeft(epsilon, max(0.0, epsilon - (spent or 0.0)), bool(held)) if epsilon else None


@dataclass(frozen=True)
class ClocksOff:
    """Clicks since the stream's start whose clock is off in one direction; the other figures are of the newest one.

    Attributes:
        by_s: How far it is off, seconds; 0 if unknown.
        age_s: How long ago it was read, seconds.
    """

    clicks: float
    partition: int
    offset: int
    by_s: float
    age_s: float


def clocks_off(stream: Scrape, wall_s: float) -> dict[str, ClocksOff]:
    """Returns the clocks that are off by direction: ahead, behind (or late), refused.

    >>> from deploy.watch.scrape import parsed
    >>> lines = (f'springtide_stream_clock{name}{{direction="ahead"}} {value}' for name, value in (
    ...     ("s_off_total", 2), ("_off_partition", 1), ("_off_offset", 70), ("_off_seconds", 3000), ("_off_time_seconds", 5)))
    >>> clocks_off(Scrape(parsed(chr(10).join(lines))), wall_s=9.0)
    {'ahead': ClocksOff(clicks=2.0, partition=1, offset=70, by_s=3000.0, age_s=4.0)}
    """
    clicks = stream.by("springtide_stream_clocks_off_total", "direction")
    partition, offset, by_s, at_s = (
        stream.by(f"springtide_stream_clock_off_{name}", "direction")
        for name in ("partition", "offset", "seconds", "time_seconds")
    )
    return {
        name: ClocksOff(
            clicks[name], int(partition[name]), int(offset[name]), by_s[name], max(0.0, wall_s - at_s[name])
        )
        for name in ("ahead", "behind", "refused")
        if clicks.get(name) and name in at_s
    }


def starting(scrapes: Mapping[str, Scrape]) -> dict[str, str]:
    r"""Returns the phase of each process that answers on /metrics but does not work yet."""
    phases = {}
    for name, scraped in scrapes.items():
        if not scraped.values:
            continue
        if scraped.value("springtide_trainer_standby"):
            phases[name] = STANDS_BY
            continue
        total, ready = (scraped.value(f"springtide_kernels_{kind}") or 0.0 for kind in ("total", "ready"))
        if scraped.value("springtide_trainer_phase", phase="waiting for workers"):
            workers = scraped.by("springtide_trainer_worker_missing", "worker")
            missing = ", ".join(worker for worker, is_missing in workers.items() if is_missing)
            phases[name] = f"{FORMING} {missing} of {len(workers) + 1}" if missing else f"{FORMING}s"
        elif ready < total:
            phases[name] = f"compiling kernels, {shown(ready)} of {shown(total)}"
        elif name in VERSIONS and not scraped.value(VERSIONS[name]):
            phases[name] = "starting"
        elif name in BACKLOGS and scraped.value(BACKLOGS[name].waiting) is None:
            phases[name] = "lag unknown" if name in VERSIONS else "starting"
    return phases


def falls_behind(name: str, now: Scrape, earlier: Scrape | None, elapsed_s: float) -> str:
    r"""Describes the backlog of a process that makes no progress, or too little; empty if it keeps up.

    `earlier` are its metrics `elapsed_s` before; None if there was no earlier poll.
    """
    backlog = BACKLOGS.get(name)
    if backlog is None or any(now.value(series) for series in STOPPED):
        return ""
    waiting = now.value(backlog.waiting) or 0.0
    long = (now.value(backlog.waiting_s) or 0.0) > QUEUED_S if backlog.waiting_s else waiting > FEW_RECORDS
    before = None if earlier is None or elapsed_s < LEAST_BETWEEN_S else earlier.value(backlog.waiting)
    if earlier is None or before is None:
        # Without an earlier poll its progress is unknown.
        return f"{shown(waiting)} {backlog.what} wait" if waiting and long else ""
    if not before or waiting < before:
        return ""
    if (now.total(backlog.done) or 0.0) == (earlier.total(backlog.done) or 0.0):
        return f"{shown(waiting)} {backlog.what} wait and none is processed"
    return f"{shown(waiting)} {backlog.what} wait and their number grows" if long and waiting > before else ""


def segments_behind(keeper: Scrape) -> str:
    """Describes the backlog of the process of segments; empty if it keeps up. The alert has the same bounds."""
    lag, users = (keeper.value(f"springtide_segments_{name}") or 0.0 for name in ("lag_records", "waiting"))
    return f"{shown(lag)} records and {shown(users)} users wait" if lag > FEW_RECORDS or users > FEW_USERS else ""


def _kafka_answers(scrapes: Mapping[str, Scrape]) -> bool | None:
    """Returns whether serving reaches Kafka; None if unknown."""
    applier = scrapes.get("applier", UNREACHABLE)
    if applier.value("springtide_serving_log_away"):
        return False
    return None if applier.value(BACKLOGS["applier"].waiting) is None else True


def full_parts(scrapes: Iterable[Scrape]) -> list[str]:
    r"""Describes which parts wait for disk space, and which ones use almost all of their share; the worst first."""
    by_kind = {name: dict[str, float]() for name in ("waiting", "used_bytes", "limit_bytes")}
    for scraped in scrapes:
        for name, parts in by_kind.items():
            for part, value in scraped.by(f"springtide_storage_{name}", "part").items():
                parts[part] = parts.get(part, 0.0) + value
    waits = [f"{WAITS.get(part, part)} waits for space" for part, count in by_kind["waiting"].items() if count]
    shares_used = {
        part: by_kind["used_bytes"].get(part, 0.0) / limit for part, limit in by_kind["limit_bytes"].items() if limit
    }
    near = sorted(((share, part) for part, share in shares_used.items() if share > NEAR_LIMIT), reverse=True)
    return [*waits, *(f"{part} takes {share:.0%} of its share of the disk" for share, part in near)]


@dataclass(frozen=True)
class Figures:
    """The figures of the loop at one moment; None if unknown. Names of rates end with `_per_s`, of seconds with `_s`.

    Attributes:
        up_s: Process -> seconds since it started, for the processes that answer.
        away: Process -> why it does not answer.
        up: The state of `springtide up`: `starting` its processes, or `running`; empty if it does not answer.
        starting: Process that answers but is still starting -> its phase, in words.
        behind: Process that is stuck or falls behind -> its waiting work, in words.
        lag_s: Wall time since the newest click read was appended to Kafka; 0 if none waits.
        rows_per_s: Rows of the training log read, with any outcome.
        trainer_lag: Positions of the training log the trainer has not read; `serving_lag` likewise of the histories.
        trainer_workers: Share of the time that each worker of a group computed; empty without other workers.
        log_loss: Of the interests, scored before learning, as are `auc` of the engagement and `top1`.
        version: Version that serving uses; `newest_version` is the trainer's.
        features_s: Age of the newest click in the histories that serving uses.
        weights_s: Age of the newest click trained into the version that serving uses.
        answers: Requests for profiles since the worker's start.
        failed: Those of them that failed, or were refused because a worker had too many (429).
        corrupt: Versions that serving refused for their digests.
        differing: Sampled rows that were trained with other features than serving computes.
        refused: The newest version that failed its probe, if it is newer than the served one.
        degraded: Parts of the answers (version, histories) that get no updates, as `/readyz` reports.
        full: What waits for disk space, and which data takes almost all of a share, in words.
        dying: Process that does not answer -> how often in a row it died, of those that `springtide up` restarts.
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
    trainer_workers: Mapping[str, float] = field(default_factory=dict)
    log_loss: float | None = None
    auc: float | None = None
    top1: float | None = None
    skipped_per_s: float | None = None
    held: bool = False
    withheld: bool = False
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
    degraded: Sequence[str] = ()
    differing: float = 0.0
    full: Sequence[str] = ()
    dying: Mapping[str, float] = field(default_factory=dict)
    shoppers: bool = False
    clocks_off: Mapping[str, ClocksOff] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    spread_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values; names end with their units."""
        document = dataclasses.asdict(self)
        document["spreads"] = {
            f"{name}_s": {key: value for key, value in spread.items() if key != "most"}
            for name, spread in document["spreads"].items()
        }
        return document

    def with_kafka(self, kafka: Mapping[str, Any]) -> Figures:
        """Returns the figures with those of a broker (`sections.kafka_lag`): whether it answers, and the lag if it is unknown."""
        if not kafka["answers"]:
            return dataclasses.replace(self, kafka_away=self.kafka_away or kafka["away"])
        lag_events = kafka["lag"] if self.lag_events is None else self.lag_events
        dying = {part: count for part, count in self.dying.items() if part != "kafka"}
        return dataclasses.replace(self, lag_events=lag_events, dying=dying)

    @property
    def slow_worker(self) -> tuple[str, float]:
        """The slowest worker of a group, and the share of the time that the fastest one waits for it.

        >>> Figures(trainer_workers={"0": 0.25, "1": 0.5}).slow_worker, Figures().slow_worker
        (('1', 0.25), ('', 0.0))
        """
        workers = self.trainer_workers
        slowest = max(workers, key=lambda worker: workers[worker], default="")
        return slowest, workers[slowest] - min(workers.values()) if workers else 0.0

    @property
    def has_old_clicks(self) -> bool:
        """Whether incoming clicks are old themselves, as in a replay: none waits, and the newest is old."""
        if self.lag_s is None or self.serving_lag is None or self.kafka_away or "stream" in self.behind:
            return False
        waits = self.lag_s > QUEUED_S or self.serving_lag > FEW_RECORDS
        return not waits and (self.features_s or 0.0) > STALE_S


@dataclass(frozen=True)
class Seen:
    """The metrics of one process now and at an earlier poll, if there was one, and the time between."""

    now: Scrape
    earlier: Scrape | None = None
    elapsed_s: float = 0.0

    def rate(self, series: str, **labels: Collection[str]) -> float | None:
        """Returns the growth of a counter per second; None without an earlier poll."""
        if self.earlier is None or not self.elapsed_s > 0 or self.now.problem:
            return None
        grown = self._grown(series, **labels)
        return grown / self.elapsed_s if grown >= 0 else None

    def count(self, series: str, **labels: Collection[str]) -> float | None:
        """Returns a counter since the process's start; 0 before its first event, None if the process is unreachable."""
        return self.now.total(series, **labels) or (0.0 if self.now.values else None)

    def buckets(self, series: str, **labels: Collection[str]) -> Buckets:
        """Returns a histogram's growth since the earlier poll; all of it if there was none."""
        after = self.now.buckets(series, **labels)
        return after if self.earlier is None else between(after, self.earlier.buckets(series, **labels))

    def mean(self, series: str) -> float | None:
        """Returns the mean of a histogram's observations since the earlier poll; None without an observation."""
        total, count = (self._grown(f"{series}_{part}") for part in ("sum", "count"))
        return total / count if count > 0 else None

    def _grown(self, series: str, **labels: Collection[str]) -> float:
        # A counter with labels has no series before its first event.
        before = self.earlier.total(series, **labels) if self.earlier else None
        return (self.now.total(series, **labels) or 0.0) - (before or 0.0)


class Watch:
    """Computes figures from successive polls of the loop.

    Args:
        spread_s: The period that quantiles cover; None: since the start of each process.
    """

    def __init__(self, spread_s: float | None = SPREAD_S) -> None:
        self._spread_s = spread_s
        self._polls: deque[tuple[float, Mapping[str, Scrape]]] = deque()

    def figures(self, scrapes: Mapping[str, Scrape], now_s: float, wall_s: float) -> Figures:
        """Returns the figures of one poll.

        Args:
            scrapes: Metrics by process.
            now_s: Monotonic time of the poll.
            wall_s: Seconds since 1970, for how long a process is up.
        """
        longest_s = max(RATE_S, self._spread_s or 0.0) + SLACK_S
        while self._polls and self._polls[0][0] < now_s - longest_s:
            self._polls.popleft()
        lately = {name: self._seen(name, scrapes, now_s, RATE_S) for name in BORN}
        if self._spread_s is None:
            spanned = {name: Seen(seen.now) for name, seen in lately.items()}
        else:
            spanned = {name: self._seen(name, scrapes, now_s, self._spread_s) for name in BORN}
        self._polls.append((now_s, scrapes))
        born = {name: scraped.value(BORN[name]) for name, scraped in scrapes.items() if name in BORN}
        up, kafka = scrapes.get(UP, UNREACHABLE), _kafka_answers(scrapes)
        answering = {name for name, scraped in scrapes.items() if scraped.values} | ({"kafka"} if kafka else set())
        behind = {name: falls_behind(name, seen.now, seen.earlier, seen.elapsed_s) for name, seen in lately.items()}
        behind[SEGMENTS] = segments_behind(scrapes.get(SEGMENTS, UNREACHABLE))
        deaths = {
            part: count
            for part, count in up.by("springtide_up_deaths_in_a_row", "part").items()
            if count >= DEATHS and part not in answering
        }
        return dataclasses.replace(
            read(*(lately[name] for name in ("stream", "trainer", "applier", "worker"))),
            up_s={name: max(0.0, wall_s - at_s) for name, at_s in born.items() if at_s is not None},
            # Processes may run without `springtide up`; its own figures are then missing.
            away={name: scraped.problem for name, scraped in scrapes.items() if scraped.problem and name != UP},
            up="" if not up.values else "starting" if up.value("springtide_up_settled") == 0 else "running",
            starting=starting(scrapes),
            behind={name: words for name, words in behind.items() if words},
            kafka_away=kafka is False,
            full=full_parts(scrapes.values()),
            dying=dict(sorted(deaths.items(), key=lambda part: -part[1])),
            shoppers="shoppers" in up.by("springtide_up_starts_total", "part"),
            clocks_off=clocks_off(scrapes.get("stream", UNREACHABLE), wall_s),
            spreads={
                name: spread(spanned[process].buckets(series, **labels))
                for name, (process, series, labels) in SPREADS.items()
            },
            spread_s=self._spread_s,
        )

    def _seen(self, name: str, scrapes: Mapping[str, Scrape], now_s: float, within_s: float) -> Seen:
        now = scrapes.get(name, UNREACHABLE)
        born = now.value(BORN[name])
        polls = [(at_s, seen[name]) for at_s, seen in self._polls if name in seen and not seen[name].problem]
        same = [(at_s, seen) for at_s, seen in polls if seen.value(BORN[name]) == born and at_s < now_s]
        if not same:
            return Seen(now)
        at_s, earlier = next((poll for poll in same if poll[0] >= now_s - within_s - SLACK_S), same[-1])
        return Seen(now, earlier, now_s - at_s)


def read(stream: Seen, trainer: Seen, applier: Seen, worker: Seen) -> Figures:
    """Returns the figures of the four processes, without those that `Watch` adds."""
    learned = bool(trainer.now.total("springtide_trainer_steps_total"))
    dead = stream.now.by("springtide_stream_dead_letters_total", "reason")
    accounts = {"stream": stream, "trainer": trainer}.items()
    degraded = applier.now.by("springtide_serving_degraded", "part")
    return Figures(
        events=stream.count("springtide_stream_events_total"),
        events_per_s=stream.rate("springtide_stream_events_total"),
        lag_events=stream.now.value("springtide_stream_lag_events"),
        lag_s=stream.now.value("springtide_stream_lag_seconds"),
        dead=dict(sorted(dead.items(), key=lambda reason: (-reason[1], reason[0]))),
        dead_per_s=stream.rate("springtide_stream_dead_letters_total"),
        microbatches_per_s=stream.rate("springtide_stream_microbatches_total"),
        microbatch_rows=stream.mean("springtide_stream_microbatch_rows"),
        steps_per_s=trainer.rate("springtide_trainer_steps_total"),
        rows_per_s=trainer.rate("springtide_trainer_rows_total"),
        trainer_lag=trainer.now.value("springtide_trainer_lag_records"),
        trainer_workers={
            worker: trainer.rate("springtide_trainer_worker_seconds_total", worker=(worker,)) or 0.0
            for worker in trainer.now.by("springtide_trainer_worker_seconds_total", "worker")
        },
        # Before the first step the gauges have their initial value, which is not a score.
        log_loss=trainer.now.value("springtide_trainer_log_loss") if learned else None,
        auc=trainer.now.value("springtide_trainer_auc") if learned else None,
        top1=trainer.now.value("springtide_trainer_top1_ratio") if learned else None,
        skipped_per_s=trainer.rate("springtide_trainer_rows_total", outcome=("skipped",)),
        held=bool(trainer.now.value("springtide_trainer_held")),
        withheld=bool(trainer.now.value("springtide_trainer_withheld")),
        budget=_budget_of(trainer.now),
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
        faults=sum(seen.now.value(f"springtide_accounting_{name}_faults") or 0.0 for name, seen in accounts),
        corrupt=applier.now.total("springtide_serving_corrupt_versions_total") or 0.0,
        differing=applier.now.total("springtide_serving_parity_rows_total", outcome=("differs",)) or 0.0,
        refused=applier.now.value("springtide_serving_refused_version") or 0.0,
        degraded=[part for part, is_degraded in degraded.items() if is_degraded],
    )
