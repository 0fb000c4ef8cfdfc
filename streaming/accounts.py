"""Accounts for every position of the clicks: outcomes, imbalances, gaps and truncations.

A truncated log can grow again, so that an offset is used twice. The stream never reads an offset twice: it continues at
the old position, up to which the log is first filled with empty records. The leader epochs of the clicks show it:

    leaders.json   {"<topic id>:<partition>": [[first offset, leader's epoch], ...]}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.disk import files as durable
from state.errors import GapError, TruncatedLog
from state.history.appends import Appends
from state.history.chunks import OUTCOMES
from state.history.store import HistoryStore
from state.layout import GAPS, LEADERS
from state.log import Log, Reader, accepted_gaps
from state.log.accepted_gaps import Accepted, Consent
from state.log.follow import Position, open_topic
from state.log.records import Known, epoch_before, noted
from state.metrics import StreamMetrics
from state.positions import RARE, Gap, Range, Source
from state.process import killpoints

OF_LABELS = ("opened", "feedback")
FILLER = b"springtide-filler"
FILLERS_PER_FLUSH = 1000
logger = logging.getLogger(__name__)


def missing(topic_id: str, committed: Mapping[Source, int], ends: Mapping[int, tuple[int, int]]) -> list[Gap]:
    """The positions of a topic that were deleted before they were read.

    `committed` has the next offset of each source; `ends` by partition the first retained offset and the end offset.
    """
    positions = {partition: committed.get(Source(topic_id, partition)) for partition in sorted(ends)}
    return [
        Gap(Source(topic_id, partition), position, ends[partition][0])
        for partition, position in positions.items()
        if position is not None and position < ends[partition][0]
    ]


def positions_in(store: HistoryStore, topic_id: str) -> dict[int, int]:
    """By partition of one topic, the next offset that the store has not read."""
    return {source.partition: after for source, after in store.positions().items() if source.topic_id == topic_id}


def as_ranges(gaps: Sequence[Gap]) -> tuple[Range, ...]:
    """Converts gaps to ranges in which every position counts as a gap."""
    return tuple(Range(gap.source, gap.first, gap.next, gap=gap.positions) for gap in gaps)


def accepted(store: HistoryStore) -> list[Accepted]:
    """All losses that were ever accepted, oldest first."""
    return accepted_gaps.decode(store.extra(GAPS))


def accept_gaps(gaps: Sequence[Gap], consent: Consent, topic: str, now_ms: int) -> list[Accepted]:
    """Returns the records of accepted gaps, and logs them.

    Raises:
        GapError: `consent` does not cover all of them.
    """
    refused = [gap for gap in gaps if not consent.covers(gap, gap.source.topic_id)]
    if refused:
        raise GapError(
            f"topic {topic}: positions were deleted before the stream read them: {'; '.join(map(str, refused))}",
            "restore them, or raise the topic's retention.ms for the next time",
            refused,
        )
    for gap in gaps:
        logger.warning("gap accepted by %s (%s): topic %s, %s", consent.actor, consent.reason, topic, gap)
    return [accepted_gaps.accept(gap, consent, now_ms) for gap in gaps]


def pass_gaps(
    store: HistoryStore,
    gaps: Sequence[Gap],
    consent: Consent,
    topic: str,
    now_ms: int,
    write: Callable[[Sequence[Gap], int], None],
) -> None:
    """Moves the stream past accepted gaps; does nothing if there are none.

    1. `write` adds the gaps to the training log, with the given creation time in ms, and returns once acknowledged.
       After a crash here it adds them twice, and readers drop the duplicate.
    2. The store advances past the positions, counts them as `gap` and records who accepted them.

    Raises:
        GapError: `consent` does not cover all of them; nothing was changed.
    """
    if not gaps:
        return
    records = accept_gaps(gaps, consent, topic, now_ms)
    # 1.
    write(gaps, now_ms)
    killpoints.reach("gaps.written")
    # 2.
    store.commit(Appends.none(), as_ranges(gaps), {GAPS: accepted_gaps.encode([*accepted(store), *records])})
    killpoints.reach("gaps.committed")
    store.sync()


class Leaders:
    """The leader epochs of the clicks that were read, in an existing directory. Only one thread may call `note`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEADERS
        document = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        self._known: dict[Source, Known] = {
            Source.parse(source): tuple((int(first), int(epoch)) for first, epoch in epochs)
            for source, epochs in document.items()
        }
        self._unwritten = False

    def at(self, topic_id: str, positions: Mapping[int, int]) -> dict[int, int]:
        """By partition the epoch of the record before its position, where it is known."""
        epochs = {
            partition: epoch_before(self._known.get(Source(topic_id, partition), ()), offset)
            for partition, offset in positions.items()
        }
        return {partition: epoch for partition, epoch in epochs.items() if epoch >= 0}

    def note(self, ranges: Iterable[Range], reader: Reader) -> None:
        """Stores the epochs of the last records of `ranges`, as `reader` read them; durable when this returns.

        It must run before anything of these ranges is committed.

        Raises:
            OSError: The file cannot be written.
        """
        for part in ranges:
            epochs = self._known.get(part.source, ())
            epoch = reader.leader_epoch(part.source.partition, part.next)
            if epoch >= 0 and epoch_before(epochs, part.next) != epoch:
                # The epoch is stored from the range's first offset on. A rollback may end inside the range, where an
                # epoch that ended earlier would look like a truncated log.
                self._known[part.source] = noted(epochs, part.first, epoch)
                self._unwritten = True
        if self._unwritten:
            document = {str(source): epochs for source, epochs in self._known.items()}
            durable.replace(self._path, json.dumps(document, sort_keys=True).encode())
            self._unwritten = False


