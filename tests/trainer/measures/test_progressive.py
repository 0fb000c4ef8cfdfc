"""The model beside what is simple: against brute force, on noise, and over a restart."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.ranking.transitions import SUCCESSORS
from tests.trainer.batches import micro_batch, spread
from tests.trainer.clicks import SPEC
from tests.trainer.logs import fresh
from trainer.engine.engine import Scores
from trainer.engine.record import Record
from trainer.engine.report import judged
from trainer.measures.evaluation import HALF_LIFE_ROWS
from trainer.measures.progressive import (
    BASELINES,
    KEPT,
    LISTED,
    PREDICTORS,
    SPAN_MS,
    SUMS,
    USERS,
    Progressive,
    of_came_next,
)
from trainer.model.ranker import MASKED, Targets
from trainer.tables.lists import CountTable
from trainer.versions import checkpoint, content

RECENT, POPULAR = 3, 4
WIDTH = RECENT + POPULAR + SUCCESSORS


@dataclass
class Row:
    """One click: what is known before it, and the category that came; 0 for none."""

    category: int
    newest: int
    known: bool
    logits: list[float]
    slot: int


@dataclass
class BruteForce:
    """All that the module promises, row by row in plain Python."""

    popular: dict[int, int] = field(default_factory=dict)
    span: int | None = None
    came_next: dict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    recent: dict[tuple[str, bool], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def shares(self, row: Row) -> dict[str, dict[int, float]]:
        """Each predictor's candidates in their order, with their shares; of the model by slot, else by category."""
        weights = {slot: math.exp(logit) for slot, logit in enumerate(row.logits) if logit > MASKED / 2}
        found = {"model": dict(sorted(weights.items(), key=lambda one: (-row.logits[one[0]], one[0])))}
        found["popular"] = dict(sorted(self.popular.items(), key=lambda one: (-one[1], one[0])))
        found["previous"] = {row.newest: 1.0} if row.newest else {}
        found["came_next"] = (
            {category: float(count) for category, count in self.came_next[row.newest]} if row.newest else {}
        )
        return {
            name: {one: weight / sum(said.values()) for one, weight in said.items()} for name, said in found.items()
        }

    def score(self, rows: list[Row], categories: int) -> dict[tuple[str, str], Counter[str]]:
        sums: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for row in (row for row in rows if row.category):
            for name, said in self.shares(row).items():
                own = row.slot if name == "model" else row.category
                rank = list(said).index(own) if own in said else None
                if rank is not None and name == "popular":
                    rank = min(rank, LISTED)
                missed, offered = self.recent[name, row.known]
                miss, others = (missed + 0.5) / (offered + 1), max(categories - len(said), 0) + 1
                # Where nothing is offered, everything is a miss.
                share = (1 - miss) * said[own] if rank is not None else (miss if said else 1) / others
                one = {
                    "rows": 1, "log_loss": -math.log(share), "log_loss_squares": math.log(share) ** 2,
                    "reciprocal_rank": 0 if rank is None else 1 / (1 + rank), "top1": rank == 0,
                    "top5": rank is not None and rank < 5, "offered": bool(said), "missed": rank is None,
                }  # fmt: skip
                for users in ("all", "known" if row.known else "new"):
                    sums[name, users].update(one)
        return sums

    def learn(self, rows: list[Row], at_ms: int, sums: dict[tuple[str, str], Counter[str]]) -> None:
        decay = 0.5 ** (sum(row.category != 0 for row in rows) / HALF_LIFE_ROWS)
        for name in PREDICTORS:
            for known, users in ((False, "new"), (True, "known")):
                found, held = sums[name, users], self.recent[name, known]
                held[0] = held[0] * decay + found["missed"] - (found["rows"] - found["offered"])
                held[1] = held[1] * decay + found["offered"]
        span = at_ms // SPAN_MS
        for _ in range(span - self.span if self.span is not None else 0):
            self.popular = {one: count * KEPT >> 16 for one, count in self.popular.items()}
        self.popular, self.span = {one: count for one, count in self.popular.items() if count}, span
        for row in rows:
            if row.category:
                self.popular[row.category] = self.popular.get(row.category, 0) + (1 << 16)
            if row.category and row.newest:
                follow(self.came_next[row.newest], row.category)


def follow(listed: list[list[int]], category: int) -> None:
    """Counts one transition; among equal counts whoever reached it first stands first."""
    mine = next((one for one in listed if one[0] == category), None)
    if mine is None:
        listed.append([category, 1])
        return
    mine[1] += 1
    listed.remove(mine)
    listed.insert(sum(one[1] >= mine[1] for one in listed), mine)


