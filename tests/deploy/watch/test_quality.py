"""`springtide status` says how good the model is beside what is simple, from what the trainer really offers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from deploy import sections
from deploy.watch.scrape import Scrape, parsed
from state.metrics import TrainerMetrics
from tests.trainer.batches import micro_batch
from tests.trainer.logs import fresh
from trainer import gauges
from trainer.measures.predictions import BASELINES
from trainer.measures.step_scores import USERS


def test_status_says_what_the_trainer_measured() -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    assert sections.quality(Scrape(parsed(generate_latest(registry).decode()))) is None
    trainer = fresh()
    trainer.clear()
    for number in range(3):
        trainer.step(micro_batch(64, first=64 * number))
    measured = trainer.measures.progressive.values()
    gauges.show_quality(measured, metrics)
    found = sections.quality(Scrape(parsed(generate_latest(registry).decode())))
    assert found is not None
    assert found["predictors"]["model"]["known"]["top5"] == measured["known.top5"]
    assert found["lift"]["log_loss"] == measured["lift.log_loss"]
    for name in BASELINES:
        assert found["predictors"][name]["all"]["mrr"] == measured[f"baseline.{name}.mrr"]
    assert (sections.USERS, tuple(sections.BASELINES)) == (USERS, BASELINES)
    word, text = sections.quality_text(found)
    assert word.endswith(" points") and f"MRR {measured['mrr']:.3f}" in text and "known users" in text
