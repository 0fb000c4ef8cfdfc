"""Slices against their batch definitions, and over a run of real impressions."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from evaluation.measures import area_under_curve
from state.metrics import TrainerMetrics
from trainer import gauges
from trainer.measures import evaluation
from trainer.measures.evaluation import HALF_LIFE_ROWS
from trainer.measures.progressive import SUMS, Judged, ScoredPairs, StepScores, no_sums
from trainer.measures.slices import DECILES, Breakdown, SliceMeasures, gap, values

SHOWN = {"action": ("view", "buy"), "brand": ("a", "b", "c")}
NOTHING = StepScores(no_sums(), 0, 0, 0.0, 0.0)


def judged(rng: np.random.Generator, rows: int) -> Judged:
    """What was said of some rows: logits that tell a little, on a grid of the histogram's bins."""
    targets, scored = rng.random(rows) < 0.8, rng.random(2 * rows) < 0.9
    positive = rng.random(int(scored.sum())) < 0.3
    logits = (np.floor(rng.normal(positive * 0.8, 1.5) / 0.375) + 0.5) * 0.375
    predicted = 1 / (1 + np.exp(-logits))
    columns = rng.random((int(targets.sum()), len(SUMS)))
    columns[:, SUMS.index("log_loss_squares")] = columns[:, SUMS.index("log_loss")] ** 2
    columns[:, SUMS.index("top1")] = columns[:, SUMS.index("top1")] < 0.4
    losses = -np.log(np.where(positive, predicted, 1 - predicted))
    return Judged(NOTHING, targets, columns, ScoredPairs(scored, logits, predicted, positive, losses))


def delong(logits: np.ndarray, positive: np.ndarray) -> float:
    """The variance of the area from all pairs."""
    above, below = logits[positive], logits[~positive]
    wins = (above[:, None] > below) + (above[:, None] == below) / 2
    return float(wins.mean(1).var(ddof=1) / above.size + wins.mean(0).var(ddof=1) / below.size)


def test_each_slice_has_the_measures_of_its_rows() -> None:
    by_item, steps = (False, True), []
    rng, ours = np.random.default_rng(3), Breakdown(("action", "brand"), (2, 3), by_item)
    for rows in (200, 1, 300):
        places = np.stack([rng.integers(0, 2, rows), rng.integers(0, 3, rows)])
        partner = (np.arange(rows) + 1) % rows
        steps.append((places, partner, judged(rng, rows)))
        ours.update(list(places), partner, steps[-1][2])
    found = {(one.dimension, one.value): one for one in ours.measures(SHOWN)}
    assert len(found) == 5
    weights = np.cumprod([0.5 ** (len(said.rows) / HALF_LIFE_ROWS) for _, _, said in steps[::-1]])
    weights = np.append(weights[:-1][::-1], 1.0)
    for number, dimension in enumerate(SHOWN):
        for place, value in enumerate(SHOWN[dimension]):
            one = found[dimension, value]
            of_rows, pairs = [], []
            for weight, (places, partner, said) in zip(weights, steps, strict=True):
                mine = places[number] == place
                of_rows.append((said.rows[mine[said.targets]], weight))
                whose = np.concatenate([mine, mine[partner] if by_item[number] else mine])[said.pairs.scored]
                of_pairs = (said.pairs.logits, said.pairs.predicted, said.pairs.positive, said.pairs.losses)
                pairs.append(([column[whose] for column in of_pairs], weight))
            w = np.concatenate([np.full(len(part), weight) for part, weight in of_rows])
            columns = np.concatenate([part for part, _ in of_rows])
            losses = columns[:, SUMS.index("log_loss")]
            assert one.figures["log_loss"] == pytest.approx((w * losses).sum() / w.sum())
            equal = w.sum() ** 2 / (w**2).sum()
            spread = (w * (losses - one.figures["log_loss"]) ** 2).sum() / w.sum()
            low, high = one.intervals["log_loss"]
            assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(spread / equal))
            w = np.concatenate([np.full(part[0].size, weight) for part, weight in pairs])
            logits, predicted, positive, loss = (np.concatenate([part[n] for part, _ in pairs]) for n in range(4))
            assert one.figures["calibration"] == pytest.approx((w * predicted).sum() / w[positive].sum())
            assert one.figures["engagement_log_loss"] == pytest.approx((w * loss).sum() / w.sum())
            decile = np.minimum((predicted * DECILES).astype(int), DECILES - 1)
            off = sum(abs((w * (predicted - positive))[decile == d].sum()) for d in range(DECILES)) / w.sum()
            assert one.figures["calibration_error"] == pytest.approx(off)
            # The weights differ by less than 2 %: the unweighted area and its variance are close.
            area = area_under_curve(logits, positive).value
            assert one.figures["auc"] == pytest.approx(area, abs=0.005)
            low, high = one.intervals["auc"]
            assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(delong(logits, positive)), rel=0.05)


def test_state_continues_with_the_same_bits_and_other_slices_start_from_scratch() -> None:
    rng, one = np.random.default_rng(4), Breakdown(("action",), (2,), (False,))
    places, partner = np.zeros((1, 50), np.uint8), np.arange(50)
    one.update(list(places), partner, judged(rng, 50))
    other, third = Breakdown(("action",), (2,), (False,)), Breakdown(("action",), (4,), (False,))
    other.load(one.state())
    later = judged(rng, 50)
    for each in (one, other):
        each.update(list(places), partner, later)
    shown = {"action": ("view", "buy")}
    assert dict(values(one.measures(shown))) == dict(values(other.measures(shown))) != {}
    third.load(one.state())
    assert third.measures(shown) == []


