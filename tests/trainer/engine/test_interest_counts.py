"""The correction of interests is a function of the log, and follows what is clicked now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from state.config.settings import Settings
from state.features.spec import EVENT, FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking.item_lists import EVERYTHING, NEXT_CATEGORY
from tests.bench.recorded import SOURCE, micro_batches, plain
from trainer.engine.interest_counts import InterestCounts
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content

SPEC = FeatureSpec()
ROWS, CATEGORIES = 128, 60


def settings(interests: str = "counts") -> Settings:
    made = Settings()
    return replace(made, trainer=replace(made.trainer, device="cpu", interests=interests))


def batches(records: int, size: int = ROWS, seed: int = 5) -> Iterator[MicroBatch]:
    """Clicks on the five categories that are popular now; every 40 minutes others are."""
    chance, rows = np.random.default_rng(seed), records * ROWS
    events = np.zeros(rows, EVENT)
    events["at_ms"], events["offset"] = 1_800_000_000_000 + np.arange(rows) * 10_000, np.arange(rows)
    events["topic"] = SOURCE.topic
    now = np.random.default_rng(seed + 1).permuted(np.tile(np.arange(CATEGORIES), (rows, 1))[::240], axis=1)
    category = now[np.arange(rows) // 240, chance.integers(0, 5, rows)]
    events["category"], events["item"] = 1000 + category, 5000 + 10 * category + chance.integers(0, 4, rows)
    users = chance.integers(1, 80, rows).astype(np.uint64)
    yield from micro_batches(plain(users, events), SPEC, (1.0,) * 4, size)


def trained(records: int, interests: str = "counts", size: int = ROWS) -> Trainer:
    trainer = Trainer(settings(interests), SPEC)
    for batch in batches(records, size):
        trainer.step(batch)
    return trainer


def known_top5(trainer: Trainer) -> float:
    return trainer.measures.progressive.values()["total.known.top5"]


def test_interests_follow_what_is_clicked_now() -> None:
    alone, counted = (known_top5(trained(30, interests)) for interests in ("model", "counts"))
    assert counted > alone + 0.05


def test_a_restart_changes_no_bit_and_the_cut_of_the_log_no_count() -> None:
    whole, other = trained(4), Trainer(settings(), SPEC)
    for number, batch in enumerate(batches(4)):
        if number == 2:
            tensors, other = checkpoint.full(other), Trainer(settings(), SPEC)
            checkpoint.load(other, tensors)
        other.step(batch)
    assert content.digest(checkpoint.full(other)) == content.digest(checkpoint.full(whole))
    cut = trained(4, size=100)
    assert cut.tables[NEXT_CATEGORY].digest() == whole.tables[NEXT_CATEGORY].digest()


def test_the_model_itself_learns_the_same_as_without_the_correction() -> None:
    counted, alone = trained(4), trained(4, "model")
    for name, weight in alone.model.weights().items():
        assert counted.model.weights()[name].tobytes() == weight.tobytes()
    assert all(counted.tables[name].digest() == table.digest() for name, table in alone.tables.items())


def test_a_score_has_the_correction_of_the_next_step() -> None:
    trainer = trained(6)
    *_, batch = batches(7)
    first = batch.rows(slice(0, 1))
    scored = trainer.score(first)
    corrected: list[np.ndarray] = []
    learn = trainer.interest_counts.learn

    def kept(*given: object) -> object:
        updates = learn(*given)
        corrected.append(updates[0].scores.popular_logits)
        return updates

    trainer.interest_counts.learn = kept
    trainer.step(first)
    np.testing.assert_allclose(scored["popular_logits"], corrected[0], rtol=1e-5, atol=1e-5)


def test_impressions_without_a_click_are_neither_counted_nor_learned() -> None:
    trainer = Trainer(settings(), SPEC)
    for batch in batches(2):
        trainer.step(replace(batch, label=np.zeros(len(batch), np.float32)))
    assert trainer.interest_counts is not None and not trainer.interest_counts.learned
    table = trainer.tables[NEXT_CATEGORY]
    assert not {*table.known().tolist()} - {*EVERYTHING.tolist()}


@pytest.mark.parametrize("off", ["model", "private"])
def test_without_the_setting_or_with_a_privacy_budget_there_are_no_lists(off: str) -> None:
    made = settings("model" if off == "model" else "counts")
    if off == "private":
        made = replace(made, privacy=replace(made.privacy, epsilon=1.0))
    assert InterestCounts.of(made, SPEC) is None
