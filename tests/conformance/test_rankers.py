"""What every ranker and tower promises, the default one and each in `deploy/examples`: a new example is found unasked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from state.config.loading import load
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from tests.trainer.batches import micro_batch
from tests.trainer.engine.test_step import digests, learned, restored
from trainer.checks import check_own
from trainer.engine.step import Trainer

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
CONFIGURED = {path.parent.name: path for path in EXAMPLES.glob("*/springtide.toml")}


def settings_of(name: str) -> Settings:
    """The example's model, trained in small tables; without the preprocessing that only a bootstrap can analyse."""
    own = load(["--config", str(CONFIGURED[name])] if name in CONFIGURED else [], env={})
    trainer = dataclasses.replace(own.trainer, capacity=4096, admit_after=1, device="cpu")
    model = dataclasses.replace(own.model, preprocessing=Settings().model.preprocessing)
    return dataclasses.replace(own, trainer=trainer, model=model)


def batches(spec: FeatureSpec, count: int, rows: int = 64) -> list[MicroBatch]:
    """Micro-batches with the user's latest events where the spec asks for them: those of the recent categories."""
    found = [micro_batch(rows, first=number * rows) for number in range(count)]
    if not spec.sequence:
        return found
    columns = {"items": np.uint64, "categories": np.uint64, "actions": np.uint16, "ages": np.uint16}
    empty = {f"sequence_{name}": np.zeros((rows, spec.sequence), kind) for name, kind in columns.items()}
    made = []
    for batch in found:
        known = min(spec.sequence, batch.recent_categories.shape[1])
        latest = {name: column.copy() for name, column in empty.items()}
        latest["sequence_categories"][:, :known] = batch.recent_categories[:, :known]
        latest["sequence_items"][:, :known] = batch.recent_categories[:, :known]
        latest["sequence_actions"] = (latest["sequence_items"] != 0).astype(np.uint16) * (1 + batch.action[:, None])
        made.append(dataclasses.replace(batch, **latest))
    return made


@pytest.mark.parametrize("name", ["default", *sorted(CONFIGURED)])
def test_it_is_a_ranker_and_what_it_learned_goes_on_from_a_version_with_the_same_bits(name: str) -> None:
    settings = settings_of(name)
    spec = FeatureSpec.from_settings(settings)
    assert "lowers to LiteRT" in check_own(settings, spec)
    log = batches(spec, 4)
    trainer = Trainer(settings, spec)
    first = digests(trainer)
    half = restored(learned(log[:2], trainer), Trainer(settings, spec))
    whole, gone_on = digests(learned(log[2:], trainer)), digests(learned(log[2:], half))
    assert whole == gone_on
    assert whole != first
    assert all(np.isfinite(one) for one in list(trainer.measures.evaluation.values().values()))
