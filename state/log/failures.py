"""The errors of a log: each function makes one error, with advice.

Part of `state.log`. Every implementation of a log uses these messages.
"""

from __future__ import annotations

from state.config.sections import Kafka
from state.errors import FencedWriter, GapError, TruncatedLog, UnknownTopic, UnreachableBroker
from state.positions import Gap, Source


def unreachable(settings: Kafka, doing: str, cause: BaseException | str) -> UnreachableBroker:
    """The error for a broker that does not answer, with what to check."""
    why = cause if isinstance(cause, str) else first_line(cause)
    return UnreachableBroker(
        f"cannot {doing}: no broker at {settings.bootstrap_servers} answered in time ({why})",
        "check that it runs and that "
        "kafka.bootstrap_servers, kafka.security_protocol, kafka.sasl_* and kafka.ssl_* are right",
    )


def unknown_topic(settings: Kafka, doing: str) -> UnknownTopic:
    """The error for a topic that does not exist; topics are never created implicitly."""
    return UnknownTopic(
        f"cannot {doing}: it does not exist on {settings.bootstrap_servers}",
        "create it, or correct its name in [kafka]",
    )


def unknown_partition(topic: str, partition: int, partitions: int) -> UnknownTopic:
    """The error for a partition that a topic does not have."""
    return UnknownTopic(f"topic {topic} has no partition {partition}, only {partitions}", "name those that it has")


def made_again(topic: str, before: str, now: str) -> UnknownTopic:
    """The error for a topic that was deleted and created again under the same name."""
    return UnknownTopic(
        f"topic {topic} was deleted and made again (id {before} is now {now})",
        "our "
        "positions belong to the old one: a stream started again reads new clicks from their beginning, a "
        "trainer learns the new one after `springtide upgrade --learn-anew --reason TEXT`",
    )


def fenced(doing: str) -> FencedWriter:
    """The error for a writer whose transactional id another writer took over."""
    return FencedWriter(
        f"cannot {doing}: another writer took over this transactional id",
        "stop one of the two: one stream reads all partitions",
    )


def gap(topic: str, topic_id: str, partition: int, ours: int, begin: int, end: int) -> GapError:
    """The error for a position outside a partition: deleted before we read it, or truncated.

    Args:
        topic: The topic's name.
        topic_id: Its id.
        partition: Number of the partition.
        ours: Our position.
        begin: The first position kept.
        end: The position of the next record.
    """
    if ours < begin:
        return GapError(
            f"topic {topic} partition {partition}: we were at {ours}, but the log now begins at {begin}: "
            f"{begin - ours} positions were deleted unread",
            "restore them, raise the topic's retention.ms, or accept the loss",
            [Gap(Source(topic_id, partition), ours, begin)],
        )
    return truncated(topic, topic_id, partition, ours, end, end)


def truncated(topic: str, topic_id: str, partition: int, ours: int, kept: int, end: int) -> TruncatedLog:
    """The error for a partition that was truncated below our position, and may have grown again since.

    Args:
        topic: The topic's name.
        topic_id: Its id.
        partition: Number of the partition.
        ours: Our position.
        kept: The offset up to which the log is still the one that was read.
        end: The position of the next record.
    """
    again = f" and has grown again to {end}" if end > kept else ""
    return TruncatedLog(
        f"topic {topic} partition {partition}: we were at {ours}, but what we read ends at {kept}: the log was cut back"
        f"{again}, so that offsets {kept} to {ours - 1} are used twice (a leader was elected that lacked records, a broker "
        "lost what was not on disk, the topic was made again, or another cluster answers)",
        "look after the brokers (unclean.leader.election.enable=false, min.insync.replicas) and restore the log if you can",
        [Gap(Source(topic_id, partition), kept, ours)],
    )


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message; its class name if there is no message."""
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
