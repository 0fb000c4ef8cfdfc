"""What the stream owes an account of: each position's outcome, and the gaps that nobody can read any more.

A gap that an operator accepts goes through the same two steps as clicks do:
the training log says it in the ranges of a micro-batch without rows, then the
store moves over it, with who accepted it, in one commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from state.accounts import StreamAccount, check_accounts
from state.errors import GapError
from state.history.appends import Appends
from state.history.counts import OUTCOMES
from state.history.store import HistoryStore
from state.layout import GAPS
from state.log import accepted_gaps
from state.log.accepted_gaps import Accepted
from state.log.gaps import Consent
from state.metrics import StreamMetrics
from state.positions import RARE, Gap, Range, Source
from state.process import killpoints

OF_LABELS = ("opened", "feedback")
logger = logging.getLogger(__name__)


def missing(topic_id: str, committed: Mapping[Source, int], ends: Mapping[int, tuple[int, int]]) -> list[Gap]:
    """The positions of a topic that were deleted before they were read.

    >>> missing("ab" * 16, {Source("ab" * 16, 0): 5, Source("ab" * 16, 1): 7}, {0: (5, 9), 1: (10, 12), 2: (3, 3)})
    [Gap(source=Source(topic_id='abababababababababababababababab', partition=1, bucket=0, buckets=1), first=7, next=10)]

    Args:
        topic_id: Id of the topic as it is now.
        committed: The next offset of each source.
        ends: By partition the first offset kept and the offset after the last one.
    """
    at = {partition: committed.get(Source(topic_id, partition)) for partition in sorted(ends)}
    return [
        Gap(Source(topic_id, partition), ours, ends[partition][0])
        for partition, ours in at.items()
        if ours is not None and ours < ends[partition][0]
    ]


def positions_in(store: HistoryStore, topic_id: str) -> dict[int, int]:
    """By partition of one topic the next offset that the store has not read."""
    return {source.partition: after for source, after in store.positions().items() if source.topic_id == topic_id}


def as_ranges(found: Sequence[Gap]) -> tuple[Range, ...]:
    """Ranges in which every position is a gap."""
    return tuple(Range(gap.source, gap.first, gap.next, gap=gap.positions) for gap in found)


def accepted(store: HistoryStore) -> list[Accepted]:
    """The gaps that were ever passed, oldest first."""
    return accepted_gaps.decode(store.extra(GAPS))


def require_accepted(found: Sequence[Gap], consent: Consent, topic: str) -> None:
    """Refuses gaps that `consent` does not cover.

    Raises:
        GapError: There are such.
    """
    refused = [gap for gap in found if not consent.covers(gap, gap.source.topic_id)]
    if refused:
        raise GapError(
            f"topic {topic}: positions were deleted before the stream read them: {'; '.join(map(str, refused))}",
            "restore them, or raise the topic's retention.ms for the next time",
            refused,
        )


def pass_gaps(
    store: HistoryStore,
    found: Sequence[Gap],
    consent: Consent,
    topic: str,
    now_ms: int,
    write: Callable[[Sequence[Gap], int], None],
) -> None:
    """Moves the stream over gaps that `consent` covers; does nothing where there is none.

    1. `write` tells the training log; a crash after it tells it twice, and readers trim that.
    2. The store moves on, counts the positions as `gap` and keeps who accepted them.

    Args:
        store: The stream's.
        found: What is missing.
        consent: What the operator accepts.
        topic: The topic's name, for the message.
        now_ms: Wall clock.
        write: Writes the micro-batch with the gaps, made at that time, acknowledged.

    Raises:
        GapError: One of them is not accepted; nothing was changed.
    """
    if not found:
        return
    require_accepted(found, consent, topic)
    # 1.
    write(found, now_ms)
    killpoints.reach("gaps.written")
    # 2.
    record = [*accepted(store), *(accepted_gaps.accept(gap, consent, now_ms) for gap in found)]
    store.commit(Appends.none(), as_ranges(found), {GAPS: accepted_gaps.encode(record)})
    killpoints.reach("gaps.committed")
    store.sync()
    for gap in found:
        logger.warning("gap accepted by %s (%s): topic %s, %s", consent.actor, consent.reason, topic, gap)


def faults(store: HistoryStore) -> tuple[str, ...]:
    """Where the store's accounts do not balance, source by source, and that of the rows that wait over all."""
    counts, waiting = store.cut()
    accounts = {source: StreamAccount.of(one) for source, one in counts.items()}
    found = [f"{source}: {fault}" for source, one in accounts.items() for fault in check_accounts(one)]
    must_wait = sum(one.waiting for one in accounts.values())
    if must_wait != waiting:
        found.append(f"{must_wait} impressions must be waiting for their label, and {waiting} are")
    return tuple(found)


def show(store: HistoryStore, metrics: StreamMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the gauges of the account, which go on over restarts; says aloud what does not balance beyond `known`."""
    show_totals(metrics, store.totals, store.waiting_rows())
    return show_faults(metrics, faults(store), known)


def show_totals(metrics: StreamMetrics, counts: Mapping[str, int], waiting: int) -> None:
    """Sets the gauges of an account.

    Args:
        metrics: Of the process.
        counts: As `state.history.counts.summed` gives them.
        waiting: Impressions that wait.
    """
    totals = dict.fromkeys(RARE, 0) | dict(counts)
    for name in ("positions", *OUTCOMES, *OF_LABELS, "gap", "masked"):
        metrics.accounting_positions.labels(name).set(totals[name])
    for name in ("opened", "joined", "expired", "dropped"):
        metrics.accounting_labels.labels(name).set(totals[name])
    # An outcome labels one impression at most.
    metrics.accounting_labels.labels("unmatched").set(totals["feedback"] - totals["joined"])
    metrics.accounting_labels.labels("waiting").set(waiting)


def show_faults(metrics: StreamMetrics, found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Counts what does not balance, and says it aloud where it is another than `known`; returns `found`."""
    if found and found != known:
        logger.error("the account of the clicks does not balance: %s", "; ".join(found))
    metrics.accounting_faults.set(len(found))
    return found
