"""Status of experiments and of the retrain schedule: JSON values, text and metrics. No process must run for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deploy.formats import age, decimal, iso
from state import layout
from state.config.settings import Settings
from state.config.sources import span_ms
from state.disk import documents
from state.disk.lock import is_held
from state.errors import SpringtideError
from state.experiments.comparison import ComparisonFigures, read_figures
from state.experiments.evidence import LIVE, TRIAL
from state.experiments.experiment import OUTCOMES, Experiment, Experiments, Schedule
from state.experiments.gate import Finding, RolloutReport
from state.metrics import RetrainMetrics, RolloutMetrics, TrialMetrics
from state.process.environment import wall_ms
from state.registry.control import Control
from state.registry.registry import Registry

NOT_LEARNING = {"held": "held by its guard", "paused": "paused", "down": "no trainer"}
"""Reasons why an experiment that runs does not learn, so that its comparison gets no rows."""

STOPPED = {"halted": "HALTED", "back": "BACK"}
OUTCOME_WORDS = {"promoted": "PROMOTED", "dropped": "dropped", "failed": "FAILED", "": "runs"}

UNWATCHED_S = 60.0
"""A running rollout not judged for this long has no driver; a driver judges it every two seconds."""


def listed(settings: Settings, now_ms: int) -> list[dict[str, Any]]:
    """Returns all experiments as JSON values, the newest last.

    Raises:
        RegistryError: The document is damaged.
    """
    experiments = Experiments(settings)
    experiments_listed = experiments.document().experiments
    report = experiments.read_report(RolloutReport)
    return [_document(experiments, experiment, report, now_ms) for experiment in experiments_listed]


def reported(settings: Settings) -> list[dict[str, Any]]:
    """Returns the experiments that run, are being promoted, or still answer users; or what is damaged."""
    try:
        experiments = listed(settings, wall_ms())
    except SpringtideError as error:
        return [{"problem": str(error)}]
    return [
        experiment
        for experiment in experiments
        if experiment["stage"] in ("shadow", "rollout", "promoting") or experiment["share"]
    ]


def _document(
    experiments: Experiments, experiment: Experiment, report: RolloutReport | None, now_ms: int
) -> dict[str, Any]:
    newest, held, problem = None, None, ""
    standing: str = experiment.stage
    compared, path = None, experiments.registry(experiment.name)
    try:
        figures = read_figures(experiments.folder(experiment.name))
        compared = None if figures is None else msgspec.to_builtins(figures)
        if experiment.runs and path.is_dir():
            registry = Registry(path)
            control = registry.control()
            newest = None if control is None else registry.newest(control.epoch)
            held = held_by_guard(control)
            paused = control is not None and not control.training
            down = not is_held(path, layout.TRAINER_LOCK)
            standing = "held" if held else "paused" if paused else "down" if down else standing
    except (SpringtideError, OSError) as error:
        problem = str(error)
    decided = experiment.newest
    return {
        **msgspec.to_builtins(experiment),
        "at_ms": decided.at_ms,
        "actor": decided.actor,
        "reason": decided.reason,
        "share": experiment.share,
        "newest": newest,
        "held": held,
        "standing": standing,
        "compared": compared,
        "rollout": _rollout(experiment, report if report is not None and report.is_of(experiment) else None, now_ms),
        "problem": problem,
    }


def _rollout(experiment: Experiment, report: RolloutReport | None, now_ms: int) -> dict[str, Any] | None:
    if experiment.rollout is None or not (experiment.is_hosted or experiment.is_stopped_by_gate):
        return None
    watched = experiment.stage == "rollout" and experiment.phase == "running"
    unwatched_s = (now_ms - _judged_ms(experiment, report)) / 1000 if watched else 0.0
    return {
        **msgspec.to_builtins(experiment.rollout),
        "stopped": experiment.is_stopped_by_gate,
        "unwatched_s": unwatched_s if unwatched_s > UNWATCHED_S else None,
        "compared": None if report is None else msgspec.to_builtins(report),
    }


def _judged_ms(experiment: Experiment, report: RolloutReport | None) -> int:
    return max(experiment.newest.at_ms, 0 if report is None else report.judged_ms)


def held_by_guard(control: Control | None) -> str | None:
    """Describes what the guard of a trainer holds; None if it holds nothing."""
    return None if control is None or control.held is None else control.held.in_words()


def as_lines(experiments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats experiments for `springtide experiment status`, the sentences of each below each other."""
    if not experiments:
        return ["there was no experiment yet: `springtide experiment start NAME --reason TEXT` begins one"]
    lines: list[str] = []
    for experiment in experiments:
        word, text = as_text(experiment)
        first, *others = text.split("; ")
        lines += [f"{word:<18}{first}", *(f"{'':<18}{sentence}" for sentence in others)]
    return lines


