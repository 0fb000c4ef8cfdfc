"""Tables of a user's own ranker, from the trainer to the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from state.config.sections import Model
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.registry.registry import SERVING, Registry
from state.rows.store import RowStore
from state.rows.tables import SERVED_IDS, UNSERVED, tables_in
from tests.conformance.kept import sweep
from tests.conformance.test_engines import CONFIGURED, batches, settings_of
from tests.trainer.logs import publish, started
from trainer.engine.build import grown_by
from trainer.engine.graphs import ranker_of
from trainer.engine.step import Trainer
from trainer.model import losses
from trainer.model.inputs import IDS, own_rows, pick, sizes
from trainer.model.ranker import MASKED, Ranker, Targets
from trainer.model_checks import check_own
from trainer.versions import checkpoint, content

EVERY = "every id"


def wanted(name: str) -> Settings:
    """The settings of an example, or of the ranker that looks up its table by every id."""
    if name != EVERY:
        return settings_of(name)
    found = settings_of("two_tower")
    model = dataclasses.replace(found.model, ranker="tests.conformance.test_own_tables:build", options=(), popular=4)
    events = dataclasses.replace(found.events, context=("place", "device"))
    features = dataclasses.replace(found.features, sequence=3)
    return dataclasses.replace(found, model=model, events=events, features=features)


def made(name: str) -> Trainer:
    settings = wanted(name)
    return Trainer(settings, FeatureSpec.from_settings(settings))


def log(trainer: Trainer, count: int) -> list[Any]:
    spec, fields = FeatureSpec.from_settings(trainer.settings), len(trainer.settings.events.context)
    found = batches(spec, count)
    context = np.arange(fields, dtype=np.uint64) + np.uint64(11)
    return [dataclasses.replace(batch, context=np.tile(context, (len(batch), 1))) for batch in found]


def ranker(name: str) -> Ranker:
    settings = wanted(name)
    return ranker_of(settings, FeatureSpec.from_settings(settings), None)


NAMES = [EVERY, "din"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RowStore]:
    found = RowStore(tmp_path / "rows", 1 << 27)
    yield found
    found.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started(tmp_path / "registry")


def rows_of(trainer: Trainer, table: str) -> dict[int, bytes]:
    held = trainer.tables[table].state()
    return {one: row.tobytes() for one, row in zip(held.ids.tolist(), held.rows, strict=True)}


def served(store: RowStore, version: int, table: str, ids: list[int]) -> dict[int, bytes]:
    with store.reader() as reader:
        at = reader.version(version)
        assert at is not None
        rows, known = reader.get(table, ids, at)
        return {one: row.tobytes() for one, row, there in zip(ids, rows, known, strict=True) if there}


def test_the_examples_with_tables_of_their_own_are_tested() -> None:
    assert [name for name in sorted(CONFIGURED) if grown_by(ranker(name))] == NAMES[1:]


@pytest.mark.parametrize("name", NAMES)
def test_its_rows_are_published_applied_and_read_at_each_version_as_they_were(
    name: str, registry: Registry, store: RowStore
) -> None:
    trainer = made(name)
    own = sorted(grown_by(trainer.model))
    version, truth = publish(registry, trainer, None), {}
    for batch in log(trainer, 4):
        trainer.step(batch)
        version = publish(registry, trainer, version)
        truth[version] = {table: rows_of(trainer, table) for table in own}
    late = log(trainer, 1)[0]
    gone = {table: set(truth[version][table]) for table in own}
    trainer.step(dataclasses.replace(late, at_ms=late.at_ms + 2 * int(trainer.settings.trainer.expire_s * 1000)))
    version = publish(registry, trainer, version)
    truth[version] = {table: rows_of(trainer, table) for table in own}
    for table in own:
        assert len(trainer.tables[table].state().ids), f"{table} has grown"
    assert any(gone[table] - truth[version][table].keys() for table in own), "what was not seen for long has expired"

    # Serving's file alone makes the rows, at each version what the trainer held; going back changes none of them.
    base, deltas = registry.chain(version)
    for part in (base, *deltas):
        store.apply(part, content.decode([registry.read(part, SERVING)]), now_ms=part.version, follow=True)
    store.serve(min(truth))
    for number, tables in truth.items():
        for table, rows in tables.items():
            everything = sorted({*rows, *gone[table]})
            assert served(store, number, table, everything) == rows, f"{table} at version {number}"
    # What the compactor makes of the chain is what the trainer holds, and a trainer goes on from there.
    merged = content.merge(checkpoint.tensors_of(registry, part) for part in (base, *deltas))
    assert content.digest(merged) == checkpoint.digest(trainer)
    other = made(name)
    checkpoint.load(other, merged)
    assert checkpoint.digest(other) == checkpoint.digest(trainer)
    # Swept versions leave the rows of the one that stays, and nothing else.
    sweep(store, 10**9, keep=[version])
    store.serve(version)
    sweep(store, 10**9)
    for table, rows in truth[version].items():
        assert served(store, version, table, sorted({*rows, *gone[table]})) == rows
    counted = sum(len(merged[f"{table}.ids"]) for table in tables_in(merged) if table not in UNSERVED)
    assert store.entries() == counted


def test_ids_grow_a_table_by_what_happened_and_not_by_being_looked_up() -> None:
    trainer = made(EVERY)
    assert set(grown_by(trainer.model)["every"]) == {
        "user", "item", "category", "context", "item_attributes", "sequence_actions",
    }  # fmt: skip
    assert grown_by(trainer.model)["narrow"] == ("item",)
    batch = log(trainer, 1)[0]
    trainer.step(batch)
    assert set(rows_of(trainer, "narrow")) == set(batch.item.tolist())
    parts = (batch.user, batch.item, batch.category, batch.context, batch.sequence_actions)
    assert set(rows_of(trainer, "every")) == {one for part in parts for one in part.reshape(-1).tolist()} - {0}


def test_rows_begin_as_the_ranker_says_and_move() -> None:
    trainer = made(EVERY)
    batch = log(trainer, 1)[0]
    trainer._observe(batch, trainer._recorder.crosses_of(batch))
    first = {table: trainer.tables[table].state().rows for table in ("every", "narrow")}
    assert 0.4 < np.abs(first["every"]).max() <= 0.5
    assert 0.04 < np.abs(first["narrow"]).max() <= 0.05
    trainer.step(batch)
    assert (trainer.tables["every"].state().rows != first["every"]).any(1).mean() > 0.9


def test_it_is_checked_and_named() -> None:
    settings = wanted(EVERY)
    said = check_own(settings, FeatureSpec.from_settings(settings))
    assert all(f"{table} [" in said for table in grown_by(ranker(EVERY)))


def test_a_version_of_other_tables_is_refused_by_name() -> None:
    ours, theirs = made(EVERY), made("two_tower")
    for here, there in ((ours, theirs), (theirs, ours)):
        with pytest.raises(SettingsError, match=r"rows of \w+: expected width \w+, the version has \w+; put the"):
            checkpoint.load(here, checkpoint.full(there))


WIDTH, NARROW = 3, 2
KINDS = ("recent", "popular", "successor")
ROWS = (*(f"every_of_{ids}" for ids in SERVED_IDS if ids != "popular"), "narrow_of_sequence_items")
"""What the vector consists of, in this order: rows of several ids one behind another."""


class LookingUp(Ranker):
    """Its vector is the rows themselves; a candidate's score is the sum of its row."""

    def __init__(self, settings: Model, spec: FeatureSpec) -> None:
        super().__init__(name="looking_up")
        self.tables = {"every": WIDTH, "narrow": NARROW}
        self.initial_ranges = {"every": 0.5}
        masks = pick(*(f"{kind}_mask" for kind in KINDS))
        self.inputs = (*masks, *own_rows("every", *IDS), *own_rows("narrow", "sequence_items"))
        self.sizes = sizes(settings, spec)
        width = sum(int(np.prod(spec.shape[1:])) for name, spec in self.specs().items() if name in ROWS)
        self.dense = {
            "shown": tf.Variable(np.linspace(-1, 1, width, dtype=np.float32), name="shown"),
            "scale": tf.Variable(np.ones(1, np.float32), name="scale"),
        }

    def encode(self, inputs: Mapping[str, Any], training: bool, seed: Any) -> Any:
        """`[B, width]`, all rows of a user and an item one behind another, but those of popular categories."""
        return tf.concat([tf.reshape(inputs[name], [-1, int(np.prod(inputs[name].shape[1:]))]) for name in ROWS], 1)

    def score(self, encoded: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Sums of rows."""
        scores = {}
        for kind in KINDS:
            logits = tf.reduce_sum(inputs[f"every_of_{kind}"], -1) * self.dense["scale"]
            mask = inputs[f"{kind}_mask"]
            scores[f"{kind}_logits"] = logits * mask + (1.0 - mask) * MASKED
        pair = tf.linalg.matvec(encoded, self.dense["shown"])
        scores |= {"engagement_logit": pair, "vector": encoded * self.dense["scale"]}
        if "every_of_other" in inputs:
            negative = ("negative_item", "negative_category", "negative_item_attributes")
            scores["other_logit"] = tf.reduce_sum(inputs["every_of_other"], -1)
            scores["negative_logit"] = tf.add_n([tf.reduce_sum(inputs[f"every_of_{name}"], -1) for name in negative])
        return scores

    def losses(self, encoded: Any, inputs: Mapping[str, Any], targets: Targets) -> Any:
        """Softmax over the candidates, and the log loss of pairs."""
        return losses.log_losses(self.score(encoded, inputs), targets)


def build(settings: Model, spec: FeatureSpec, preprocessing: Any) -> LookingUp:
    return LookingUp(settings, spec)