def test_a_slice_without_new_rows_loses_its_figures() -> None:
    """A day of an eager shop: the squares of its weights are 0 long before its rows are, and a share of them is 0 sooner."""
    rng, one = np.random.default_rng(8), Breakdown(("users",), (2,), (False,))
    shown, rows, told = {"users": ("new", "known")}, HALF_LIFE_ROWS // 2, set()
    one.update([np.zeros(rows, np.uint8)], np.arange(rows), judged(rng, rows))
    known, said = [np.ones(rows, np.uint8)], judged(rng, rows)
    for _ in range(2200):
        one.update(known, np.arange(rows), said)
        new, other = one.measures(shown)
        told.add(frozenset(new.figures))
    assert new.figures == {"total.rows": rows, "rows": 0.0}
    assert len(told) > 1
    assert other.figures["log_loss"] == pytest.approx(float(said.rows[:, 1].mean()))
    smallest = min(float(sums[sums > 0].min()) for sums in one.state().values() if sums.dtype == np.float64)
    assert smallest > np.finfo(np.float64).tiny


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_intervals_contain_the_true_value_at_their_confidence(share: float) -> None:
    rng, samples, rows = np.random.default_rng(5), 2000, 200
    hits = rng.binomial(rows, share, samples) / rows
    held = [low <= share <= high for low, high in (evaluation.interval_of_share(one, rows) for one in hits)]
    assert 0.92 < np.mean(held) < 0.98
    drawn = rng.exponential(1.0, (samples, rows))
    ends = [evaluation.interval_of_mean(one.mean(), (one**2).mean(), rows) for one in drawn]
    assert 0.92 < np.mean([low <= 1.0 <= high for low, high in ends]) < 0.97


def test_the_interval_of_the_area_contains_the_true_area() -> None:
    rng, edges, held = np.random.default_rng(6), np.linspace(-6, 6, 65), []
    for _ in range(400):
        below, above = (np.histogram(rng.normal(mean, 1, 150), edges)[0].astype(float) for mean in (0, 1))
        low, high = evaluation.interval_of_area(below, above, 1.0) or (2.0, 2.0)
        held.append(low <= 0.76025 <= high)
    assert 0.92 < np.mean(held) < 0.98


def test_a_gap_by_chance_is_not_sure_and_one_slice_has_none() -> None:
    def slices(*losses: float) -> list[SliceMeasures]:
        return [
            SliceMeasures("age", str(n), {"rows": 400.0, "log_loss": loss}, {"log_loss": (loss - 0.1, loss + 0.1)})
            for n, loss in enumerate(losses)
        ]

    near, far = gap(slices(2.0, 2.1, 2.05), "age", "log_loss"), gap(slices(2.0, 3.0, 2.5), "age", "log_loss")
    assert near is not None and (near.sure, near.worst) == (0.0, "1")
    assert far is not None and 0.7 < far.sure < far.size == 1.0
    assert gap(slices(2.0), "age", "log_loss") is None
    few = [one._replace(figures={**one.figures, "rows": 20.0}) for one in slices(2.0, 3.0)]
    assert gap(few, "age", "log_loss") is None


def test_metrics_of_slices_stay_few_whatever_there_is() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    figures = {"rows": 500.0, "log_loss": 2.0, "auc": 0.7, "calibration": 1.0}
    sure = {"log_loss": (1.9, 2.1), "auc": (0.6, 0.8)}
    many = [
        SliceMeasures(f"attribute {d}", f"value {v}", {**figures, "log_loss": 2.0 + v / 100}, sure)
        for d in range(12)
        for v in range(256)
    ]
    gauges.show_slices(many, metrics)
    measured = {f"{where}{name}": 1.0 for where in ("", "new.", "known.") for name in ("log_loss", "mrr", "top1")}
    gauges.show_quality(measured, metrics)
    count = sum(len(family.samples) for family in registry.collect())
    assert 100 < count < 300
    gauges.show_slices(many[:3], metrics)
    assert registry.get_sample_value(
        "springtide_trainer_slice_gap", {"attribute": "attribute 0", "measure": "log_loss"}
    ) == (pytest.approx(0.02))
    assert (
        registry.get_sample_value("springtide_trainer_slice_rows", {"attribute": "attribute 1", "value": "value 0"})
        is None
    )


def test_a_dimension_of_items_follows_the_negative() -> None:
    said = judged(np.random.default_rng(7), 2)
    positive = np.array([True, True, False, False])
    said = said._replace(
        pairs=ScoredPairs(np.ones(4, np.bool_), np.zeros(4), np.full(4, 0.5), positive, np.full(4, np.log(2)))
    )
    ours = Breakdown(("brand",), (2,), (True,))
    ours.update([np.array([0, 1])], np.array([1, 1]), said)
    found = {one.value: one.figures for one in ours.measures({"brand": ("a", "b")})}
    assert (found["a"]["calibration"], found["b"]["calibration"]) == (0.5, 1.5)
