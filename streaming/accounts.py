"""Accounts for every position of the clicks: outcomes, imbalances, and gaps (positions deleted before they were read).

A gap that an operator accepts takes the same two steps as clicks do:
first a micro-batch without rows names it in its ranges, in the training log.
Then the store moves past it, and records who accepted it, in one commit.
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
from state.log.accepted_gaps import Accepted, Consent
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
        topic_id: Current id of the topic.
        committed: The next offset of each source.
        ends: By partition, the first retained offset and the end offset.
    """
    at = {partition: committed.get(Source(topic_id, partition)) for partition in sorted(ends)}
    return [
        Gap(Source(topic_id, partition), ours, ends[partition][0])
        for partition, ours in at.items()
        if ours is not None and ours < ends[partition][0]
    ]


def positions_in(store: HistoryStore, topic_id: str) -> dict[int, int]:
    """By partition of one topic, the next offset that the store has not read."""
    return {source.partition: after for source, after in store.positions().items() if source.topic_id == topic_id}


def as_ranges(found: Sequence[Gap]) -> tuple[Range, ...]:
    """Converts gaps to ranges in which every position counts as a gap."""
    return tuple(Range(gap.source, gap.first, gap.next, gap=gap.positions) for gap in found)


def accepted(store: HistoryStore) -> list[Accepted]:
    """All gaps that were ever accepted, oldest first."""
    return accepted_gaps.decode(store.extra(GAPS))


def require_accepted(found: Sequence[Gap], consent: Consent, topic: str) -> None:
    """Raises an error for gaps that `consent` does not cover.

    Raises:
        GapError: At least one gap is not covered.
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
    """Moves the stream past gaps that `consent` covers; does nothing if there are none.

    1. `write` adds the gaps to the training log. After a crash here it adds them twice, and readers drop the duplicate.
    2. The store moves on, counts the positions as `gap` and records who accepted them.

    Args:
        store: The stream's store.
        found: The gaps.
        consent: What the operator accepts.
        topic: The topic's name, for the message.
        now_ms: Wall clock.
        write: Writes the micro-batch with the gaps, created at that time; returns once it is acknowledged.

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
    """Describes where the store's accounts do not balance: by source, and for all waiting impressions together."""
    counts, waiting = store.cut()
    accounts = {source: StreamAccount.of(one) for source, one in counts.items()}
    found = [f"{source}: {fault}" for source, one in accounts.items() for fault in check_accounts(one)]
    must_wait = sum(one.waiting for one in accounts.values())
    if must_wait != waiting:
        found.append(f"{must_wait} impressions must be waiting for their label, and {waiting} are")
    return tuple(found)


def show(store: HistoryStore, metrics: StreamMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the account's gauges, which survive restarts, and returns the imbalances; logs those other than `known`."""
    show_totals(metrics, store.totals, store.waiting_rows())
    return show_faults(metrics, faults(store), known)


def show_totals(metrics: StreamMetrics, counts: Mapping[str, int], waiting: int) -> None:
    """Sets the gauges of an account.

    Args:
        metrics: Of the process.
        counts: The result of `state.history.counts.summed`.
        waiting: Number of waiting impressions.
    """
    totals = dict.fromkeys(RARE, 0) | dict(counts)
    for name in ("positions", *OUTCOMES, *OF_LABELS, "gap", "masked"):
        metrics.accounting_positions.labels(name).set(totals[name])
    for name in ("opened", "joined", "expired", "dropped"):
        metrics.accounting_labels.labels(name).set(totals[name])
    # An outcome labels at most one impression.
    metrics.accounting_labels.labels("unmatched").set(totals["feedback"] - totals["joined"])
    metrics.accounting_labels.labels("waiting").set(waiting)


def show_faults(metrics: StreamMetrics, found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Sets the gauge of imbalances, and logs them if they differ from `known`; returns `found`."""
    if found and found != known:
        logger.error("the account of the clicks does not balance: %s", "; ".join(found))
    metrics.accounting_faults.set(len(found))
    return found
