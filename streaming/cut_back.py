"""Opens the clicks behind a place where they were cut back, where somebody accepts that.

Offsets that are used twice are one position each for everybody behind us: the
click that is there now would be taken for the one that we read. So reading goes
on where we were, never before it. Where the log ends before that, it is filled
up with empty records first: what comes next has offsets of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from state.config.sections import Kafka
from state.errors import TruncatedLog
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import GAPS
from state.log import LogReader, LogTopics, LogWriter, accepted_gaps
from state.log.accepted_gaps import Accepted
from state.log.gaps import Consent
from state.positions import Gap
from streaming import accounts

FILLER = b"springtide-filler"
AT_ONCE = 1000
logger = logging.getLogger(__name__)

Opens = Callable[[Mapping[int, int]], LogReader]
"""Opens the clicks where they were read to, told these leaders' epochs."""


def open_behind(
    opens: Opens,
    told: Mapping[int, int],
    accepts: Callable[[TruncatedLog], None],
    fill: Callable[[Gap], None],
) -> LogReader:
    """The clicks from where they were read to, behind what was cut back and accepted as lost.

    Args:
        opens: Opens them.
        told: By partition the leader's epoch of the record before the position.
        accepts: Keeps who accepted a loss, or raises it.
        fill: Makes the log reach to the end of a gap.

    Raises:
        TruncatedLog: Nobody accepts it.
        LogError: Kafka is not reachable.
    """
    left = dict(told)
    while True:
        try:
            return opens(left)
        except TruncatedLog as lost:
            (gap,) = lost.gaps
            accepts(lost)
            fill(gap)
            left.pop(gap.source.partition, None)


def accept(store: HistoryStore, consent: Consent, now_ms: int, lost: TruncatedLog) -> None:
    """Keeps who accepted it, durably; does nothing where it was accepted before.

    Raises:
        TruncatedLog: Nobody accepts it; nothing was changed.
    """
    known = accounts.accepted(store)
    new = newly_accepted(known, consent, now_ms, lost)
    if new:
        store.commit(Appends.none(), (), {GAPS: accepted_gaps.encode([*known, *new])})
        store.sync()


def newly_accepted(known: Sequence[Accepted], consent: Consent, now_ms: int, lost: TruncatedLog) -> list[Accepted]:
    """What is to be kept of a loss that somebody accepts: nothing where it was accepted before.

    Raises:
        TruncatedLog: Nobody accepts it.
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


def fill(kafka: Kafka, topics: LogTopics, make: Callable[[], LogWriter], gap: Gap) -> None:
    """Writes empty records to the clicks until they reach to the end of `gap`.

    Raises:
        LogError: Kafka is not reachable, or refuses.
    """
    topic, partition = kafka.clicks_topic, gap.source.partition
    while (end := topics.ends(topic)[partition][1]) < gap.next:
        with make() as writer:
            for _ in range(min(AT_ONCE, gap.next - end)):
                writer.send(topic, partition, FILLER, None)
            writer.flush()
        logger.info("topic %s, partition %d: filled up from %d towards %d", topic, partition, end, gap.next)
