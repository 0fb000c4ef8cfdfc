"""A full disk under the stream: a commit waits, holds back the clicks, and is done once there is room; nothing comes twice."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from state.errors import StoreFull
from state.positions import Range
from state.storage.waiting import RETRY_S
from streaming.accounts import Leaders
from streaming.cut import Cut
from tests.disks import small_disk
from tests.streaming.committing import sink, transactions, with_history
from tests.streaming.pieces import ZERO, piece
from tests.streaming.streams import until

ROWS = 400


def gauge(shard: Any, name: str) -> float:
    return float(getattr(shard.storage, name).labels("stream")._value.get())


def test_a_commit_waits_for_room_says_so_once_and_writes_its_micro_batches_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, sink(disk.path) as shard, caplog.at_level(logging.WARNING):
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 1))),), 0))
        shard.commits.flush()
        full = disk.fill()
        shard.commits.put(Cut((with_history(piece((ZERO, 1, ROWS))),), 0))
        until(lambda: gauge(shard, "waiting") == 1, "it waits")
        # Tried again, and refused again.
        refused = len(transactions(shard.log))
        assert not shard.stopping.wait(3 * RETRY_S)
        shard.commits.check()
        assert shard.store.positions() == {ZERO: 1}
        assert (refused, len(transactions(shard.log)), gauge(shard, "waits")) == (2, 2, 1)
        assert [one for one in caplog.messages if "the stream waits for room" in one] == caplog.messages
        full.unlink()
        shard.commits.flush()
        assert shard.store.positions() == {ZERO: 1 + ROWS}
        assert (transactions(shard.log), gauge(shard, "waiting")) == ([1, 1], 0)
        assert caplog.messages[-1] == "the stream goes on: there is room again"
        assert len(caplog.messages) == 2


def test_a_stream_that_is_asked_to_stop_waits_for_no_room_and_reads_the_clicks_again_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, sink(disk.path) as shard:
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 1))),), 0))
        shard.commits.flush()
        full = disk.fill()
        shard.commits.put(Cut((with_history(piece((ZERO, 1, ROWS))),), 0))
        until(lambda: gauge(shard, "waiting") == 1, "it waits")
        shard.stopping.set()
        with pytest.raises(StoreFull, match="free space"):
            shard.commits.flush()
        assert shard.store.positions() == {ZERO: 1}
        full.unlink()


def test_the_leaders_that_a_full_disk_refused_are_written_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        leaders, reader = Leaders(disk.path), SimpleNamespace(leader_epoch=lambda *_: 7)
        full = disk.fill()
        part = Range(ZERO, 0, 5, rows=5)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                leaders.note([part], reader)  # type: ignore[arg-type]
        full.unlink()
        leaders.note([part], reader)  # type: ignore[arg-type]
        assert Leaders(disk.path).at(ZERO.topic_id, {0: 5}) == {0: 7}
