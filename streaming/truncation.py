"""Detects clicks that were truncated before the read position, and continues behind them if the operator accepts it.

    leaders.json   {"<topic id>:<partition>": [[first offset, leader's epoch], ...]}

The file is next to the histories. At the next start it shows whether the clicks were truncated before a position
(`state/log/records.py`). It is written when a partition gets another leader, before anything of that leader is
committed. So it also holds for positions that result from a rebuild or a rollback.

Downstream, each offset is one position. So a new click at an offset that was read before would be taken for the old
one. Reading therefore continues at the old position, never before it. If the log now ends before that position, it is
first filled up with empty records, so that new clicks get new offsets.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from state.config.sections import Kafka
from state.disk import files as durable
from state.errors import GapError, TruncatedLog
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import GAPS, LEADERS
from state.log import Log, Reader, Topics, Writer, accepted_gaps
from state.log.accepted_gaps import Accepted, Consent
from state.log.follow import Position, open_topic
from state.log.records import Known, epoch_before, noted
from state.positions import Gap, Range, Source
from streaming import accounts


class Leaders:
    """The leader epochs of one shard. Only one thread may call `note`.

    Args:
        folder: The shard's directory, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEADERS
        kept = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        self._known: dict[Source, Known] = {
            Source.parse(source): tuple((int(first), int(epoch)) for first, epoch in known)
            for source, known in kept.items()
        }

        self._unwritten = False

    def at(self, topic_id: str, positions: Mapping[int, int]) -> dict[int, int]:
        """By partition the epoch of the record before its position, for those where it is known."""
        found = {
            partition: epoch_before(self._known.get(Source(topic_id, partition), ()), offset)
            for partition, offset in positions.items()
        }
        return {partition: epoch for partition, epoch in found.items() if epoch >= 0}

    def note(self, ranges: Iterable[Range], reader: Reader) -> None:
        """Stores the epochs of the last records of `ranges`, as `reader` read them; durable when this returns.

        Raises:
            OSError: The file cannot be written.
        """
        for part in ranges:
            known = self._known.get(part.source, ())
            epoch = reader.leader_epoch(part.source.partition, part.next)
            if epoch >= 0 and epoch_before(known, part.next) != epoch:
                # From the first record on: a rollback may end inside the range, and an epoch that ended before that
                # position would look like a truncated log.
                self._known[part.source] = noted(known, part.first, epoch)
                self._unwritten = True
        if self._unwritten:
            document = {str(source): known for source, known in self._known.items()}
            durable.replace(self._path, json.dumps(document, sort_keys=True).encode())
            self._unwritten = False


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
