"""Answers say who leaves by what the trainer learned, of the same inputs bit by bit; and nothing where that is not known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from deploy.serving.answers.predictor import churn_probabilities
from deploy.serving.requests.endpoints import _message_of
from deploy.serving.requests.http import Response, encode
from springtide_client.answers import Profile
from state.churn import ChurnInputs, ChurnWeights, Horizon, tensors_of
from state.features.mask import Mask
from state.features.spec import EVENT, FeatureSpec
from tests.deploy.serving.stocked import NOW_MS, SOURCE, Stores, digest_of, manifest, predictor, tensors
from tests.vectors import vectorise

SPEC = FeatureSpec()
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
HORIZON = Horizon.of(7 * DAY_MS, SPEC)


def message_of(answer: Profile) -> Any:
    return _message_of(Response(200, encode(answer)), "Profile")


def weights() -> ChurnWeights:
    inputs = ChurnInputs(SPEC, HORIZON)
    return ChurnWeights(HORIZON, inputs, 1.25, -0.5, np.random.default_rng(3).normal(0, 0.3, inputs.width))


def history(ages_h: list[float], seed: int = 1) -> Any:
    """Events so many hours before now, in append order."""
    drawn, events = np.random.default_rng(seed), np.zeros(len(ages_h), EVENT)
    events["at_ms"] = [NOW_MS - int(age * HOUR_MS) for age in ages_h]
    events["category"], events["item"] = (drawn.integers(1, 9, len(ages_h)) for _ in range(2))
    events["action"], events["offset"] = drawn.integers(0, 4, len(ages_h)), np.arange(len(ages_h))
    events["topic"] = SOURCE.topic
    return events


def expected(events: Any, latest: int, now_ms: int = NOW_MS) -> float:
    """By the row that the event's own micro-batch has: the windows before it, at its time."""
    made, at_ms = weights(), int(events["at_ms"][latest])
    row = vectorise(events, at_ms, latest, Mask.NONE, SPEC).features[made.inputs.columns]
    inputs = made.inputs.of(row[None], events["action"][[latest]], np.array([now_ms - at_ms]))
    return float(made.probabilities(inputs)[0])


def said(events: Any, mask: Mask = Mask.NONE, now_ms: int = NOW_MS) -> float | None:
    return churn_probabilities(weights(), [events], [now_ms], mask, SPEC, [7])[0]


def test_the_inputs_are_those_of_the_row_in_the_training_log() -> None:
    events = history([100, 99.5, 50, 49.9, 49.8, 3])
    assert said(events) == expected(events, 5)
    assert said(events, now_ms=NOW_MS - 40 * HOUR_MS) == expected(events, 4, NOW_MS - 40 * HOUR_MS)
    late = history([100, 50, 3, 40])
    assert said(late) == expected(late, 2), "an event that came late is not the latest"
    many = churn_probabilities(weights(), [events, late, events[:0]], [NOW_MS] * 3, Mask.NONE, SPEC, [7, 8, 9])
    assert many == [pytest.approx(expected(events, 5), rel=1e-12), pytest.approx(expected(late, 2), rel=1e-12), None]


def test_what_is_masked_was_never_there() -> None:
    events = history([100, 99.5, 50, 3])
    mask = Mask(offsets=((SOURCE.topic, SOURCE.partition, 3, 4),))
    assert said(events, mask) == expected(events[:3], 2)
    assert said(events, Mask(times=((0, NOW_MS + 1),))) is None


def test_nothing_is_said_where_nothing_was_learned() -> None:
    events = history([30, 3])
    assert churn_probabilities(None, [events], [NOW_MS], Mask.NONE, SPEC, [7]) == [None]
    assert said(events[:0]) is None
    assert said(events, now_ms=NOW_MS + HORIZON.reach_ms - 3 * HOUR_MS) is None
    assert said(events, now_ms=NOW_MS + HORIZON.reach_ms - 3 * HOUR_MS - 1) is not None


def test_a_profile_has_it_from_the_version_that_tells_it_and_loses_it_with_a_rollback(stores: Stores) -> None:
    answering = predictor(stores)
    assert answering.profile("ann").churn is None
    made = tensors(stores.lowered, 2, {"user": ["ann"]}, ["tea"])
    second = replace(manifest(2, digest_of(stores.lowered), parent=1), visible=((1, 2),))
    stores.rows.apply(second, made | tensors_of(weights()), NOW_MS, follow=True)
    for user in ("ann", "bob"):
        answer = answering.profile(user)
        assert answer.version.number == 2
        assert answer.churn is not None and 0.0 < answer.churn < 1.0
        assert message_of(answer).churn == answer.churn
        assert msgspec.json.decode(encode(answer), type=Profile).churn == answer.churn
    nobody = answering.profile("nobody")
    assert "churn" not in msgspec.json.decode(encode(nobody))
    assert not message_of(nobody).HasField("churn")
    stores.rows.serve(1)
    assert answering.profile("ann").churn is None


@pytest.mark.parametrize("days", [0.5, 2, 7, 30])
def test_the_horizon_of_any_span_fits_its_windows(days: float) -> None:
    made = Horizon.of(int(days * DAY_MS), SPEC)
    assert made.stride_ms <= min(made.span_ms, DAY_MS, made.reach_ms)
    assert made.reach_ms == 7 * DAY_MS if days >= 1 else made.reach_ms <= 7 * DAY_MS
