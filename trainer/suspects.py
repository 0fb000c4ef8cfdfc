"""What the guard is told of a record, and which version and clicks a hold names. Pure but for the registry that it reads."""

from __future__ import annotations

from state.errors import UnknownVersion
from state.microbatch.batch import MicroBatch
from state.registry.held_update import SuspectClicks
from state.registry.manifest import sees
from state.registry.registry import Registry
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.guard.figures import StepFigures, crowds_of
from trainer.guard.window import WindowStart
from trainer.place import TrainingPlace


def figures_of(batch: MicroBatch, report: Report | None, log_ms: int) -> StepFigures:
    """What one record tells the guard.

    Args:
        batch: What was learned of it.
        report: Of the step; None without a row.
        log_ms: Log time after it.
    """
    ranges = batch.header.ranges
    covered, dead = sum(part.next - part.first for part in ranges), sum(part.dead for part in ranges)
    if report is None:
        return StepFigures(log_ms, 0, positions=covered, dead=dead)
    if report.verdict is not Verdict.ACCEPT:
        return StepFigures(log_ms, report.rows, report.rows, covered, dead, crowds=crowds_of(batch))
    scores = report.quality
    known, new = (
        (int(scores.total("rows", users=who)), scores.total("log_loss", users=who)) for who in ("known", "new")
    )
    return StepFigures(
        log_ms=log_ms,
        rows=report.rows,
        positions=covered,
        dead=dead,
        known=known,
        new=new,
        pairs=scores.pairs,
        engagement_loss=scores.engagement_log_loss,
        predicted=scores.predicted,
        positives=scores.positives,
        squared_norm=report.grad_norm**2,
        crowds=crowds_of(batch),
        slices=report.slices,
    )


def version_before(registry: Registry, place: TrainingPlace, offset: int) -> int:
    """The newest durable version of the trainer's line that learned nothing from `offset` of the training log on; 0 for none."""
    if not place.durable:
        return 0
    visible = registry.manifest(place.durable).visible
    for number in reversed(registry.versions()):
        if not sees(visible, number):
            continue
        try:
            if registry.manifest(number).log.next <= offset and registry.chain(number):
                return number
        except UnknownVersion:
            # Its base was given up: an older one may have its own.
            continue
    return 0


def clicks_learned(place: TrainingPlace) -> tuple[tuple[str, int, int], ...]:
    """How far the clicks of each partition were learned; of a partition in several shares, all of them."""
    found: dict[tuple[str, int], int] = {}
    for source, at in place.marks.items():
        name = (source.topic_id, source.partition)
        found[name] = min(at, found.get(name, at))
    return tuple((*name, at) for name, at in sorted(found.items()))


def suspect_clicks(since: WindowStart, after: TrainingPlace) -> tuple[SuspectClicks, ...]:
    """The clicks between both places."""
    first, ends = {(topic, part): at for topic, part, at in since.clicks}, dict[tuple[str, int], int]()
    for source, at in after.marks.items():
        name = (source.topic_id, source.partition)
        ends[name] = max(at, ends.get(name, at))
    return tuple(
        SuspectClicks(*name, first.get(name, 0), at) for name, at in sorted(ends.items()) if at > first.get(name, 0)
    )
