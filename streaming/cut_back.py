"""Opens the clicks after a truncation lost records before the read position, if the operator accepts the loss.

Downstream, each offset is one position. So a new click at an offset that was read before would be taken for the old
one. Reading therefore continues at the old position, never before it. If the log now ends before that position, it is
first filled up with empty records, so that new clicks get new offsets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from state.config.sections import Kafka
from state.errors import GapError, TruncatedLog
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import GAPS
from state.log import Log, Reader, Topics, Writer, accepted_gaps
from state.log.accepted_gaps import Accepted, Consent
from state.log.follow import Position, open_topic
from state.positions import Gap
from streaming import accounts

FILLER = b"springtide-filler"
AT_ONCE = 1000
logger = logging.getLogger(__name__)


def open_behind(
    log: Log,
    topic: str,
    partitions: Sequence[int] | None,
    position: Position,
    accepts: Callable[[TruncatedLog], None],
    fill: Callable[[Gap], None],
) -> Reader:
    """Opens the clicks at the position read so far, past any truncation that was accepted as lost.

    Args:
        log: Contains the clicks.
        topic: Their topic.
        partitions: The partitions to read; None for all, including later ones.
        position: The position read so far.
        accepts: Records who accepted a loss, or raises it.
        fill: Extends the log to the end of a gap.

    Raises:
        TruncatedLog: The truncation is not accepted.
        LogError: Kafka is unreachable.
    """

    def lost(error: GapError) -> int:
        if not isinstance(error, TruncatedLog):
            raise error
        (gap,) = error.gaps
        accepts(error)
        fill(gap)
        return gap.next

    return open_topic(log, topic, partitions, position, lost)[0]


def accept(store: HistoryStore, consent: Consent, now_ms: int, lost: TruncatedLog) -> None:
    """Durably records who accepted the truncation; does nothing if it was accepted before.

    Raises:
        TruncatedLog: The truncation is not accepted; nothing was changed.
    """
    known = accounts.accepted(store)
    new = newly_accepted(known, consent, now_ms, lost)
    if new:
        store.commit(Appends.none(), (), {GAPS: accepted_gaps.encode([*known, *new])})
        store.sync()


def newly_accepted(known: Sequence[Accepted], consent: Consent, now_ms: int, lost: TruncatedLog) -> list[Accepted]:
    """The records to store for an accepted truncation; empty if it was accepted before.

    Raises:
        TruncatedLog: The truncation is not accepted.
    """
    (gap,) = lost.gaps
    if any(one.gap == gap for one in known):
        return []
    if not (consent.cut_back or consent.covers(gap, gap.source.topic_id)):
        raise TruncatedLog(
            lost.what,
            f"{lost.do}. Clicks that are at these offsets now are never read: send them again, they get offsets of their own",
            lost.gaps,
        )
    logger.warning("accepted by %s (%s): %s; reading goes on at %d", consent.actor, consent.reason, lost.what, gap.next)
    return [accepted_gaps.accept(gap, consent, now_ms)]


def fill(kafka: Kafka, topics: Topics, make: Callable[[], Writer], gap: Gap) -> None:
    """Appends empty records to the clicks until they reach the end of `gap`.

    Raises:
        LogError: Kafka is unreachable, or refuses.
    """
    topic, partition = kafka.clicks_topic, gap.source.partition
    while (end := topics.ends(topic)[partition][1]) < gap.next:
        with make() as writer:
            for _ in range(min(AT_ONCE, gap.next - end)):
                writer.send(topic, partition, FILLER, None)
            writer.flush()
        logger.info("topic %s, partition %d: filled up from %d towards %d", topic, partition, end, gap.next)
