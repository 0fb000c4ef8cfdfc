"""Counts the outcome of each row, and records the gaps that an operator accepts. Two kinds of gap stop the trainer:

- A gap in the training log: retention deleted records before the trainer read them, or the trainer cannot learn from a
  record. Such a record is damaged, is not a micro-batch, or has other features or another salt.
- A gap in a source: no record of the log covers some positions of the clicks. A gap in the training log explains it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from state.accounts import TrainerAccount, check_accounts
from state.errors import GapError, SpringtideError, TruncatedLog
from state.log import accepted_gaps
from state.log.accepted_gaps import Accepted, Consent, Journal, how_to_go_on
from state.metrics import TrainerMetrics
from state.positions import Gap, Source

COMMAND = "springtide train (or up)"
NAMES = ("rows", "trained", "skipped", "duplicate", "masked", "gap", "other_features")
logger = logging.getLogger(__name__)


class Passages:
    """Lets the trainer continue past gaps that an operator accepts, and records each of them. Not thread-safe."""

    def __init__(self, journal: Journal, consent: Consent, metrics: TrainerMetrics, clock: Callable[[], float]) -> None:
        self._journal, self._consent, self._metrics, self._clock = journal, consent, metrics, clock
        self._known = journal.accepted()
        self._count(self._known)

    def past(self, source: Source, offset: int) -> int:
        """The offset at which reading continues from `offset`: the end of the gap accepted there, if any."""
        return accepted_gaps.past(self._known, source, offset)

    def pass_log(self, error: GapError, marks: Mapping[Source, int]) -> int:
        """Accepts a gap in the training log and returns the offset after it. The gap's record is durable on return.

        Raises:
            GapError: The operator does not accept the gap.
            TruncatedLog: The log was truncated. No operator can accept this; the trainer has to rewind.
        """
        if len(error.gaps) != 1 or isinstance(error, TruncatedLog):
            raise error
        (gap,) = error.gaps
        self._pass([gap], error, gap.source.topic_id, marks)
        return gap.next

    def is_left_out(self, source: Source, offset: int) -> bool:
        """Whether the record at this offset of the training log was skipped before."""
        return accepted_gaps.left_out(self._known, source, offset)

    def leave_out(self, gap: Gap, marks: Mapping[Source, int], problem: SpringtideError) -> None:
        """Skips a record, or a damaged batch, that cannot be learned from because of `problem`. The skip is durable on return.

        Raises:
            SpringtideError: The operator does not accept the skip; `problem` plus the command to skip the record.
        """
        if not all(self._consent.leaves_out(offset) for offset in range(gap.first, gap.next)):
            flag = f"{gap.first}" if gap.positions == 1 else f"{gap.first}-{gap.next - 1}"
            raise type(problem)(
                problem.what,
                f"{problem.do}; to continue without this record: {COMMAND} --skip-record {flag} --reason TEXT",
            ) from problem
        self._keep(accepted_gaps.accept(gap, self._consent, int(self._clock() * 1000), marks, problem.what))

    def pass_sources(self, gaps: Sequence[tuple[Source, int, int]], where: str, read_topic: str) -> int:
        """Accepts the positions that no record before `where` covers, and returns how many there are.

        A gap is (source, the trainer's mark, the first position that the record covers).

        Raises:
            GapError: The operator does not accept one of the gaps.
        """
        lost = [Gap(source, mark, first) for source, mark, first in gaps]
        new = [gap for gap in lost if not accepted_gaps.explained(self._known, gap)]
        if new:
            positions = "; ".join(f"{gap} of topic id {gap.source.topic_id}" for gap in new)
            self._pass(
                new,
                GapError(
                    f"{where}: no record before it holds these clicks: {positions}",
                    "they were lost before the training log: check the stream's log file, or accept the loss",
                    new,
                ),
                read_topic,
            )
        return sum(gap.positions for gap in lost)

    def _pass(
        self, gaps: Sequence[Gap], error: GapError, read_topic: str, marks: Mapping[Source, int] | None = None
    ) -> None:
        refused = [gap for gap in gaps if not self._consent.covers(gap, read_topic)]
        if refused:
            refusal = how_to_go_on(error, COMMAND)
            raise GapError(refusal.what, refusal.do, refused)
        for gap in gaps:
            self._keep(accepted_gaps.accept(gap, self._consent, int(self._clock() * 1000), marks))

    def _keep(self, loss: Accepted) -> None:
        self._journal.add(loss)
        self._known.append(loss)
        self._count([loss])
        text = f"record left out ({loss.record})" if loss.record else "gap accepted"
        logger.warning(
            "%s by %s (%s): topic id %s, %s",
            text,
            loss.actor,
            loss.reason,
            loss.gap.source.topic_id,
            loss.gap,
        )

    def _count(self, passed: Sequence[Accepted]) -> None:
        records = sum(bool(accepted.record) for accepted in passed)
        self._metrics.records_left_out.inc(records)
        self._metrics.gaps_accepted.inc(len(passed) - records)


def show(account: Mapping[str, int], metrics: TrainerMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the gauges of the row account, and logs an imbalance that is not in `known`, the result of the last call."""
    rows_by_outcome = {name: account.get(name, 0) for name in NAMES}
    for name, rows in rows_by_outcome.items():
        metrics.accounting_rows.labels(name).set(rows)
    faults = check_accounts(trainer=TrainerAccount(**rows_by_outcome))
    if faults and faults != known:
        logger.error("the account of the rows does not balance: %s", "; ".join(faults))
    metrics.accounting_faults.set(len(faults))
    return faults
