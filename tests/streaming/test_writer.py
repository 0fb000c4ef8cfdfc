"""The shard's writer: an outage costs time and no row, unless the stream was asked to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.errors import UnreachableBroker
from streaming.cut import Cut
from tests.memory_log import MemoryWriter
from tests.streaming.committing import sink, transactions, with_history
from tests.streaming.pieces import ZERO, piece


def test_an_outage_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(MemoryWriter, "close", lambda writer, timeout_s: closed.append(writer))
    with sink(tmp_path, refused=2) as shard:
        shard.log.go_away()
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 2))),), 0))
        shard.commits.flush()
        assert (len(closed), transactions(shard.log)) == (1, [1])
        assert shard.store.positions() == {ZERO: 2}
        shard.commits.put(Cut((with_history(piece((ZERO, 2, 1))),), 0))
        shard.commits.flush()
        assert (transactions(shard.log), shard.store.positions()) == ([1, 1], {ZERO: 3})


def test_a_stream_asked_to_stop_waits_for_no_broker(tmp_path: Path) -> None:
    with sink(tmp_path, refused=9) as shard:
        shard.stopping.set()
        shard.log.go_away()
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 2))),), 0))
        with pytest.raises(UnreachableBroker):
            shard.commits.flush()
        assert shard.store.positions() == {}