def as_text(experiment: Mapping[str, Any]) -> tuple[str, str]:
    """Formats an experiment's status: a word, and a description whose sentences are separated by semicolons.

    The word is the first of these that applies: a document is damaged, the rollout needs attention, the reason why it
    does not learn, its end, the phase of the rollout, the verdict of the comparison.

    >>> compared = {"rows": 9, "live_log_loss": 2.5, "trial_log_loss": 2.4, "difference": -0.1, "low": -0.2, "high": -0.05,
    ...             "alpha": 0.05, "verdict": "better", "records": 1, "alone": 0, "unlike": 0, "differing": 9}
    >>> word, text = as_text({"name": "wider", "stage": "shadow", "held": None, "standing": "shadow", "problem": "",
    ...                       "overrides": {"model.dim": "64"}, "version": 7, "compared": compared, "rollout": None,
    ...                       "actor": "ann", "at_ms": 0, "reason": "does more help?"})
    >>> word
    'BETTER'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    wider learns from version 7 with model.dim 64
    ann, 1970-01-01T00:00:00Z: does more help?
    log loss 2.400 against 2.500 of the live trainer on the same 9 examples
    difference -0.1000 (-0.2000 to -0.0500): at most 5 % of equal experiments are reported as different
    """
    if "name" not in experiment:
        return "DAMAGED", experiment["problem"]
    begins = experiment["origin"] if experiment["version"] is None else f"version {experiment['version']}"
    tried = ", ".join(f"{name} {value}" for name, value in experiment["overrides"].items()) or "the same settings"
    runs, rollout, figures = experiment["stage"] in ("shadow", "rollout"), experiment["rollout"], _figures(experiment)
    does = "learns" if runs else f"is {experiment['stage']} and began"
    sentences = [
        f"{experiment['name']} {does} from {begins} with {tried}",
        f"{experiment['actor']}, {iso(experiment['at_ms'])}: {experiment['reason']}",
    ]
    words = ["DAMAGED"] if experiment["problem"] else []
    if rollout is not None:
        words += ["UNWATCHED"] if rollout["unwatched_s"] is not None else []
        words += [STOPPED[rollout["phase"]]] if rollout["phase"] in STOPPED else []
        sentences += _rollout_sentences(experiment)
    if experiment["held"]:
        sentences.append(f"held by its guard: {experiment['held']}")
    elif experiment["standing"] == "paused":
        sentences.append("training is paused by an operator")
    elif experiment["standing"] == "down":
        sentences.append(f"its trainer does not run: see logs/shadow-{experiment['name']}.log")
    words += [NOT_LEARNING[experiment["standing"]]] if experiment["standing"] in NOT_LEARNING else []
    words += [experiment["stage"]] if not runs else [rollout["phase"]] if rollout is not None else []
    if experiment["problem"]:
        sentences.append(experiment["problem"])
    if figures is None or not figures.rows:
        return [*words, "waits"][0], "; ".join([*sentences, "no example was scored by both yet"])
    sentences.append(
        f"log loss {decimal(figures.trial_log_loss)} against {decimal(figures.live_log_loss)} of the live trainer on "
        f"the same {figures.rows:,} examples"
    )
    sure = f": at most {100 * figures.alpha:g} % of equal experiments are reported as different"
    sentences.append(f"difference {figures.difference_text}{'' if figures.low is None else sure}")
    verdict = "BETTER" if figures.verdict == "better" else figures.verdict
    return [*words, verdict][0], "; ".join(sentences)


def _rollout_sentences(experiment: Mapping[str, Any]) -> list[str]:
    rollout = experiment["rollout"]
    sentences = [f"it answers {100 * experiment['share']:.4g}% of the users"]
    if rollout["unwatched_s"] is not None:
        sentences.append(
            f"nothing has judged its rollout for {age(rollout['unwatched_s'])}: `springtide experiment rollout {experiment['name']}` "
            "continues"
        )
    if rollout["compared"] is None:
        return [*sentences, "no answer to a user is known yet"]
    trial, live = rollout["compared"]["arms"][TRIAL], rollout["compared"]["arms"][LIVE]
    sentences.append(
        f"{trial['rate']:.4f} engagements per answer over {trial['answers']:,} answers to {trial['users']:,} users, "
        f"against {live['rate']:.4f} over {live['answers']:,} to {live['users']:,}"
    )
    return [*sentences, rollout["compared"]["verdict"]]


def _figures(experiment: Mapping[str, Any]) -> ComparisonFigures | None:
    return None if experiment["compared"] is None else documents.convert(experiment["compared"], ComparisonFigures)


def retrain_status(settings: Settings, now_ms: int) -> dict[str, Any] | None:
    """Returns the schedule and the newest retrain; None if there is no schedule and never was one."""
    try:
        schedule = Experiments(settings).document().schedule
    except SpringtideError as error:
        return {"problem": str(error)}
    every_ms = span_ms(settings.retrain.every)
    if schedule is None:
        return None if every_ms is None else {"every": settings.retrain.every, "problem": ""}
    due_ms = None if every_ms is None or schedule.under_way else schedule.due_ms(every_ms)
    due_in_s = None if due_ms is None else (due_ms - now_ms) / 1000
    document: dict[str, Any] = {"every": settings.retrain.every, "problem": "", "due_ms": due_ms, "due_in_s": due_in_s}
    return {**document, **msgspec.to_builtins(schedule)}


