"""What the trainer owes an account of: each row's outcome, and the gaps that it was allowed to pass.

Two kinds of gap stop the trainer. In the training log: retention deleted
records before we read them, or one cannot be learned from (it is damaged, or
nobody's micro-batch, or of other features or another salt). In a source: no
record of the log covers some positions of the clicks. The first kind explains
the second where it follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from state.accounts import TrainerAccount, check_accounts
from state.errors import GapError, SpringtideError, TruncatedLog
from state.log import accepted_gaps
from state.log.accepted_gaps import Accepted, Journal
from state.log.gaps import Consent, how_to_go_on
from state.metrics import TrainerMetrics
from state.positions import Gap, Source

COMMAND = "springtide train (or up)"
NAMES = ("rows", "trained", "skipped", "duplicate", "masked", "gap", "other_features")
logger = logging.getLogger(__name__)


class Passages:
    """Lets the trainer over gaps that an operator accepts, and keeps a record of each. One thread.

    Args:
        journal: What was accepted before; what is accepted now is added.
        consent: What the operator accepts at this start.
        metrics: Where gaps are counted.
        clock: Wall clock in seconds.
    """

    def __init__(self, journal: Journal, consent: Consent, metrics: TrainerMetrics, clock: Callable[[], float]) -> None:
        self._journal, self._consent, self._metrics, self._clock = journal, consent, metrics, clock
        self._known = journal.accepted()
        self._count(self._known)

    def past(self, source: Source, offset: int) -> int:
        """Where the training log goes on from `offset`, behind what was accepted as lost there."""
        return accepted_gaps.past(self._known, source, offset)

    def pass_log(self, error: GapError, marks: Mapping[Source, int]) -> int:
        """The offset behind a gap in the training log; its record is durable when this returns.

        Args:
            error: What the log said.
            marks: The next offset of each source: what follows them may be missing too.

        Raises:
            GapError: Nobody accepted it.
            TruncatedLog: The log was cut back, which is no loss that anybody can accept: the trainer goes back.
        """
        if len(error.gaps) != 1 or isinstance(error, TruncatedLog):
            raise error
        (gap,) = error.gaps
        self._pass([gap], error, gap.source.topic_id, marks)
        return gap.next

    def is_left_out(self, source: Source, offset: int) -> bool:
        """Whether the record at an offset of the training log was left out before."""
        return accepted_gaps.left_out(self._known, source, offset)

    def leave_out(self, place: Gap, marks: Mapping[Source, int], problem: SpringtideError) -> None:
        """Leaves out a record that cannot be learned from; that is durable when this returns.

        Args:
            place: The record's offset in the training log, or those of a damaged batch of records.
            marks: The next offset of each source: the record's clicks are missing from there on.
            problem: Why it cannot be learned from; it names the place.

        Raises:
            SpringtideError: `problem`, with the command that leaves the record out; nobody accepted it.
        """
        if not all(self._consent.leaves_out(offset) for offset in range(place.first, place.next)):
            flag = f"{place.first}" if place.positions == 1 else f"{place.first}-{place.next - 1}"
            raise type(problem)(
                problem.what,
                f"{problem.do}; to go on without this record: {COMMAND} --skip-record {flag} --reason TEXT",
            ) from problem
        self._keep(accepted_gaps.accept(place, self._consent, int(self._clock() * 1000), marks, problem.what))

    def pass_sources(self, found: Sequence[tuple[Source, int, int]], where: str, read_topic: str) -> int:
        """How many positions no record covers before the one at `where`, all of them accepted.

        Args:
            found: (source, the trainer's mark, where the record's range begins).
            where: The record's place.
            read_topic: Id of the training log's topic.

        Raises:
            GapError: Nobody accepted one of them.
        """
        lost = [Gap(source, mark, first) for source, mark, first in found]
        new = [gap for gap in lost if not accepted_gaps.explained(self._known, gap)]
        if new:
            what = "; ".join(f"{gap} of topic id {gap.source.topic_id}" for gap in new)
            self._pass(
                new,
                GapError(
                    f"{where}: no record before it holds these clicks: {what}",
                    "they were lost before the training log: look after the stream's log file, or accept the loss",
                    new,
                ),
                read_topic,
            )
        return sum(gap.positions for gap in lost)

    def _pass(
        self, found: Sequence[Gap], error: GapError, read_topic: str, marks: Mapping[Source, int] | None = None
    ) -> None:
        refused = [gap for gap in found if not self._consent.covers(gap, read_topic)]
        if refused:
            told = how_to_go_on(error, COMMAND)
            raise GapError(told.what, told.do, refused)
        for gap in found:
            self._keep(accepted_gaps.accept(gap, self._consent, int(self._clock() * 1000), marks))

    def _keep(self, one: Accepted) -> None:
        self._journal.add(one)
        self._known.append(one)
        self._count([one])
        what = f"record left out ({one.record})" if one.record else "gap accepted"
        logger.warning("%s by %s (%s): topic id %s, %s", what, one.actor, one.reason, one.gap.source.topic_id, one.gap)

    def _count(self, passed: Sequence[Accepted]) -> None:
        records = sum(bool(one.record) for one in passed)
        self._metrics.records_left_out.inc(records)
        self._metrics.gaps_accepted.inc(len(passed) - records)


def show(account: Mapping[str, int], metrics: TrainerMetrics, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Sets the gauges of the account; says aloud what does not balance beyond `known`.

    Args:
        account: Rows by outcome, of `NAMES`.
        metrics: Where they go.
        known: What the last call returned.
    """
    counted = {name: account.get(name, 0) for name in NAMES}
    for name, rows in counted.items():
        metrics.accounting_rows.labels(name).set(rows)
    found = check_accounts(trainer=TrainerAccount(**counted))
    if found and found != known:
        logger.error("the account of the rows does not balance: %s", "; ".join(found))
    metrics.accounting_faults.set(len(found))
    return found
