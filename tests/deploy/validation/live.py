"""A training log whose rows are drawn from known distributions, and a registry with the baseline of such rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from state.config.loading import load
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.positions import Range, Source
from state.registry.control import start
from state.registry.registry import Registry
from state.statistics.baselines import baseline_files, infer_schema
from state.statistics.collecting import Statistics, dataset
from tests.memory_log import MemoryLog
from tests.state.statistics.made_rows import ATTRIBUTES
from tests.state.statistics.made_rows import columns as made_columns

SPEC = FeatureSpec()
SOURCE = Source("7a" * 16, 0)
TOPIC_ID = "cd" * 16
MINUTE_MS = 60_000
START_MS = 1_790_000_040_000
CONTEXT = ("device",)


def settings_at(state: Path, *flags: str) -> Settings:
    """Settings with windows of a minute, each judged from 100 rows on."""
    own = ("--paths.state", str(state), "--validation.window_s", "60", "--validation.min_rows", "100")
    return load([*own, "--events.context", "device", *flags], env={})


def columns(rows: int, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Columns of the default feature spec, drawn as `made_rows` draws them."""
    made = made_columns(rows, seed=seed, **changes)
    drawn = np.random.default_rng(seed + 1000)
    features = drawn.poisson(5, (rows, len(SPEC.names))).astype(np.uint16)
    features[:, :3] = made["features"] % 251
    of_category = (rows, SPEC.recent_categories)
    features[:, 3:] = np.minimum(features[:, 3:], 1)
    features[:, 2] = 1
    features[:, 1] = np.minimum(features[:, 1], 1)
    return made | {
        "features": features,
        "at_ms": np.full(rows, START_MS),
        "weight": np.ones(rows, np.float32),
        "source": np.zeros(rows, np.uint16),
        "offset": np.arange(rows),
        "waited": np.zeros(rows, np.int64),
        "request": np.zeros(rows, np.uint64),
        "recent_categories": np.zeros(of_category, np.uint64),
        "category_windows": np.zeros((*of_category, len(SPEC.window_names)), np.uint16),
    }


def record(made: dict[str, Any], at_ms: int, spec: str = SPEC.digest) -> bytes:
    """A record of the training log, written when it was `at_ms` by the clocks of many users."""
    rows = len(made["user"])
    header = Header(
        spec,
        "0" * 16,
        (Range(SOURCE, 0, rows, rows=rows),),
        at_ms,
        attributes=ATTRIBUTES,
        clocks=((at_ms - 1, at_ms),),
    )
    return encode(header, made)


def written(records: Sequence[bytes], log: MemoryLog | None = None, settings: Settings | None = None) -> MemoryLog:
    """A training log with these records behind what it had."""
    topic = (settings or Settings()).kafka.microbatches_topic
    if log is None:
        log = MemoryLog(ids=lambda: TOPIC_ID)
        log.topics().ensure(topic, 1)
    with log.writer("stream") as writer:
        for value in records:
            with writer.transaction():
                writer.send(topic, 0, None, value)
    return log


def minutes(count: int, rows: int = 400, first: int = 0, **changes: Any) -> list[bytes]:
    """Two records in each of so many minutes."""
    return [
        record(columns(rows // 2, seed=2 * minute + half, **changes), START_MS + minute * MINUTE_MS + half * 20_000)
        for minute in range(first, first + count)
        for half in range(2)
    ]


def bootstrapped(settings: Settings, rows: int = 4000) -> Registry:
    """A registry with control and a bootstrap of such rows."""
    counted = Statistics(SPEC.actions, SPEC.names, CONTEXT)
    counted.add(columns(rows, seed=999), ATTRIBUTES)
    statistics = dataset(counted, "bootstrap")
    files = baseline_files(infer_schema(statistics, warm=False), statistics)
    about = {
        "spec": SPEC.to_json(),
        "salt": "0" * 16,
        "preprocessing": settings.model.preprocessing,
        "newest_ms": START_MS,
        "created_at_ms": START_MS,
        "names": {},
    }

    def fill(place: Path) -> None:
        for name, data in files.items():
            (place / name).write_bytes(data)

    registry = Registry(settings.registry_dir)
    registry.specs.add_spec(SPEC.digest, about, fill)
    registry.propose(start(actor="trainer", reason="first start", now_ms=START_MS))
    return registry
