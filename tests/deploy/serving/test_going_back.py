"""Serving's histories after an exact rollback: those of a host that never saw the masked clicks, however far it had come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.serving.host_files import CLOCK_EXTRA, item_extra
from state.features.mask import ClickColumns, Mask
from state.microbatch.codec import decode, encode
from state.registry.log_line import WHOLE, LogLine, turned
from tests.deploy.serving.test_clicks import LOG, SOURCE, Following, append, record, written
from tests.kills import Killed, armed

HISTORY = 40
# Three users; each had more than it keeps when the poison came.
GOOD = [record(first, first + 30) for first in range(0, 180, 30)]
POISON = [record(first, first + 30) for first in range(180, 300, 30)]
MASK = Mask(2, offsets=((SOURCE.topic, SOURCE.partition, 200, 233),))


def with_items(value: bytes, epoch: int = 1, mask: Mask = Mask.NONE) -> bytes:
    """The record with an item and a category of the bots' in masked rows, without what `mask` names, in an epoch of the log."""
    batch = decode(value)
    clicks = ClickColumns.of(batch)
    bots = MASK.rows(clicks, batch.header.ranges)
    # Bots named a good item too, of which nobody else speaks since.
    item = np.where(bots, np.where(batch.offset % 2 == 0, 900, 104), np.where(batch.item == 104, 103, batch.item))
    columns = batch.columns | {
        "item": (item if int(batch.offset[0]) >= 180 else batch.item).astype(np.uint64),
        "category": np.where(bots, 77, batch.category).astype(np.uint64),
    }
    (part,) = batch.header.ranges
    out = mask.rows(clicks, batch.header.ranges)
    part = replace(part, rows=part.rows - int(out.sum()), masked=int(out.sum()))
    header = replace(batch.header, ranges=(part,), log_epoch=epoch)
    return encode(header, {name: column[~out] for name, column in columns.items()})


def content(following: Following) -> dict[str, Any]:
    store = following.store
    return {
        "digest": store.digest(),
        "counts": store.counts(),
        "users": store.users(),
        "items": {item: store.extra(item_extra(item)) for item in (100, 101, 102, 103, 104, 900)},
        "newest_ms": json.loads(store.extra(CLOCK_EXTRA) or b"{}").get("event_ms"),
    }


def turn(host: Following, line: LogLine) -> bool:
    went = host.follower.follow_branch(line, MASK, lambda at: host.log.reader(LOG, [0], {0: at}))
    if went:
        host.connect()
    return went


@pytest.mark.parametrize("had", [0, 6, 11, 13])
@pytest.mark.parametrize("at", ["", "back.committed"])
def test_histories_go_back_and_on_from_however_far_they_had_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had: int, at: str
) -> None:
    good, poison = [with_items(one) for one in GOOD], [with_items(one) for one in POISON]
    late = with_items(record(300, 330))
    log = written(*good, *poison)
    place, end = len(good), len(good) + len(poison)
    line = turned(WHOLE, 1, place, end, ((SOURCE, 180),))
    append(log, late)
    ours = Following(tmp_path / "ours", log, history=HISTORY)
    monkeypatch.setattr("deploy.serving.following.clicks.RECORDS_AT_ONCE", 1)
    clean = [with_items(one, 2, MASK) for one in (*POISON, record(300, 330))]
    # A host that sees control late has passed over records of the new epoch.
    written_already = clean if had > end + 1 else []
    append(log, *written_already)
    for _ in range(had):
        ours.follower.step(0.0)
    try:
        with armed(at):
            went = turn(ours, line)
    except Killed:
        ours.store.close()
        ours = Following(tmp_path / "ours", log, history=HISTORY)
        went = turn(ours, line)
    assert went or at
    following = json.loads(ours.store.extra("microbatches") or b'{"next": {"0": 0}}')["next"]["0"]
    shown = ours.metrics.history_epoch, ours.metrics.microbatch_lag_records
    assert [one._value.get() for one in shown] == [2, log.topics().ends(LOG)[0][1] - following]
    append(log, *clean[len(written_already) :])
    for _ in range(len(good) + 2 * len(poison) + 4):
        ours.follower.step(0.0)
    theirs = Following(tmp_path / "theirs", written(*good, *clean), history=HISTORY)
    theirs.follower._line = turned(WHOLE, 1, place, place, ((SOURCE, 180),))
    theirs.drain()
    assert content(ours) == content(theirs)
    assert ours.store.totals["masked"] == 33
    assert not turn(ours, line)
    assert json.loads(ours.store.extra("microbatches") or b"")["next"] == {"0": end + 1 + len(clean)}
    ours.store.close()
    theirs.store.close()
