"""Opens the training log where a version left it, or behind what was accepted as lost there."""

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
        """The log at an offset.

        Args:
            offset: None is its beginning.
            leader: The leader's epoch of the record before it; -1 where that is not known.
        """
        ...


def resume(restored: Manifest, line: LogLine, open_log: OpenLog, passages: Passages) -> tuple[LogReader, int]:
    """The log at the offset where `restored` goes on along `line`, and that offset.

    1. The version was loaded.
    2. The log is open at its place.

    Nothing was written so far: a crash leaves the same to be done.

    Raises:
        UnknownTopic: The log was made anew since that version.
        GapError: It does not reach back to that version any more, and nobody accepted it.
        TruncatedLog: It was cut back behind that version.
    """
    # 1.
    killpoints.reach("enter.restored")
    if not restored.log.topic_id:
        # Its log is lost with Kafka: another one is read from its beginning.
        log = open_log(None)
        return log, log.position(restored.log.partition)
    source = Source(restored.log.topic_id, restored.log.partition)
    at = passages.past(source, onward(line, restored.log.next))
    try:
        # Who wrote what is passed over on the way there is not known.
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