def retrain_as_text(schedule: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the retrain's status: a word and a description.

    >>> over = msgspec.to_builtins(Schedule(0).begin(60_000).end("dropped", "worse: +0.2 nats an example", 90_000))
    >>> retrain_as_text({"problem": "", "every": "1d", **over, "due_ms": 86_460_000, "due_in_s": 3600.0})
    ('dropped', 'retrain-19700101-000100 of 1970-01-01T00:01:00Z: worse: +0.2 nats an example; the next one begins in 1 h 0 min')
    >>> retrain_as_text({"problem": "", "every": "1d", **msgspec.to_builtins(Schedule(0)), "due_ms": 5, "due_in_s": -3.0})
    ('none yet', 'the first one is due')
    """
    if schedule["problem"]:
        return "unknown", str(schedule["problem"])
    due_in_s = schedule.get("due_in_s")
    begins = "has not started" if due_in_s is None else f"begins in {age(due_in_s)}" if due_in_s > 0 else "is due"
    if not schedule.get("name"):
        return "none yet", f"the first one {begins}"
    newest = f"{schedule['name']} of {iso(schedule['begun_at_ms'])}"
    if not schedule["outcome"]:
        return OUTCOME_WORDS[""], newest
    following = f"the next one {begins}" if schedule["every"] else "retrain.every is empty: there is no next one"
    return OUTCOME_WORDS[schedule["outcome"]], f"{newest}: {schedule['reason']}; {following}"


class ExperimentCollector(Collector):
    """Exports the comparison of running experiments, the reported rollout, and the retrain schedule at each scrape."""

    def __init__(self, settings: Settings) -> None:
        self._experiments = Experiments(settings)
        self._every_ms = span_ms(settings.retrain.every)

    def collect(self) -> Iterable[Metric]:
        """Returns the current metrics; those of a damaged document are missing."""
        registry = CollectorRegistry()
        trials, rollouts = TrialMetrics(registry), RolloutMetrics(registry)
        with suppress(SpringtideError):
            document = self._experiments.document()
            for experiment in document.experiments:
                if experiment.runs:
                    with suppress(SpringtideError):
                        _export_comparison(
                            trials, experiment.name, read_figures(self._experiments.folder(experiment.name))
                        )
                if experiment.is_hosted or experiment.is_stopped_by_gate:
                    _export_rollout(rollouts, experiment, self._experiments.read_report(RolloutReport))
            if document.schedule is not None and self._every_ms is not None:
                _export_schedule(RetrainMetrics(registry), document.schedule, self._every_ms)
        return registry.collect()


def _export_comparison(metrics: TrialMetrics, name: str, figures: ComparisonFigures | None) -> None:
    if figures is None:
        return
    metrics.rows.labels(name).set(figures.rows)
    for side, loss in (("trial", figures.trial_log_loss), ("live", figures.live_log_loss)):
        if loss is not None:
            metrics.log_loss.labels(name, side).set(loss)
    for end, value in (("mean", figures.difference), ("low", figures.low), ("high", figures.high)):
        if value is not None:
            metrics.difference.labels(name, end).set(value)


def _export_rollout(metrics: RolloutMetrics, experiment: Experiment, report: RolloutReport | None) -> None:
    name = experiment.name
    report = report if report is not None and report.is_of(experiment) else None
    metrics.share_ratio.labels(name).set(experiment.share)
    metrics.stopped.labels(name).set(experiment.is_stopped_by_gate)
    if experiment.stage == "rollout" and experiment.phase == "running":
        metrics.judged_timestamp_seconds.labels(name).set(_judged_ms(experiment, report) / 1000)
    if report is None:
        return
    for arm, figures in report.arms.items():
        metrics.users.labels(name, arm).set(figures.users)
        metrics.answers.labels(name, arm).set(figures.answers)
        metrics.engagements.labels(name, arm).set(figures.engagements)
        metrics.failures.labels(name, arm).set(figures.failures)
    for gauge, interval in ((metrics.difference, report.difference), (metrics.lift_ratio, report.lift)):
        ends = {} if interval is None else {"mean": interval.value, "low": interval.low, "high": interval.high}
        for end, value in ends.items():
            if value is not None:
                gauge.labels(name, end).set(value)
    for finding in get_args(Finding):
        metrics.finding.labels(name, finding).set(finding == report.finding)
    metrics.mismatch_p.labels(name).set(report.mismatch_p)


def _export_schedule(metrics: RetrainMetrics, schedule: Schedule, every_ms: float) -> None:
    metrics.under_way.set(schedule.under_way)
    metrics.due.set(0 if schedule.under_way else schedule.due_ms(every_ms) / 1000)
    metrics.judged.set((schedule.judged_at_ms or schedule.since_ms) / 1000)
    for outcome in OUTCOMES:
        metrics.outcome.labels(outcome).set(schedule.outcome == outcome)
