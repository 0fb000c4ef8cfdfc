"""The first steps of a new trainer, with small batches of ordinary shoppers, leave an extreme user's answer right."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from state.config.loading import load
from state.config.settings import Settings
from state.features.spec import EVENT, FeatureSpec
from state.microbatch.batch import MicroBatch
from streaming.preprocessing import CLIP, LEAST_DEVIATION
from tests.bench.recorded import SOURCE, hashed, made_clicks, micro_batches, plain
from trainer.engine.step import Trainer

SAMPLE = 300
PURCHASE = 3
CLICKS = 20


def burst(settings: Settings, spec: FeatureSpec, at_ms: int) -> MicroBatch:
    """Purchases of one user in a category of her own, all at once, and a click half a second later."""
    events = np.zeros(CLICKS + 1, EVENT)
    events["at_ms"], events["offset"], events["topic"] = at_ms, np.arange(events.size), SOURCE.topic
    events["at_ms"][-1] += 500
    events["category"], events["item"] = hashed("born just now"), np.arange(events.size) + 1
    events["action"] = PURCHASE
    users = np.full(events.size, hashed("ada"), np.uint64)
    return next(micro_batches(plain(users, events), spec, settings.events.action_weights))


@pytest.mark.parametrize(("seed", "step_rows", "steps"), [(7, 20, 30), (3, 300, 10)])
def test_a_burst_in_a_new_category_leads_after_each_of_the_first_steps(seed: int, step_rows: int, steps: int) -> None:
    settings = load(["--shoppers.rate", "100", "--shoppers.users", "200"], {})
    spec, weights = FeatureSpec.from_settings(settings), settings.events.action_weights
    shop = made_clicks(settings, SAMPLE + steps * step_rows, seed)
    # What TensorFlow Transform finds in a small sample: most columns hardly vary.
    sample = next(micro_batches(shop, spec, weights, SAMPLE))
    logs = np.log1p(sample.features.astype(np.float32))
    mean, deviation = logs.mean(0), np.maximum(logs.std(0), LEAST_DEVIATION)
    trainer = Trainer(settings, spec, lambda x: tf.clip_by_value((tf.math.log1p(x) - mean) / deviation, -CLIP, CLIP))
    asked = burst(settings, spec, int(shop.events["at_ms"][-1]) + 1)
    leads = []
    for batch in micro_batches(shop, spec, weights, step_rows):
        trainer.step(batch)
        scores = trainer.score(asked)
        leads.append(float(scores["recent_logits"][-1, 0] - scores["popular_logits"][-1].max()))
    assert min(leads) > 0.0, f"smallest lead after step {int(np.argmin(leads)) + 1}"
