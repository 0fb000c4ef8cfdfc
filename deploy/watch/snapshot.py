"""What the system looks like now, with the one list of its problems.

`springtide status`, its conditions, the page and `up` show the same snapshot. The alerts of deploy/prometheus/rules use
the same bounds as the problems, with a delay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from deploy.formats import far, rate, seconds, shown
from deploy.watch import scrape
from deploy.watch.figures import FEW_RECORDS, FORMING, SPREAD_S, STALE_S, STANDS_BY, Figures, Watch
from deploy.watch.scrape import Scrape
from state.config.settings import Settings
from state.process.environment import wall_ms

Severity = Literal["critical", "warning", "info", "hold"]
RECENT_S = 600.0
MANY_LAG = 10_000
DEAD_SHARE = 0.01
SKIPPED_SHARE = 0.01
WAITING_SHARE = 0.2
PAGE = "docs/operate/runbook.md"
HOLDS = "held-by-an-operator"
NO_SNAPSHOT = "no-fresh-snapshot-of-histories"
WORKERS = "a-worker-of-the-trainer-is-missing-or-slow"
STAGES = {"stream": "stream", "trainer": "trainer", "applier": "answers", "worker": "answers"}
"""Process -> its stage."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, unknown, not started, or held.

    Attributes:
        severity: As of alerts. `info` needs no action; `hold` is what an operator wants.
        stage: The stage of the loop that it concerns: clicks, stream, trainer, versions or answers; empty for others.
    """

    severity: Severity
    text: str
    section: str
    stage: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something has to be done."""
        return self.severity in ("critical", "warning")

    def to_json(self) -> dict[str, str]:
        """Returns the problem with a link to the runbook as JSON values."""
        return {
            "severity": self.severity,
            "text": self.text,
            "runbook": f"{PAGE}#{self.section}",
            "stage": self.stage,
        }


@dataclass(frozen=True)
class Snapshot:
    """What the system looks like at one moment, `at_ms`: figures and metrics by process.

    Attributes:
        sections: What Kafka, registry, stores and disks show (see `sections.read`); empty if they were not read.
    """

    figures: Figures = field(default_factory=Figures)
    scrapes: Mapping[str, Scrape] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    at_ms: int = 0

    @cached_property
    def problems(self) -> list[Problem]:
        """All problems once, by severity: critical first, and what an operator holds last.

        >>> Snapshot(Figures(up_s={"stream": 1.0}, held=True, paused=True)).texts
        'training is held by the guard, training is paused by an operator'
        """
        by_text: dict[str, Problem] = {}
        of_sections = _of_sections(self.sections, self.figures.up_s.get("applier", 0.0))
        for problem in (*_of_figures(self.figures), *of_sections, *_holds(self.figures)):
            by_text.setdefault(problem.text, problem)
        return sorted(by_text.values(), key=lambda problem: get_args(Severity).index(problem.severity))

    def having(self, sections: Mapping[str, Any]) -> Snapshot:
        """Returns the snapshot with sections; those of Kafka add to its figures."""
        kafka = sections.get("kafka")
        figures = self.figures.with_kafka(kafka) if kafka else self.figures
        return Snapshot(figures, self.scrapes, sections, self.at_ms)

    @property
    def faults(self) -> list[Problem]:
        """The problems that need action."""
        return [problem for problem in self.problems if problem.is_fault]

    @property
    def texts(self) -> str:
        """The problems in one line.

        >>> Snapshot(Figures(up_s={"stream": 1.0})).texts, Snapshot().texts
        ('nothing is wrong', 'nothing answers')
        """
        return ", ".join(problem.text for problem in self.problems) or "nothing is wrong"


class Poller:
    """Polls the metrics of the loop's processes; `spread_s` as in `Watch`."""

    def __init__(
        self, settings: Settings, spread_s: float | None = SPREAD_S, now_ms: Callable[[], int] = wall_ms
    ) -> None:
        self._urls, self._watch = scrape.watched_urls(settings), Watch(spread_s)
        self._now_ms = now_ms

    def poll(self) -> Snapshot:
        """Returns a snapshot of now, without sections."""
        scrapes, at_ms = scrape.scrape(self._urls), self._now_ms()
        return Snapshot(self._watch.figures(scrapes, time.monotonic(), at_ms / 1000), scrapes, {}, at_ms)


