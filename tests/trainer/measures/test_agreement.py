"""What slices measure agrees with others over one recorded run of real impressions: with first principles, and with TFMA.

TensorFlow Model Analysis is no requirement: `pip install -r tests/trainer/measures/tfma.txt` in an environment of its
own, with the trainer's requirements (843 MB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from state.features.spec import FeatureSpec
from state.microbatch.batch import trained
from tests.bench.quality import area_under_curve
from tests.bench.recorded import KUAIRAND, kuairand_settings, micro_batches, read_impressions
from trainer.engine.step import Trainer
from trainer.measures.breakdown import DECILES, SliceMeasures, shown_of
from trainer.measures.evaluation import HALF_LIFE_ROWS

pytestmark = pytest.mark.skipif(not KUAIRAND.exists(), reason="needs KuaiRand-Pure at ../shared/data/kuairand")

STEPS = 8
LEARNED = 2 * 1024
"""Rows that are learned from before probabilities are held against shares."""
WORTH = 0.002
"""AUC out of 256 bins may differ so much from that of the scores themselves."""


@dataclass(frozen=True)
class Sample:
    """A recorded run: each row as it was scored before learning, and what the trainer made of all of them.

    Attributes:
        label, predicted, weight: `[n]` float64; the weight that the row has in the recent sums at the end.
        slices: Of each dimension `[n]` the slice of each row.
        measures: Of the trainer.
    """

    label: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    slices: dict[str, npt.NDArray[Any]]
    measures: list[SliceMeasures]

    def each(self) -> Iterator[tuple[SliceMeasures, npt.NDArray[np.bool_]]]:
        """The measures of each slice, and its rows."""
        for one in self.measures:
            yield one, self.slices[one.dimension] == one.value


@pytest.fixture(scope="module")
def sample() -> Sample:
    settings = kuairand_settings()
    # What is measured decays once an update: one for each record here.
    settings = replace(settings, trainer=replace(settings.trainer, rows_per_update=0))
    spec, recorded = FeatureSpec.from_settings(settings), read_impressions(settings)
    trainer, seen = Trainer(settings, spec), np.zeros(0, np.uint64)
    labels, logits, sizes, columns = [], [], [], []
    for batch in islice(micro_batches(recorded, spec, settings.events.action_weights), STEPS):
        assert trained(batch.kind).all() and not np.isnan(batch.label).any(), "each row is one labelled pair"
        known = (batch.recent_categories[:, 0] != 0) | np.isin(batch.user, seen)
        seen = np.union1d(seen, batch.user)
        report = trainer.step(batch)
        labels.append(report.positive)
        logits.append(report.scores.astype(np.float64))
        sizes.append(report.targets)
        own = batch.user_attributes[:, list(recorded.attributes[0]).index("active_degree")]
        columns.append((own, np.where(known, "known", "new"), batch.action))
    shown = shown_of(settings.events.actions, trainer.slices)
    texts = dict(zip(trainer.slices._ids[0].tolist(), shown["active_degree"], strict=True))
    rows = [np.concatenate([one[n] for one in columns]) for n in range(3)]
    decays = 0.5 ** (np.array(sizes) / HALF_LIFE_ROWS)
    weights = [np.prod(decays[number + 1 :]) for number in range(len(sizes))]
    slices = {
        "active_degree": np.array([texts[one] for one in rows[0].tolist()]),
        "users": rows[1],
        "action": np.array([shown["action"][one] for one in rows[2].tolist()]),
    }
    return Sample(
        np.concatenate(labels).astype(np.float64),
        1 / (1 + np.exp(-np.concatenate(logits))),
        np.concatenate([np.full(len(one), weight) for one, weight in zip(labels, weights, strict=True)]),
        slices,
        trainer.breakdown.measures(shown),
    )


def log_loss(sample: Sample, mine: npt.NDArray[np.bool_]) -> float:
    right = np.where(sample.label > 0.5, sample.predicted, 1 - sample.predicted)
    return float(np.average(-np.log(right[mine]), weights=sample.weight[mine]))


def weighted_area(scores: Sequence[Any], label: npt.NDArray[Any], weight: npt.NDArray[Any]) -> float:
    """The area of all pairs of a positive and a negative, each worth the product of their weights."""
    order = np.argsort(scores, kind="stable")
    values, w, hit = np.asarray(scores)[order], weight[order], label[order] > 0.5
    _, first, at = np.unique(values, return_index=True, return_inverse=True)
    below = np.add.reduceat(np.where(hit, 0.0, w), first)
    before = np.cumsum(below) - below
    return float((w * (before + below / 2)[at])[hit].sum() / (w[hit].sum() * w[~hit].sum()))


def test_each_slice_agrees_with_first_principles(sample: Sample) -> None:
    assert sample.label.size > 7000 and {one.dimension for one in sample.measures} == set(sample.slices)
    assert weighted_area(sample.predicted, sample.label, np.ones(sample.label.size)) == pytest.approx(
        area_under_curve(sample.predicted.astype(np.float32), sample.label > 0.5), abs=1e-4
    )
    compared = 0
    for one, mine in sample.each():
        w, label, predicted = sample.weight[mine], sample.label[mine], sample.predicted[mine]
        assert one.figures["total.rows"] == mine.sum()
        assert one.figures["engagement_log_loss"] == pytest.approx(log_loss(sample, mine), rel=1e-5)
        if label.any():
            assert one.figures["calibration"] == pytest.approx((w * predicted).sum() / (w * label).sum(), rel=1e-5)
            low, high = one.intervals["calibration"]
            assert low < one.figures["calibration"] < high
        decile = np.minimum((predicted * DECILES).astype(int), DECILES - 1)
        off = sum(abs((w * (predicted - label))[decile == d].sum()) for d in range(DECILES)) / w.sum()
        assert one.figures["calibration_error"] == pytest.approx(off, abs=1e-4)
        if 0 < label.sum() < label.size and label.size > 500:
            assert one.figures["auc"] == pytest.approx(weighted_area(predicted, label, w), abs=WORTH)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("decile", range(DECILES))
def test_a_probability_is_the_share_of_those_who_engage(sample: Sample, decile: int) -> None:
    """What a bid is multiplied with: in each tenth of the impressions by probability, after the first records, within 0.05
    beyond what chance allows at three deviations."""
    predicted, label = sample.predicted[LEARNED:], sample.label[LEARNED:]
    placed = np.array_split(np.argsort(predicted, kind="stable"), DECILES)[decile]
    share = float(predicted[placed].mean())
    chance = 3 * float(np.sqrt(share * (1 - share) / len(placed)))
    assert abs(float(label[placed].mean()) - share) < 0.05 + chance


def test_tensorflow_model_analysis_agrees(sample: Sample, tmp_path: Path) -> None:
    why = "TFMA is not installed: see tests/trainer/measures/tfma.txt"
    tfma = pytest.importorskip("tensorflow_model_analysis", reason=why)
    config = pytest.importorskip("tensorflow_model_analysis.proto.config_pb2", reason=why)
    pandas = pytest.importorskip("pandas", reason=why)
    frame = pandas.DataFrame(
        {"label": sample.label, "prediction": sample.predicted, "weight": sample.weight, **sample.slices}
    )
    names = ("AUC", "Calibration", "BinaryCrossEntropy")
    wanted = config.EvalConfig(
        model_specs=[config.ModelSpec(label_key="label", prediction_key="prediction", example_weight_key="weight")],
        slicing_specs=[config.SlicingSpec(feature_keys=[name]) for name in sample.slices],
        metrics_specs=[config.MetricsSpec(metrics=[config.MetricConfig(class_name=name) for name in names])],
    )
    result = tfma.analyze_raw_data(frame, wanted, output_path=str(tmp_path))
    theirs = {key[0]: value[""][""] for key, value in result.slicing_metrics if key}
    compared = 0
    for one, mine in sample.each():
        found = {name: value["doubleValue"] for name, value in theirs[one.dimension, one.value].items()}
        assert found["binary_crossentropy"] == pytest.approx(one.figures["engagement_log_loss"], rel=1e-4)
        if sample.label[mine].any():
            assert found["calibration"] == pytest.approx(one.figures["calibration"], rel=1e-4)
        if "auc" in one.figures and mine.sum() > 500:
            assert found["auc"] == pytest.approx(one.figures["auc"], abs=WORTH)
            compared += 1
    assert compared >= 3
