"""One evaluation: reads the recording, creates a new model as a bootstrap would, and passes over all records once."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from deploy.attributes import AttributeFiles
from deploy.formats import iso
from evaluation import report
from evaluation.progressive import Plan, ProgressiveValidation, ServingHost, clicks_of
from evaluation.recording import SALT, KnownFields, RecordedEvents, micro_batches, open_attributes
from evaluation.report import Evaluation
from state.config.settings import Settings
from state.errors import SettingsError
from state.events.parser import EventBatch
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch, happened
from state.process.log_lines import Pace, ProgressLine, bar
from state.process.part import quiet_stderr
from state.recordings.rows import shown_reasons
from streaming.preprocessing import SAMPLE_ROWS, analysed, load_preprocessing
from trainer.device import prepare
from trainer.engine.step import Trainer
from trainer.model.model import Preprocessing
from trainer.model.preprocessing import preprocessing_of
from trainer.versions.lowering import build
from trainer.versions.starting import trainer_of

LINE_EVERY_S = 10.0
BAR = 20
DECIDING = ("events.", "features.", "labels.", "model.", "trainer.")
"""Sections whose changed settings are part of the result."""


class Wanted(NamedTuple):
    """The last events, or those from a time on, that are evaluated, and about how many requests precede one of them."""

    last: int | None = None
    from_ms: int | None = None
    requests: int = 2000
    seed: int = 7


def begin_of(events: RecordedEvents, wanted: Wanted) -> int:
    """Returns the index of the first evaluated event; raises SettingsError if there is none."""
    count = len(events)
    if wanted.last is not None:
        if wanted.last < 1:
            raise SettingsError(f"--last {wanted.last}: write how many clicks, 1 or more")
        return max(0, count - wanted.last)
    if wanted.from_ms is None:
        return 0
    times = np.maximum.accumulate(events.column("at_ms"))
    begin = int(np.searchsorted(times, wanted.from_ms))
    if begin == count:
        raise SettingsError(
            f"--from {iso(wanted.from_ms)} is after the last click of the recording, {iso(int(times[-1]))}",
            "write an earlier time",
        )
    return begin


def analyse(
    settings: Settings, spec: FeatureSpec, events: RecordedEvents, attributes: KnownFields | None
) -> Preprocessing:
    """The preprocessing with the feature constants that a bootstrap finds in the first `SAMPLE_ROWS` rows."""
    first = list[EventBatch]()
    for batch in events.batches:
        if sum(map(len, first)) >= SAMPLE_ROWS:
            break
        first.append(batch)
    with quiet_stderr(), micro_batches(settings, spec, events, attributes, first) as batches:
        return preprocessing_for([np.concatenate([batch.features for batch in batches])], settings)


def preprocessing_for(features: Iterable[NDArray[Any]], settings: Settings) -> Preprocessing:
    """The preprocessing with the feature constants of some rows, `[n, F]` uint16 each."""
    # Sets the threads before TensorFlow's first operation, which is the analysis.
    prepare(settings.trainer.device, settings.trainer.threads)
    with tempfile.TemporaryDirectory(prefix="springtide-analysis-") as folder:
        analysed(features, load_preprocessing(settings.model.preprocessing, settings.model), Path(folder))
        return preprocessing_of(Path(folder))


def evaluate(
    settings: Settings,
    events: RecordedEvents,
    wanted: Wanted,
    progress_to: TextIO,
    stopped: threading.Event,
    attributes: Sequence[AttributeFiles] = (),
) -> Evaluation:
    """Evaluates a recording; nothing is written to the directories of `settings`.

    `stopped` ends the pass early; the result then covers the events up to that point.

    Raises:
        SettingsError: Nothing can be evaluated.
        ProgramError: The model cannot be lowered.
        TrainingHeld: The guard of updates held training.
    """
    if settings.privacy.epsilon:
        raise SettingsError(
            "an evaluation learns without the noise of privacy.epsilon", "set --privacy.epsilon 0 to evaluate the model"
        )
    begin = begin_of(events, wanted)
    clicks = clicks_of(settings, *(events.column(name) for name in ("item", "label", "action")))
    if wanted.requests and not clicks.any():
        raise SettingsError(
            "no click has an item: there is nothing to recommend",
            "name the field in events.item, or use --requests 0 to evaluate interests alone",
        )
    offsets: NDArray[Any] = events.column("offset")
    evaluated = int(clicks[begin:].sum())
    every = max(1, round(evaluated / wanted.requests)) if wanted.requests else 0
    plan = Plan(int(offsets[begin]), every, wanted.seed)
    progress = ProgressLine(progress_to, LINE_EVERY_S, at_once=True)
    spec = FeatureSpec.from_settings(settings)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="springtide-evaluate-"))
        own = replace(settings, paths=replace(settings.paths, state=folder))
        progress.say(f"analysing the features of the first {min(len(events), SAMPLE_ROWS):,} events")
        known = stack.enter_context(open_attributes(own, attributes))
        trainer = trainer_of(own, spec, analyse(own, spec, events, known))
        host = None
        if every:
            host = open_host(own, spec, trainer, known)
            stack.callback(host.close)
        validation = ProgressiveValidation(own, trainer, host, plan, events.contexts)
        batches = stack.enter_context(micro_batches(own, spec, events, known))
        done, took_s = learn_all(validation, batches, len(events), progress, stopped)
    if done <= begin:
        raise SettingsError(f"stopped after {done:,} events, before the first evaluated one", "let it run on")
    return result(settings, events, (begin, done), plan, validation, took_s)


def learn_all(
    validation: ProgressiveValidation,
    batches: Iterable[MicroBatch],
    events: int,
    progress: ProgressLine,
    stopped: threading.Event,
) -> tuple[int, float]:
    """Predicts and learns all records, or those before `stopped`; returns their number of events and the time in s."""
    began_s, done, pace = time.monotonic(), 0, Pace(events)

    def line() -> str:
        return progress_line(done, events, time.monotonic() - began_s, pace.rate())

    for batch in batches:
        validation.take(batch)
        done += int(happened(batch.kind).sum())
        pace.add(done, time.monotonic())
        progress.show(line)
        if stopped.is_set():
            progress.say(f"stopped: the figures are those of the first {done:,} events")
            break
    progress.show(line, last=True)
    return done, time.monotonic() - began_s


def open_host(
    settings: Settings, spec: FeatureSpec, trainer: Trainer, attributes: KnownFields | None = None
) -> ServingHost:
    """Returns a serving host for the versions of a trainer."""
    store = None if attributes is None else attributes.store
    with quiet_stderr():
        return ServingHost(settings, spec, SALT, build(trainer.ranker()), store)


def progress_line(done: int, total: int, took_s: float, rate: float | None) -> str:
    """The progress as one line. `rate` is in events per second, None while it is unknown.

    >>> progress_line(500, 2000, 0.1, 5000.0), progress_line(12, 2000, 70.0, None)
    ('[#####---------------]  25 %  500 of 2,000 events  5,000 events/s  0 s left', '[--------------------]   0 %  12 of 2,000 events')
    """
    line = f"{bar(done, total, BAR)}  {done:,} of {total:,} events"
    if rate is not None:
        line += f"  {rate:,.0f} events/s"
    if done >= total:
        return f"{line}  {took_s:,.0f} s"
    return line if rate is None else f"{line}  {(total - done) / rate:,.0f} s left"


def result(
    settings: Settings,
    events: RecordedEvents,
    part: tuple[int, int],
    plan: Plan,
    validation: ProgressiveValidation,
    took_s: float,
) -> Evaluation:
    """The tables of a finished pass."""
    begin, end = part
    at_ms: NDArray[Any] = events.column("at_ms")
    items = np.unique(events.column("item"))
    item_count = int(items.size - (items[:1] == 0).sum())
    recommendation = report.recommendation_tables(validation.asked)
    if recommendation:
        recommendation[0] = report.with_coverage(recommendation[0], validation.lists, item_count)
    refused = f"; {shown_reasons(events.refused)}" if events.refused else ""
    return Evaluation(
        recording={
            "source": events.source,
            "events": len(events),
            "users": len(np.unique(events.column("user"))),
            "items": item_count,
            "categories": int(np.count_nonzero(np.unique(events.column("category")))),
            "refused": refused,
            "begin": iso(int(at_ms.min())),
            "end": iso(int(at_ms.max())),
        },
        evaluated={
            "events": end - begin,
            "begin": iso(int(at_ms[begin])),
            "end": iso(int(at_ms[begin:end].max())),
        },
        options={
            "every": plan.every,
            "seed": plan.seed,
            "record_rows": events.limits.rows,
            "record_s": events.limits.span_s,
            "ranker": settings.model.ranker or "default",
            "settings": {name: str(settings.value(name)) for name in settings.origins if name.startswith(DECIDING)},
        },
        interests=report.interests_tables(validation.interests),
        engagement=report.engagement_tables(validation.engagements),
        recommendation=recommendation,
        sources=report.sources_of(
            validation.lists, [one.candidate for one in validation.asked], [one.hit for one in validation.asked]
        ),
        unseen_sources=report.sources_of(validation.unseen_lists, [], [one.unseen_hit for one in validation.asked]),
        periods=report.periods(validation),
        took_s=took_s,
    )
