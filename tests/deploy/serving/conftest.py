"""A small serving host: a real program of the real model, one version, histories of two users."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from state.config.settings import Settings
from state.events.identity import Salt, public_id, user_id
from state.features.spec import FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.rows.store import RowStore
from tests.deploy.serving.stocked import (
    MAP,
    NOW_MS,
    SALT_KEY,
    Lowered,
    Stores,
    clicks,
    digest_of,
    manifest,
    small,
    tensors,
)


@functools.cache
def lowered_once() -> Lowered:
    """Takes some seconds; the fixture is also one of each folder that imports it."""
    from trainer.model.default_ranker import DefaultRanker
    from trainer.versions.lowering import build

    settings, spec = small(Settings()), FeatureSpec()
    model = DefaultRanker(settings.model, spec)
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in model.weights().items()}
    model.set_weights(weights)
    return Lowered(build(model), weights, model)


@pytest.fixture(scope="session")
def lowered() -> Lowered:
    return lowered_once()


@pytest.fixture
def stores(tmp_path: Path, lowered: Lowered) -> Iterator[Stores]:
    """Version 1 is served; `ann` has clicks and a row, `bob` has clicks only."""
    # Other tests give it other weights.
    lowered.model.set_weights(lowered.weights)
    settings = small(Settings())
    settings = replace(settings, paths=replace(settings.paths, state=str(tmp_path)))
    settings.salt_path.write_text(SALT_KEY.decode())
    settings.salt_path.chmod(0o600)
    folder = settings.serving_dir
    rows = RowStore(folder / ROWS, MAP)
    histories = HistoryStore(folder / HISTORIES, map_bytes=MAP)
    (folder / PROGRAMS).mkdir()
    (folder / PROGRAMS / f"{digest_of(lowered)}.tflite").write_bytes(lowered.content)
    names = {"user": ["ann"], "category": ["shoes", "hats", "books", "tea"], "item": ["i1"]}
    rows.apply(manifest(1, digest_of(lowered)), tensors(lowered, 1, names, ["tea", "shoes"]), NOW_MS, follow=True)
    users = np.array([user_id(Salt(SALT_KEY), name) for name in ("ann", "ann", "bob")], np.uint64)
    events = clicks([("hats", "i1", 60_000), ("shoes", "i2", 5_000), ("books", "i3", 9_000)])
    extra = {f"name:{public_id(name):016x}": name.encode() for name in ("shoes", "hats", "books")}
    extra["clock"] = b'{"event_ms": %d, "accepted_ms": %d}' % (NOW_MS - 5_000, NOW_MS - 400)
    extra["caught_up"] = b"1"
    extra[f"item:{public_id('i1'):016x}"] = public_id("hats").to_bytes(8, "big") + b"i1"
    histories.commit(Appends.of(users, events), (), extra)
    made = Stores(settings, rows, histories, lowered)
    yield made
    made.close()
