"""What an exact rollback needs and costs: where the log turns off, the clicks read again, the histories rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deploy.operate import plan
from state import layout
from state.config.settings import Settings
from state.errors import LogError, StoreError, UnknownVersion
from state.history.rewinding import records
from state.history.since import Since
from state.history.store import HistoryStore
from state.log import Reader, Topics
from state.positions import Source
from state.registry import log_line
from state.registry.control import Control
from state.registry.log_line import LogLine
from state.registry.manifest import Manifest

ASK_KAFKA_S = 5.0


@dataclass(frozen=True)
class ExactPlan:
    """What an exact rollback does beside a fast one.

    Attributes:
        line: The line of the training log that turns off at the version.
        clicks: Positions of the clicks that the stream reads again.
        histories: Users whose history has to be found in the training log again; None where no stream's store is here.
    """

    line: LogLine
    clicks: int
    histories: int | None

    def lines(self) -> list[str]:
        """It for people, one line per fact.

        >>> ExactPlan(log_line.WHOLE, 1234, 7).lines()[1]
        'histories     7 to be rebuilt from the training log; the others give back what they gained'
        """
        rebuilt = "not counted: the stream's store is not on this machine"
        if self.histories is not None:
            rebuilt = f"{self.histories:,} to be rebuilt from the training log; the others give back what they gained"
        return [
            f"stream        goes back too: {self.clicks:,} positions of the clicks are read again, into a new epoch of the log",
            f"histories     {rebuilt}",
        ]

    def document(self) -> dict[str, Any]:
        """It as JSON values."""
        return {"clicks": self.clicks, "histories": self.histories, "log_epoch": self.line[-1].epoch}


def exact_plan(settings: Settings, control: Control, to: Manifest) -> ExactPlan:
    """What going back to `to` exactly means; Kafka is asked.

    Raises:
        UnknownVersion: It is off the line of the log, or clicks or log no longer reach back to it.
        LogError: Kafka does not answer, or a topic was made anew.
    """
    kafka = replace(settings.kafka, request_timeout_s=min(ASK_KAFKA_S, settings.kafka.request_timeout_s))
    plan.require_on_line(control, to)
    with Topics(kafka) as topics:
        clicks_id, log_id = (topics.describe(name).topic_id for name in (kafka.clicks_topic, kafka.microbatches_topic))
        clicks, log = topics.ends(kafka.clicks_topic), topics.ends(kafka.microbatches_topic)
    begin, end = log[settings.trainer.partition]
    if log_id != to.log.topic_id or any(source.topic_id != clicks_id for source, _ in to.sources):
        raise LogError(
            f"version {to.version} was made from other topics than {kafka.clicks_topic} and {kafka.microbatches_topic} are now: "
            "they were made anew",
            "go back without --mode exact, which needs the training log alone, or restore the topics",
        )
    if to.log.next < begin:
        raise UnknownVersion(
            f"the training log begins at offset {begin} and version {to.version} goes on at {to.log.next}",
            "take a younger version; kafka.retention_h says for how long the log is kept",
        )
    for source, after in to.sources:
        if after < clicks[source.partition][0]:
            raise UnknownVersion(
                f"version {to.version} has the clicks of partition {source.partition} up to {after}, and the topic begins at "
                f"{clicks[source.partition][0]}: the clicks between are deleted and cannot be read again",
                "take a younger version, or go back without --mode exact, which needs the training log alone",
            )
    marks = to.marks
    again = sum(last - marks.get(Source(clicks_id, one), first) for one, (first, last) in clicks.items())
    line = log_line.turned(control.log, to.log.epoch, to.log.next, end, to.sources)
    return ExactPlan(line, again, _to_rebuild(replace(settings, kafka=kafka), control.log, to, end, marks))


def _to_rebuild(settings: Settings, line: LogLine, to: Manifest, end: int, marks: Mapping[Source, int]) -> int | None:
    """How many users' histories have lost events that they had at `to`."""
    found = None
    for path in layout.streams(settings.state_dir):
        try:
            store = HistoryStore(path, settings.features.history, settings.stream.map_gb << 30, readonly=True)
        except StoreError:
            continue
        partition = settings.trainer.partition
        try:
            since = Since(marks, store.positions())
            with Reader(
                settings.kafka, settings.kafka.microbatches_topic, [partition], {partition: to.log.next}
            ) as log:
                for batch in records(log, partition, to.log.next, end, line):
                    since.take(batch)
            found = (found or 0) + len(store.lacking(since, marks))
        finally:
            store.close()
    return found
