"""Opens the training log at the offset where a version ended, or after gaps that were accepted there."""

from __future__ import annotations

from collections.abc import Callable

from state.config.settings import Settings
from state.errors import GapError, UnknownTopic
from state.log import Log, Reader
from state.log.follow import Position, open_topic
from state.positions import Source
from state.process import killpoints
from state.registry.log_line import LogLine, onward
from state.registry.manifest import LogRange, Manifest
from trainer.accounts import Passages


def refuse(error: GapError) -> int:
    """Accepts no loss."""
    raise error


def open_after(
    log: Log,
    settings: Settings,
    end: LogRange,
    at: int,
    what: str,
    do: str,
    lost: Callable[[GapError], int] = refuse,
) -> Reader:
    """Opens the training log after the range that something was learned from.

    Args:
        log: Contains the training log.
        settings: Name its topic.
        end: The range.
        at: The offset at which to continue: that of the range, or after records that are skipped.
        what: What was learned from the range, for the message that the topic was recreated.
        do: What to do then.
        lost: See `open_topic`.

    Raises:
        UnknownTopic: The topic was recreated since.
        GapError: The log does not continue from there: deleted, or truncated (TruncatedLog).
    """
    topic, partition = settings.kafka.microbatches_topic, end.partition
    # The leader epochs of skipped records are unknown.
    leaders = {partition: end.leader_epoch} if at == end.next else {}
    reader, opening = open_topic(log, topic, [partition], Position(end.topic_id, {partition: at}, leaders), lost)
    if opening.recreated:
        reader.close()
        raise UnknownTopic(
            f"{what} topic id {end.topic_id}, {topic} is now {opening.topic_id}: it was deleted and made again", do
        )
    return reader


def resume(restored: Manifest, line: LogLine, log: Log, settings: Settings, passages: Passages) -> Reader:
    """Opens the log at the offset where `restored` continues along `line`.

    1. The version is loaded.
    2. The log is open at its offset.

    Nothing is written up to here: a crash leaves the same work to do.

    Raises:
        UnknownTopic: The log was recreated since that version.
        GapError: It no longer reaches back to that version, and the operator does not accept the gap.
        TruncatedLog: It was truncated before the version's end.
    """
    # 1.
    killpoints.reach("enter.restored")
    end = restored.log
    if not end.topic_id:
        # The version's log was lost with Kafka: the new log is read from its beginning.
        return log.reader(settings.kafka.microbatches_topic, [end.partition])
    at = passages.past(Source(end.topic_id, end.partition), onward(line, end.next))
    reader = open_after(
        log,
        settings,
        end,
        at,
        f"version {restored.version} was trained on",
        "restore the topic, or learn what the new one holds: `springtide upgrade --learn-anew --reason TEXT`",
        lambda error: onward(line, passages.pass_log(error, restored.marks)),
    )
    # 2.
    killpoints.reach("enter.opened")
    return reader
