"""Crosses in the step: learned from labels alone, pair after pair, and state like any other row."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from state.microbatch.batch import MicroBatch
from state.ranking.crosses import FIRST_SHARES, Crosses, Values, logits_of
from tests.trainer.batches import SPEC, micro_batch, rows_of, spread, with_tables
from tests.trainer.engine.test_step import learned, settings
from tests.trainer.model.test_attributes import WANTED, with_attributes
from trainer.engine.crosses import Crossed, crosses, first_precision, share_network
from trainer.engine.engine import CROSS
from trainer.engine.guard import Verdict
from trainer.engine.step import Trainer
from trainer.model.hyperparameters import HYPERPARAMETERS

NAMES = Crosses(SPEC, ("tab",), ("age", "city"), ("brand", "price"))
SHARES, NETWORK = NAMES.shares[:-1], NAMES.shares[-1:]
PRECISION = first_precision(NAMES.kinds)


def fresh(capacity: int = 4096, crosses_of_a_row: int = 4, **trainer: Any) -> Trainer:
    base = settings(**trainer)
    events = dataclasses.replace(base.events, context=("tab",), label="clicked")
    return with_tables(dataclasses.replace(base, attributes=WANTED, events=events), capacity, crosses_of_a_row)


def impressions(rows: int = 64, first: int = 0, labelled: float = 1.0) -> MicroBatch:
    """Rows with context and attributes, of which a share has a label."""
    rng = np.random.default_rng([2, first])
    label = np.where(rng.random(rows) < labelled, rng.integers(0, 2, rows), np.nan).astype(np.float32)
    return dataclasses.replace(with_attributes(micro_batch(rows, first=first, context=1)), label=label)


def log(count: int = 4, labelled: float = 1.0) -> list[MicroBatch]:
    return [impressions(first=number * 64, labelled=labelled) for number in range(count)]


def crosses_of(batch: MicroBatch) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return NAMES.ids(values_of(batch))


def values_of(batch: MicroBatch) -> Values:
    return Values(
        batch.user, batch.item, batch.category, batch.context, batch.user_attributes, batch.item_attributes,
        batch.features, batch.sequence_items,
    )  # fmt: skip


def test_a_log_without_labels_has_no_crosses() -> None:
    trainer = learned(log(2, labelled=0.0), fresh())
    assert len(trainer.tables[CROSS]) == 0


def test_rows_without_a_label_leave_no_crosses_behind() -> None:
    batch = impressions(labelled=0.5)
    trainer = fresh()
    trainer.step(batch)
    found = trainer.tables[CROSS].find(crosses_of(batch).reshape(-1)).reshape(64, -1)
    # Another row of the same user and item may have a label.
    pairs = list(zip(batch.user.tolist(), batch.item.tolist(), strict=True))
    known = {pair for pair, label in zip(pairs, batch.label.tolist(), strict=True) if label == label}
    assert (found[:, NAMES.names.index("user*item")] != 0).tolist() == [pair in known for pair in pairs]
    assert 0 < len(known) < len(set(pairs))


def chance(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def plain_filter(batch: MicroBatch) -> tuple[list[float], dict[int, list[float]]]:
    """In float64, row by row: the logits of rows, and by id weight, margin and their precisions, shares included."""
    ids, labels = crosses_of(batch), batch.label.astype(float).tolist()
    learned: dict[int, list[float]] = {one: [0.0] * 4 for one in (*ids[ids != 0].tolist(), *SHARES.tolist())}
    logits = []
    for row, label in zip(ids.tolist(), labels, strict=True):
        own = [
            (learned[one], learned[share], prior)
            for one, share, prior in zip(row, SHARES.tolist(), PRECISION.tolist(), strict=True)
            if one
        ]
        said = [(share, side, cross[side]) for cross, share, _ in own for side in (0, 1)]
        logit = sum((share[side] + FIRST_SHARES[side]) * value for share, side, value in said)
        logits.append(logit)
        together, mixed = chance(sum(cross[0] for cross, _, _ in own)), chance(logit)
        margins = [cross[1] for cross, _, _ in own]
        variance = [1 / (prior + cross[2]) for cross, _, prior in own]
        # Shares.
        information, known = (
            mixed * (1 - mixed),
            [HYPERPARAMETERS.share_precision + share[2 + side] for share, side, _ in said],
        )
        doubt = sum(value**2 / one for one, (_, _, value) in zip(known, said, strict=True))
        for one, (share, side, value) in zip(known, said, strict=True):
            share[side] += value * (label - mixed) / (1 + information * doubt) / one
            share[2 + side] += information * value**2
        # Weights.
        information, doubt = together * (1 - together), sum(variance)
        for v, (cross, _, _) in zip(variance, own, strict=True):
            cross[0] += v * (label - together) / (1 + information * doubt)
            cross[2] += information / (1 + information * (doubt - v))
        # Margins: the first is the logit of all labels, the others are what theirs add to it.
        for place, (cross, _, _) in enumerate(own):
            alone = chance(margins[0] + margins[place] if place else margins[0])
            cross[3] += alone * (1 - alone)
            cross[1] += (label - alone) / (HYPERPARAMETERS.marginal_precision + cross[3])
    return logits, learned


def test_rows_are_scored_and_learned_from_as_the_plain_filter_does() -> None:
    batch = impressions()
    logits, learned = plain_filter(batch)
    ids = np.concatenate([crosses_of(batch), SHARES[None]])
    distinct, at = np.unique(np.append(ids, np.uint64(0)), return_inverse=True)
    places = at[:-1].reshape(ids.shape).astype(np.int32)
    nothing = np.zeros((distinct.size, 2), np.float32)
    found = crosses(places[:-1], places[-1], PRECISION, batch.label, nothing, nothing)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert np.abs(logits).max() > 0.3
    expected = np.array([learned[one] for one in distinct[1:].tolist()])
    np.testing.assert_allclose(found.rows[1:], expected[:, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.precision[1:], expected[:, 2:], rtol=1e-4, atol=1e-5)
    # And so it does in a step.
    trainer = fresh()
    report = trainer.step(batch)
    table = trainer.tables[CROSS].state()
    is_cross = table.ids != NETWORK
    assert table.ids[is_cross].tolist() == distinct[1:].tolist()
    found_rows = np.concatenate([table.rows, table.accum], 1)[is_cross]
    np.testing.assert_allclose(found_rows, expected, rtol=1e-4, atol=1e-5)
    # The rest of the logit is next to nothing in a first step.
    np.testing.assert_allclose(report.judged[0].pairs.logits, logits, atol=0.03)


def test_the_share_of_the_network_is_learned_row_by_row_from_labels_alone() -> None:
    batch = impressions(labelled=0.6)
    logits = np.random.default_rng(5).normal(0, 2, 128).astype(np.float32)
    losses = np.zeros(128, np.float32)
    ids = np.where(np.isnan(batch.label)[:, None], np.uint64(0), crosses_of(batch))
    crossed = Crossed(
        np.linspace(-1, 1, 64, dtype=np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32), 2
    )
    engagement, found_losses = share_network(ids, batch.label, crossed, logits, losses)
    share: float = 1.0
    known: float = 0.0
    for row, label in enumerate(batch.label.astype(float).tolist()):
        if label != label:
            assert engagement[row] == logits[row], "a row without a label keeps its score"
            continue
        network = float(logits[row] - crossed.logits[row])
        logit = float(crossed.logits[row]) + share * network
        assert engagement[row] == pytest.approx(logit, abs=1e-4)
        assert found_losses[row] == pytest.approx(np.log1p(np.exp(logit)) - label * logit, abs=1e-4)
        variance, information = network**2 / (HYPERPARAMETERS.share_precision + known), chance(logit) * chance(-logit)
        error = (label - chance(logit)) / (1 + information * variance)
        share += network * error / (HYPERPARAMETERS.share_precision + known)
        known += information * network**2
    assert abs(share - 1.0) > 0.05
    np.testing.assert_allclose(crossed.rows, [[0.0, 0.0], [0.0, 0.0], [float(share) - 1.0, 0.0]], rtol=1e-3)
    np.testing.assert_allclose(crossed.precision, [[0.0, 0.0], [0.0, 0.0], [float(known), 0.0]], rtol=1e-3)
    np.testing.assert_array_equal(engagement[64:], logits[64:])


def test_a_step_scores_with_the_share_of_the_network() -> None:
    last = impressions(first=900)

    def scored(offset: float) -> np.ndarray:
        trainer = learned(log(4), fresh())
        table = trainer.tables[CROSS]
        table.put(table.find(NETWORK), np.array([[offset, 0.0]], np.float32), np.array([[1e9, 0.0]], np.float32))
        return trainer.step(last).judged[0].pairs.logits

    crosses_alone, in_full, twice = scored(-1.0), scored(0.0), scored(1.0)
    assert np.abs(in_full - crosses_alone).max() > 1e-3
    np.testing.assert_allclose(twice - in_full, in_full - crosses_alone, atol=1e-5)


def test_serving_adds_up_a_versions_rows_as_the_trainer_scores_the_next_row() -> None:
    trainer, last = learned(log(8), fresh()), impressions(rows=1, first=900)
    state = trainer.tables[CROSS].state()
    ids = np.concatenate([crosses_of(last), SHARES[None]])
    # Some crosses of the row were never seen: theirs is the row of zeros.
    places = np.where(np.isin(ids, state.ids), np.searchsorted(state.ids, ids) + 1, 0).astype(np.int32)
    rows, precision = (np.concatenate([np.zeros((1, 2), np.float32), part]) for part in (state.rows, state.accum))
    scored = crosses(places[:1], places[1], PRECISION, last.label, rows, precision).logits
    np.testing.assert_allclose(logits_of(rows[places[:1]], rows[places[1]]), scored, rtol=1e-5, atol=1e-6)
    without = rows * np.array([1, 0], np.float32)
    assert abs(scored[0] - logits_of(without[places[:1]], without[places[1]])[0]) > 1e-3


def test_a_users_taste_for_a_category_is_learned() -> None:
    """Each user likes half of the categories, and no user or category is liked more than another."""
    trainer, rng = fresh(), np.random.default_rng(1)

    def shown(first: int, rows: int = 256) -> tuple[MicroBatch, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        batch = impressions(rows, first)
        user, category = rng.integers(1, 21, rows), rng.integers(1, 9, rows)
        liked = (user * 7 + category * 3) % 5 % 2 == 0
        labels = {"user": spread(user), "category": spread(category), "label": liked.astype(np.float32)}
        return dataclasses.replace(batch, item=spread(np.arange(first, first + rows) + 10**9), **labels), liked

    for number in range(30):
        trainer.step(shown(number * 256)[0])
    last, liked = shown(30 * 256)
    scores = trainer.step(last).judged[0].pairs.logits
    assert scores[liked].mean() > scores[~liked].mean() + 0.7
    ids = crosses_of(last)[:, NAMES.names.index("user*category")].copy()
    weights = rows_of(trainer.tables[CROSS], trainer.tables[CROSS].find(ids))[:, 0]
    assert weights[liked].mean() > weights[~liked].mean() + 0.3


def test_what_users_with_another_latest_item_take_is_learned() -> None:
    """Items and users are new in each row, so only the latest item says anything about the label."""
    spec = dataclasses.replace(SPEC, sequence=3)
    base = settings()
    trainer = Trainer(dataclasses.replace(base, events=dataclasses.replace(base.events, label="clicked")), spec)
    rng = np.random.default_rng(4)

    def shown(first: int, rows: int = 256) -> MicroBatch:
        batch, fresh_ids = micro_batch(rows, first=first), spread(np.arange(first, first + rows) + 10**9)
        latest = rng.integers(1, 9, (rows, 3))
        return dataclasses.replace(
            batch,
            header=dataclasses.replace(batch.header, spec=spec.digest),
            user=fresh_ids,
            item=fresh_ids,
            features=np.zeros_like(batch.features),
            label=(latest[:, 0] % 2).astype(np.float32),
            sequence_items=spread(latest),
            sequence_categories=spread(latest),
            sequence_actions=np.ones((rows, 3), np.uint16),
            sequence_ages=np.ones((rows, 3), np.uint16),
        )

    for number in range(12):
        trainer.step(shown(number * 256))
    last = shown(12 * 256)
    scores, liked = trainer.step(last).judged[0].pairs.logits, last.label > 0.5
    assert scores[liked].mean() > scores[~liked].mean() + 2.0
    found = trainer.crosses.ids(values_of(last))[:, trainer.crosses.names.index("latest item.1")]
    weights = rows_of(trainer.tables[CROSS], trainer.tables[CROSS].find(found.copy()))
    assert (weights[liked].min(0) > weights[~liked].max(0) + 0.5).all()


def test_a_skipped_step_changes_no_weight_of_a_cross() -> None:
    trainer = learned(log(3), fresh())
    batch = impressions(first=900)
    trainer.guard = dataclasses.replace(trainer.guard, norm=1e-12, accepted=100)
    before = {one: row.tobytes() for one, row in zip(*_rows(trainer), strict=True)}
    assert trainer.step(batch).verdict is not Verdict.ACCEPT
    after = {one: row.tobytes() for one, row in zip(*_rows(trainer), strict=True)}
    assert {one: after[one] for one in before} == before
    assert not any(np.frombuffer(after[one], np.float32).any() for one in after.keys() - before.keys())


def _rows(trainer: Trainer) -> tuple[list[int], np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    state = trainer.tables[CROSS].state()
    return state.ids.tolist(), np.concatenate([state.rows, state.accum], 1)
