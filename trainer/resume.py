"""Opens the training log at the offset where a version ended, or after gaps that were accepted there."""

from __future__ import annotations

from typing import Protocol

from state.errors import GapError, TruncatedLog, UnknownTopic
from state.log import LogReader
from state.positions import Source
from state.process import killpoints
from state.registry.log_line import LogLine, onward
from state.registry.manifest import Manifest
from trainer.accounts import Passages


class OpenLog(Protocol):
    """Opens the training log."""

    def __call__(self, offset: int | None, leader: int = -1) -> LogReader:
        """Opens the log at an offset.

        Args:
            offset: None is its beginning.
            leader: The leader epoch of the record before it; -1 if unknown.
        """
        ...


def resume(restored: Manifest, line: LogLine, open_log: OpenLog, passages: Passages) -> tuple[LogReader, int]:
    """Opens the log at the offset where `restored` continues along `line`; returns the log and that offset.

    1. The version is loaded.
    2. The log is open at its offset.

    Nothing is written up to here: a crash leaves the same work to do.

    Raises:
        UnknownTopic: The log was recreated since that version.
        GapError: It no longer reaches back to that version, and the operator does not accept the gap.
        TruncatedLog: It was cut back to before the version's end.
    """
    # 1.
    killpoints.reach("enter.restored")
    if not restored.log.topic_id:
        # The version's log was lost with Kafka: the new log is read from its beginning.
        log = open_log(None)
        return log, log.position(restored.log.partition)
    source = Source(restored.log.topic_id, restored.log.partition)
    at = passages.past(source, onward(line, restored.log.next))
    try:
        # If records are skipped on the way, the leader epoch of the record before `at` is unknown.
        log = open_log(at, restored.log.leader_epoch if at == restored.log.next else -1)
    except TruncatedLog:
        raise
    except GapError as error:
        at = onward(line, passages.pass_log(error, restored.marks))
        log = open_log(at)
    if restored.log.topic_id != log.topic_id:
        log.close()
        raise UnknownTopic(
            f"version {restored.version} was trained on topic id {restored.log.topic_id}, {restored.log.topic} is now "
            f"{log.topic_id}: it was deleted and made again",
            "restore the topic, or learn what the new one holds: `springtide upgrade --learn-anew --reason TEXT`",
        )
    # 2.
    killpoints.reach("enter.opened")
    return log, at
