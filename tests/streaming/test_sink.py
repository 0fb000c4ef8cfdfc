"""The commit thread: cuts queue up behind the one being written, and a failure surfaces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from state.config.sections import Kafka
from state.errors import FencedWriter
from state.log import topic_plan
from state.process import killpoints
from streaming.cut import Cut
from streaming.pipeline import QUEUED_CUTS, CommitThread
from tests.streaming.committing import sink, transactions
from tests.streaming.pieces import ZERO, piece
from tests.streaming.streams import DEADLINE_S, until


class Gate:
    """In place of `killpoints.reach`: holds a commit inside its transaction until it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)

    def __call__(self, name: str) -> None:
        if name == "stream.sent":
            self.entered.release()
            assert self.opened.wait(DEADLINE_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(killpoints, "reach", made)
    return made


def test_what_waited_while_one_was_written_goes_into_one_transaction(tmp_path: Path, gate: Gate) -> None:
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        for offset in (1, 2):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        gate.opened.set()
        shard.commits.flush()
        assert transactions(shard.log) == [1, 2]


def test_a_full_queue_holds_the_reader_back(tmp_path: Path, gate: Gate) -> None:
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        for offset in range(1, 1 + QUEUED_CUTS):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        put = threading.Thread(target=shard.commits.put, args=(Cut((piece((ZERO, 1 + QUEUED_CUTS, 1)),), 0),))
        put.start()
        put.join(0.1)
        assert put.is_alive()
        assert transactions(shard.log) == []
        gate.opened.set()
        put.join(DEADLINE_S)
        shard.commits.flush()
        assert not put.is_alive()
        assert shard.store.positions() == {ZERO: 2 + QUEUED_CUTS}


def test_at_rest_the_group_and_the_account_say_what_is_committed_and_then_nothing_is_due(tmp_path: Path) -> None:
    def group() -> dict[int, int]:
        return dict(shard.log.topics().committed(Kafka().group, Kafka().clicks_topic))

    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        until(lambda: group() == {0: 1}, "the first cut is shown")
        # Within the second in which nothing more is shown; no third cut comes.
        shard.commits.put(Cut((piece((ZERO, 1, 2)),), 0))
        until(lambda: group() == {0: 3}, "the second cut is shown")
        assert shard.metrics.accounting_positions.labels("positions")._value.get() == 3
        until(lambda: shard.committer.due_s is None, "nothing is due")


def test_a_group_that_could_not_be_told_is_told_at_rest(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        topics, planned = shard.log.topics(), topic_plan.clicks(shard.settings)
        topics.delete(Kafka().clicks_topic)
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        until(lambda: shard.store.positions() == {ZERO: 1}, "the cut is committed")
        topics.ensure(*planned)
        until(lambda: topics.committed(Kafka().group, Kafka().clicks_topic) == {0: 1}, "the group")


@pytest.mark.parametrize("call", [CommitThread.check, CommitThread.flush, lambda commits: commits.put(Cut((), 0))])
def test_a_failure_surfaces_in_the_next_call(tmp_path: Path, call: Callable[[CommitThread], None]) -> None:
    with sink(tmp_path) as shard:
        shard.log.writer("shard-0")
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        with pytest.raises(FencedWriter, match="another writer took over"):
            call(shard.commits)
        assert shard.store.positions() == {}
