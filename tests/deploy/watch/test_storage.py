"""What status says of stores and of the quality of what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deploy import sections
from deploy.sections import disk_usage
from deploy.watch.figures import full_parts
from deploy.watch.scrape import Scrape, parsed
from state import storage
from state.config.loading import load
from state.metrics import StorageMetrics, TrainerMetrics
from state.storage import Room
from tests import promql
from tests.rules import ALERTS
from tests.trainer.batches import micro_batch
from tests.trainer.logs import fresh
from trainer import gauges
from trainer.measures.progressive import BASELINES, USERS

NEAR, FULL = ALERTS["SpringtideStorageNearLimit"]["expr"], ALERTS["SpringtideStorageFull"]["expr"]
BUDGET = 500_000_000


def scraped(tmp_path: Path, used: dict[str, float]) -> Scrape:
    """What the processes offer where each part takes such a share of its limit; the files have holes in place of bytes."""
    settings = load(["--paths.state", str(tmp_path), "--storage.budget_gb", str(BUDGET / 1e9)], env={})
    (tmp_path / "stream-0" / "histories").mkdir(parents=True)
    collected = CollectorRegistry()
    metrics = storage.offer(collected, settings, used)
    for part, share in used.items():
        folder = storage.folders(settings, part)[0]
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(bytes(4096))
        assert storage.used_bytes([folder]) == 4096
        # As if that file were so large: a test need not write half a gigabyte.
        metrics.limit_bytes.labels(part).set(4096 / share)
    return Scrape(parsed(generate_latest(collected).decode()))


def parts(vector: promql.Vector) -> set[str]:
    return {dict(labels)["part"] for labels in vector}


@pytest.mark.parametrize(
    ("used", "near", "said"),
    [
        ({"registry": 0.5, "stream": 0.8, "logs": 0.89}, set(), []),
        ({"registry": 0.95, "stream": 0.1, "logs": 0.1}, {"registry"}, ["registry takes 95% of its share of the disk"]),
        (
            {"registry": 0.93, "logs": 0.99},
            {"registry", "logs"},
            ["logs takes 99% of its share of the disk", "registry takes 93% of its share of the disk"],
        ),
    ],
)
def test_a_part_near_its_limit_is_an_alert_and_is_said_and_one_below_is_neither(
    tmp_path: Path, used: dict[str, float], near: set[str], said: list[str]
) -> None:
    found = scraped(tmp_path, used)
    assert parts(promql.value(NEAR, found.values)) == near
    assert full_parts([found]) == said


def test_a_part_that_waits_is_an_alert_until_there_is_room() -> None:
    collected = CollectorRegistry()
    room = Room("registry", StorageMetrics(collected), lambda _: False)

    def fires() -> tuple[set[str], list[str]]:
        found = Scrape(parsed(generate_latest(collected).decode()))
        return parts(promql.value(FULL, found.values)), full_parts([found])

    assert fires() == (set(), [])
    room.refused(OSError(28, "No space left on device"), "publishing")
    assert fires() == ({"registry"}, ["publishing waits for space"])
    room.found("publishing")
    assert fires() == (set(), [])


def test_status_measures_what_is_here_and_says_nothing_where_nothing_is(tmp_path: Path) -> None:
    settings = load(["--paths.state", str(tmp_path / "state"), "--storage.budget_gb", "1"], env={})
    assert disk_usage(settings) is None
    settings.logs_dir.mkdir(parents=True)
    (settings.logs_dir / "stream.log").write_bytes(bytes(8192))
    found = disk_usage(settings)
    assert found is not None
    assert found["parts"] == {"logs": {"used_bytes": 8192, "limit_bytes": 50_000_000}}
    assert (found["used_bytes"], found["budget_bytes"]) == (8192, 1_000_000_000)
    assert found["free_bytes"] == pytest.approx(storage.free_bytes(tmp_path), rel=0.05)


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
