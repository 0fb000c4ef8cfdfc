"""Tables that are full in the middle of training: bounded at every step, a function of the log, and told by versions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from state.microbatch.batch import MicroBatch
from tests.trainer.engine.test_crosses import NAMES, fresh, impressions
from tests.trainer.engine.test_step import digests, learned
from trainer.engine.step import Trainer

ROWS, CROSSES_OF_A_ROW, STEPS, HOUR_MS = 96, 10, 8, 3_600_000


def small(capacity: int, max_rows: int = ROWS, admit_after: int = 1) -> Trainer:
    return fresh(capacity, CROSSES_OF_A_ROW, admit_after=admit_after, max_rows=max_rows, expire_s=4 * 3600)


def log() -> list[MicroBatch]:
    """An hour a step, so that rows expire in its middle."""
    found = []
    for number in range(STEPS):
        batch = impressions(first=number * 64, labelled=0.7)
        found.append(dataclasses.replace(batch, at_ms=batch.at_ms + number * HOUR_MS))
    return found


@pytest.mark.parametrize("admit_after", [1, 2])
def test_no_table_is_ever_above_its_cap_nor_what_waits(admit_after: int) -> None:
    trainer = small(64, ROWS, admit_after)
    left = dict.fromkeys(trainer.tables, 0)
    for batch in log()[:4]:
        trainer.step(batch)
        for name, table in trainer.tables.items():
            assert len(table) <= table.max_rows and table.pending <= table.max_rows
            assert table.capacity <= table.max_rows * 9 // 8 + 2 + 64 * 40
            changes = table.take_changes()
            left[name] += int(
                changes.removed.size if admit_after == 1 else np.count_nonzero(changes.pending_counts == 0)
            )
    # Nothing is old enough to expire: all of these were evicted, of rows or of what waits.
    assert left["user"] > 30 and left["item"] > 30 and left["cross"] > 400
    assert trainer.tables["cross"].max_rows == CROSSES_OF_A_ROW * ROWS and trainer.tables["category"].max_rows == ROWS


def test_a_cap_that_is_not_reached_changes_no_bit() -> None:
    batches = log()
    wide = learned(batches, small(64, 100_000))
    whole = digests(wide)
    most = {name: len(table) for name, table in wide.tables.items()}
    assert max(most.values()) < 50_000
    assert digests(learned(batches, small(64, 50_000))) == whole
    assert digests(learned(batches, small(64))) != whole


def test_shares_of_crosses_are_never_evicted() -> None:
    trainer = learned(log(), small(64))
    assert np.all(trainer.tables["cross"].find(NAMES.shares) != 0)