def _holds(figures: Figures) -> Iterator[Problem]:
    if figures.paused:
        yield Problem("hold", "training is paused by an operator", HOLDS, "trainer")
    if figures.publishing_held:
        yield Problem("hold", "publishing is held by an operator", HOLDS, "versions")
    # A hold of the guard also pins, so the pin is not reported separately.
    if figures.pinned and not figures.held:
        yield Problem("hold", "pinned by an operator", HOLDS, "answers")


def _of_figures(figures: Figures) -> Iterator[Problem]:
    yield from _of_processes(figures)
    for text in figures.full:
        yield Problem("critical" if text.endswith("waits for space") else "warning", text, "the-disk-is-full")
    if figures.faults:
        yield Problem("critical", "accounts do not balance", "accounts-do-not-balance")
    if figures.differing:
        text = f"examples trained with other features: {shown(figures.differing)}"
        yield Problem("critical", text, "answers-and-training-see-different-features", "answers")
    skipped = _share(figures.skipped_per_s, figures.rows_per_s)
    if figures.held:
        yield Problem("critical", "training is held by the guard", "training-is-held", "trainer")
    elif figures.withheld:
        text = "versions wait, at most 30 s, because the guard is unsure about an update"
        yield Problem("info", text, "training-is-held", "versions")
    if not figures.held and skipped > SKIPPED_SHARE:
        yield Problem("warning", f"the guard skips {skipped:.0%} of the examples", "training-is-held", "trainer")
    if figures.budget and figures.budget.spent:
        yield Problem(
            "critical", "training holds: the privacy budget is spent", "the-privacy-budget-is-spent", "trainer"
        )
    worker, waiting = figures.slow_worker
    if waiting > WAITING_SHARE:
        text = f"worker {worker} slows the trainer, another one waits {waiting:.0%} of the time"
        yield Problem("warning", text, WORKERS, "trainer")
    for name, text in figures.behind.items():
        section = "segments-are-out-of-date" if name == scrape.SEGMENTS else "the-stream-lags"
        yield Problem("warning", f"{name}: {text}", section, STAGES.get(name, ""))
    yield from _of_ages(figures)
    if (figures.lag_events or 0.0) > MANY_LAG and "stream" not in figures.behind:
        yield Problem("warning", f"{shown(figures.lag_events)} clicks wait", "the-stream-lags", "stream")
    dead = _share(figures.dead_per_s, figures.events_per_s)
    if dead > DEAD_SHARE:
        yield Problem("warning", f"{dead:.0%} dead letters", "dead-letters", "clicks")
    ahead = figures.clocks_off.get("ahead")
    # A click with a clock behind may only be late.
    if ahead is not None and ahead.age_s < RECENT_S:
        text = f"a clock is {far(ahead.by_s)} ahead (partition {ahead.partition} offset {ahead.offset})"
        yield Problem("warning", text, "a-clock-is-wrong", "clicks")
    if figures.failed_per_s:
        yield Problem("critical", f"{rate(figures.failed_per_s)} answers fail", "answers-fail", "answers")
    if figures.corrupt:
        yield Problem("critical", f"corrupt versions: {shown(figures.corrupt)}", "a-version-is-damaged", "versions")
    if figures.refused:
        yield Problem("critical", f"version {figures.refused:.0f} is refused", "a-version-is-refused", "versions")
    # Late histories are reported by the broker's state and by the applier's backlog.
    if "version" in figures.degraded:
        yield Problem("critical", "serving gets no new versions", "the-registry-is-unreachable", "versions")