def open_clicks(
    log: Log, kafka: Kafka, partitions: Sequence[int] | None, position: Position, accept: Callable[[TruncatedLog], None]
) -> Reader:
    """Opens the clicks at the position read so far, past any truncation that was accepted.

    `partitions` None reads all partitions, including later ones. `accept` records who accepted a truncation, or raises it.

    Raises:
        TruncatedLog: From `accept`.
        LogError: Kafka is unreachable.
    """

    def lost(error: GapError) -> int:
        if not isinstance(error, TruncatedLog):
            raise error
        (gap,) = error.gaps
        accept(error)
        _fill(log, kafka.clicks_topic, gap)
        return gap.next

    return open_topic(log, kafka.clicks_topic, partitions, position, lost)[0]


def accept_truncation(store: HistoryStore, consent: Consent, now_ms: int, lost: TruncatedLog) -> None:
    """Durably records who accepted the truncation; does nothing if it was accepted before.

    Raises:
        TruncatedLog: The truncation is not accepted; nothing was changed.
    """
    gaps_accepted = accepted(store)
    if new := newly_accepted(gaps_accepted, consent, now_ms, lost):
        store.commit(Appends.none(), (), {GAPS: accepted_gaps.encode([*gaps_accepted, *new])})
        store.sync()


def newly_accepted(
    gaps_accepted: Sequence[Accepted], consent: Consent, now_ms: int, lost: TruncatedLog
) -> list[Accepted]:
    """The records to store for an accepted truncation; empty if it was accepted before.

    Raises:
        TruncatedLog: The truncation is not accepted.
    """
    (gap,) = lost.gaps
    if any(record.gap == gap for record in gaps_accepted):
        return []
    if not (consent.cut_back or consent.covers(gap, gap.source.topic_id)):
        raise TruncatedLog(
            lost.what,
            f"{lost.do}. Clicks that are at these offsets now are never read: send them again, they get offsets of their own",
            lost.gaps,
        )
    logger.warning(
        "accepted by %s (%s): %s; reading continues at %d", consent.actor, consent.reason, lost.what, gap.next
    )
    return [accepted_gaps.accept(gap, consent, now_ms)]


def _fill(log: Log, topic: str, gap: Gap) -> None:
    partition = gap.source.partition
    with log.topics() as topics:
        while (end := topics.ends(topic)[partition][1]) < gap.next:
            with log.writer() as writer:
                for _ in range(min(FILLERS_PER_FLUSH, gap.next - end)):
                    writer.send(topic, partition, FILLER, None)
                writer.flush()
            logger.info("topic %s, partition %d: filled from %d towards %d", topic, partition, end, gap.next)


def faults(store: HistoryStore) -> tuple[str, ...]:
    """Describes where the store's accounts do not balance: by source, and for all waiting impressions together."""
    counts, waiting = store.cut()
    accounts = {source: StreamAccount.of(count) for source, count in counts.items()}
    faults_found = [f"{source}: {fault}" for source, account in accounts.items() for fault in check_accounts(account)]
    must_wait = sum(account.waiting for account in accounts.values())
    if must_wait != waiting:
        faults_found.append(f"{must_wait} impressions must be waiting for their label, and {waiting} are")
    return tuple(faults_found)


def show(store: HistoryStore, metrics: StreamMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the account's gauges, which survive restarts, and returns the imbalances; logs those other than `known`."""
    show_totals(metrics, store.totals, store.waiting_rows())
    return show_faults(metrics, faults(store), known)


def show_totals(metrics: StreamMetrics, counts: Mapping[str, int], waiting: int) -> None:
    """Sets an account's gauges from `state.history.chunks.summed_counts` and the number of waiting impressions."""
    totals = dict.fromkeys(RARE, 0) | dict(counts)
    for name in ("positions", *OUTCOMES, *OF_LABELS, "gap", "masked"):
        metrics.accounting_positions.labels(name).set(totals[name])
    for name in ("opened", "joined", "expired", "dropped"):
        metrics.accounting_labels.labels(name).set(totals[name])
    # An outcome labels at most one impression.
    metrics.accounting_labels.labels("unmatched").set(totals["feedback"] - totals["joined"])
    metrics.accounting_labels.labels("waiting").set(waiting)


def show_faults(metrics: StreamMetrics, faults_found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Sets the gauge of imbalances, and logs them if they differ from `known`; returns `faults_found`."""
    if faults_found and faults_found != known:
        logger.error("the account of the clicks does not balance: %s", "; ".join(faults_found))
    metrics.accounting_faults.set(len(faults_found))
    return faults_found
