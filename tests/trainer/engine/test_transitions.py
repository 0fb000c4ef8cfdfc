"""Transitions in the step: what was learned from is counted, and lists are state like any other row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from state.microbatch.batch import MicroBatch
from state.ranking.transitions import FOLLOWERS
from tests.trainer.batches import micro_batch, spread
from tests.trainer.engine.test_step import fresh, learned
from trainer.engine.guard import Verdict
from trainer.engine.step import Trainer

CATEGORIES = FOLLOWERS
"""So few that no list is ever full."""


def log(count: int = 6, rows: int = 64, first: int = 0) -> list[MicroBatch]:
    """Batches in which some rows have no category, and others no weight."""
    made = []
    for number in range(first, first + count):
        batch = micro_batch(rows, first=number * rows, categories=CATEGORIES)
        kind = np.arange(rows) % 5
        made.append(
            dataclasses.replace(
                batch,
                category=np.where(kind == 3, np.uint64(0), batch.category),
                weight=np.where(kind == 4, np.float32(0), batch.weight),
            )
        )
    return made


def lists(trainer: Trainer) -> dict[int, dict[int, int]]:
    """What came next how often, by the label before."""
    labels = trainer.transitions.state().ids
    held = trainer.transitions.lists(trainer.transitions.find(labels))
    found = {}
    for label, counts, followers in zip(labels.tolist(), held.counts.tolist(), held.ids.tolist(), strict=True):
        found[label] = {one: count for one, count in zip(followers, counts, strict=True) if count}
    return found


def counted(batches: Iterable[MicroBatch]) -> dict[int, Counter[int]]:
    """The plain definition: each row that is learned from, after its user's newest label."""
    found: dict[int, Counter[int]] = {}
    for batch in batches:
        columns = (batch.recent_categories[:, 0].tolist(), batch.category.tolist(), batch.weight.tolist())
        for newest, category, weight in zip(*columns, strict=True):
            if newest and category:
                found.setdefault(newest, Counter()).update([category] if weight else [])
    return found


def test_a_list_is_the_count_of_the_rows_that_were_learned_from() -> None:
    batches = log()
    found = lists(learned(batches, fresh()))
    assert found == counted(batches)
    assert max(sum(one.values()) for one in found.values()) > 50
    everything = [dataclasses.replace(batch, weight=np.ones(64, np.float32)) for batch in batches]
    assert found != counted(everything)


def test_a_list_begins_when_its_label_was_seen_as_often_as_any_row_must_be() -> None:
    trainer = fresh(admit_after=2)
    after = spread(np.array([1, 2, 1]))
    for number, label in enumerate(after):
        batch = micro_batch(1, first=number)
        labels = np.zeros_like(batch.recent_categories)
        labels[:, 0] = label
        trainer.step(dataclasses.replace(batch, recent_categories=labels, category=spread(np.array([9]))))
    assert lists(trainer) == {int(after[0]): {int(spread(np.array([9]))[0]): 1}}


def test_what_came_next_in_a_batch_is_not_known_to_its_own_rows() -> None:
    trainer, batch = learned(log(3), fresh()), log(1, first=50)[0]
    before = trainer.score(batch)
    other = dataclasses.replace(batch, category=batch.category[::-1].copy())
    # Some of the rows have a category only before, or only after.
    same = (batch.category != 0) == (other.category != 0)
    after = trainer.score(other)
    assert 0 < same.sum() < len(same)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])


def test_a_skipped_step_counts_nothing() -> None:
    trainer = learned(log(3), fresh())
    trainer.guard = dataclasses.replace(trainer.guard, norm=1e-12, accepted=100)
    before = lists(trainer)
    assert trainer.step(log(1, first=50)[0]).verdict is Verdict.SKIP
    after = lists(trainer)
    # Labels that were first seen in it have a row, as in the other tables, and it is empty.
    assert {label: after[label] for label in before} == before
    assert not any(after[label] for label in after.keys() - before.keys())