def _of_processes(figures: Figures) -> Iterator[Problem]:
    nothing_runs = not figures.up_s and not figures.up
    # Without Kafka other processes wait or do not answer, so Kafka comes first.
    if figures.kafka_away and not nothing_runs:
        yield Problem("critical", "Kafka unreachable", "kafka-is-unreachable", "clicks")
    if nothing_runs:
        yield Problem("critical", "nothing answers", "a-process-cannot-run")
    else:
        for name in figures.away:
            if figures.up == "starting":
                yield Problem("warning", f"{name} not started yet", "a-process-starts")
            else:
                section = "segments-are-out-of-date" if name == scrape.SEGMENTS else "a-process-cannot-run"
                yield Problem("critical", f"{name} unreachable", section)
    for name, text in figures.starting.items():
        if text == STANDS_BY:
            yield Problem("info", f"{name} {text}", "a-trainer-stands-by", STAGES.get(name, ""))
            continue
        if text.startswith(FORMING):
            severity: Severity = "warning" if figures.up == "starting" else "critical"
            yield Problem(severity, f"{name} {text}", WORKERS, "trainer")
            continue
        yield Problem("warning", f"{name} {text}", "a-process-starts", STAGES.get(name, ""))
    for name, deaths in figures.dying.items():
        yield Problem("critical", f"{name} cannot run, {shown(deaths)} deaths in a row", "a-process-cannot-run")
    if figures.up == "starting" and not figures.away and not figures.starting:
        yield Problem("warning", "up is still starting", "a-process-starts")


def _of_ages(figures: Figures) -> Iterator[Problem]:
    if not figures.events_per_s:
        return
    old = figures.has_old_clicks
    learned = old and figures.trainer_lag is not None and figures.trainer_lag <= FEW_RECORDS
    if not any(_holds(figures)) and not learned and (figures.weights_s or 0.0) > STALE_S:
        yield Problem("warning", f"weights {seconds(figures.weights_s)} old", "no-new-version", "versions")
    if not old and (figures.features_s or 0.0) > STALE_S:
        yield Problem("warning", f"features {seconds(figures.features_s)} old", "features-are-stale", "answers")


def _of_sections(sections: Mapping[str, Any], applier_s: float) -> Iterator[Problem]:
    kafka, registry, accounting = (sections.get(name) for name in ("kafka", "registry", "accounting"))
    snapshots = sections.get("snapshots")
    if kafka and not kafka["answers"] and not kafka["away"]:
        yield Problem("warning", "Kafka has no topics yet", "a-process-starts")
    if registry and not registry["answers"]:
        yield Problem("warning", "no registry can be read", "the-disk-is-lost")
    if snapshots and snapshots["problem"]:
        yield Problem("warning", "snapshots of histories cannot be read", NO_SNAPSHOT, "answers")
    elif snapshots and snapshots["late"]:
        # A loop that has just started has none yet.
        if ages_s := snapshots["ages_s"]:
            yield Problem("warning", f"snapshot of histories {seconds(ages_s[0])} old", NO_SNAPSHOT, "answers")
        elif applier_s > snapshots["late_s"]:
            yield Problem("warning", "no snapshot of histories", NO_SNAPSHOT, "answers")
    if accounting and accounting["balanced"] is None:
        yield Problem("warning", "accounts unknown", "accounts-do-not-balance")
    if accounting and accounting["balanced"] is False:
        yield Problem("critical", "accounts do not balance", "accounts-do-not-balance")
    if (hosts := sections.get("hosts")) and hosts["without_host"]:
        text = f"no host holds {len(hosts['without_host'])} of 64 shares of users"
        yield Problem("critical", text, "a-share-of-users-has-no-host", "answers")
    if hosts and hosts["with_one_host"]:
        text = f"one host alone holds {len(hosts['with_one_host'])} of 64 shares of users"
        yield Problem("warning", text, "a-share-of-users-has-no-host", "answers")
    experiments = sections.get("experiments") or ()
    if any(experiment.get("problem") for experiment in experiments):
        yield Problem("warning", "experiments cannot be read", "experiments-cannot-be-read")
    for rollout in filter(None, (experiment.get("rollout") for experiment in experiments)):
        if rollout["stopped"]:
            yield Problem("warning", "a rollout was stopped", "a-rollout-was-stopped")
        if rollout["unwatched_s"] is not None:
            yield Problem("warning", "no command drives the rollout", "no-command-drives-a-rollout")
    if (retrain := sections.get("retrain")) and retrain.get("outcome") == "failed":
        yield Problem("info", "the last retrain failed", "a-retrain-fails")
    if (live_clicks := sections.get("live_clicks")) and live_clicks["anomalies"]:
        yield Problem("info", "live clicks have changed", "live-clicks-have-changed")


def _share(part: float | None, total: float | None) -> float:
    return (part or 0.0) / total if total else 0.0