def record_of(rows: list[Row], transitions: CountTable) -> tuple[Record, Scores]:
    count = len(rows)
    recent = np.zeros((count, RECENT), np.uint64)
    recent[:, 0] = [row.newest for row in rows]
    logits = np.array([row.logits for row in rows], np.float32)
    zeros = np.zeros(count, np.float32)
    targets = Targets(np.array([row.slot for row in rows], np.int32), zeros, zeros, zeros, zeros, zeros, zeros)
    ids = {"recent": recent, "category": np.array([row.category for row in rows], np.uint64)}
    newest = transitions.find(np.ascontiguousarray(recent[:, 0]))
    recent_logits, popular, successors = np.split(logits, (RECENT, RECENT + POPULAR), axis=1)
    empty = np.zeros(count, np.float32)
    scores = Scores(
        recent_logits,
        popular,
        successors,
        empty,
        np.zeros(count, np.int32),
        np.zeros(2 * count, np.float32),
        np.zeros(2 * count, np.float32),
    )
    return Record(ids, {}, targets, np.zeros(count, np.int64), (0, 0), newest), scores


def category_rows() -> st.SearchStrategy[Row]:
    logit = st.one_of(st.just(MASKED), st.integers(-12, 12).map(lambda number: number / 4))

    def row(category: int, newest: int, known: bool, logits: list[float], slot: int) -> Row:
        there = slot < WIDTH and logits[slot] > MASKED / 2
        return Row(category, newest, known, logits, -1 if category == 0 else slot if there else WIDTH)

    return st.builds(
        row, st.integers(0, 9), st.integers(0, 4), st.booleans(), st.lists(logit, min_size=WIDTH, max_size=WIDTH),
        st.integers(0, WIDTH),
    )  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(category_rows(), min_size=1, max_size=12), st.integers(0, 3 * SPAN_MS), st.integers(0, 20)),
        min_size=1,
        max_size=6,
    )
)
def test_sums_equal_brute_force(steps: list[tuple[list[Row], int, int]]) -> None:
    ours, theirs, transitions, at_ms = Progressive(), BruteForce(), CountTable("transition", 64), 1_700_000_000_000
    transitions.observe(np.arange(1, 5, dtype=np.uint64), np.full(4, at_ms))
    for rows, later_ms, categories in steps:
        at_ms += later_ms
        record, scores = record_of(rows, transitions)
        known = np.array([row.known for row in rows])
        scored = np.zeros(2 * len(rows), np.bool_)
        came_next = of_came_next(transitions, record.newest, record.ids["category"])
        found = judged(ours, record, scores, came_next, known, categories, scored).scores
        wanted = theirs.score(rows, categories)
        for predictor in PREDICTORS:
            for users in USERS:
                listed = [found.total(name, predictor, users) for name in SUMS]
                expected = [float(wanted[predictor, users][name]) for name in SUMS]
                assert listed == pytest.approx(expected, rel=1e-6), (predictor, users)
        category = record.ids["category"]
        ours.update(found, category, at_ms)
        transitions.count(record.newest, category)
        theirs.learn(rows, at_ms, wanted)


def test_the_cost_of_noise_is_at_least_its_entropy() -> None:
    """Uniform over 136 categories, ln 136 = 4.91: whatever is learned, nobody pays less than that, but for the sample."""
    trainer, categories, steps, rows = fresh(), 136, 40, 256
    rng = np.random.default_rng(7)
    for number in range(steps):
        batch = micro_batch(rows, first=number * rows)
        recent = spread(rng.integers(1, categories + 1, batch.recent_categories.shape))
        trainer.step(replace(batch, category=spread(rng.integers(1, categories + 1, rows)), recent_categories=recent))
    values, entropy = trainer.measures.progressive.values(), math.log(categories)
    for name in ("", *(f"baseline.{one}." for one in BASELINES)):
        assert entropy - 0.02 < values[f"total.{name}log_loss"] < entropy + 0.6, name
    # The loss that training minimises puts the category in as a candidate, and so says less.
    assert trainer.measures.evaluation.values()["total.training_loss"] < entropy - 1
    assert values["total.missed"] > 0.5
    assert abs(values["total.lift.top1"]) < 0.01


def test_a_version_without_these_measures_is_loaded_and_they_start_from_scratch() -> None:
    trainer = fresh()
    trainer.step(micro_batch(40))
    old, digest = checkpoint.full(trainer), checkpoint.digest(trainer)
    assert not any(name.startswith(content.QUALITY) for name in old)
    checkpoint.load(trainer, old)
    assert trainer.measures.progressive.values() == {}
    assert checkpoint.digest(trainer) == digest
    assert content.digest(old | {f"{content.QUALITY}sums": np.ones(3)}) == digest


def test_a_step_in_several_updates_is_scored_row_for_row() -> None:
    trainer = fresh()
    report = trainer.step(micro_batch(40))
    quality, evaluation = report.quality, trainer.measures.evaluation.values()
    assert quality.total("rows") == 40
    assert (
        quality.total("top1") / 40 == evaluation["total.top1"]
        and quality.total("top5") / 40 == evaluation["total.top5"]
    )
    assert quality.engagement_log_loss / quality.pairs == pytest.approx(
        evaluation["total.engagement_log_loss"], rel=1e-5
    )
    assert SPEC.recent_categories > RECENT
