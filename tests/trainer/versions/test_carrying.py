"""What goes on in another model is bit for bit what was there; what does not fit begins as if nothing had been learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from state.features.spec import FeatureSpec
from state.registry.model_fit import upgrade
from state.registry.registry import SERVING, Registry
from state.rows.store import RowStore
from tests.conformance.test_own_tables import EVERY, log, wanted
from tests.trainer.clicks import SPEC, batches, small_settings
from tests.trainer.logs import draft, started
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content
from trainer.versions.carrying import carried, carry_over, plan

OTHER_SPEC = FeatureSpec(windows_s=(1800, 604800))
COLUMNS = ("ids", "rows", "accum", "last_seen_ms", "pending_ids", "pending_counts", "pending_seen_ms")


def learned(*flags: str, spec: FeatureSpec = SPEC, steps: int = 6) -> Trainer:
    trainer = Trainer(small_settings("--trainer.admit_after", "2", *flags), spec)
    for batch in batches(0, steps) if spec == SPEC else ():
        trainer.step(batch)
    return trainer


def publish(registry: Registry, tensors: content.Tensors, parent: int | None, epoch: int = 1) -> int:
    return registry.publish(draft(parent, epoch=epoch), content.encode(tensors)).version


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started(tmp_path / "registry")


def begun(registry: Registry, base: int) -> None:
    registry.change(lambda now: upgrade(now, base, {}, actor="ann", reason="test", now_ms=1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RowStore]:
    found = RowStore(tmp_path / "rows", 1 << 27)
    yield found
    found.close()


def test_the_same_model_carries_everything_bit_by_bit(registry: Registry) -> None:
    ours = learned()
    version = publish(registry, checkpoint.full(ours), None)
    theirs = learned(steps=2)
    found = carry_over(registry, version, theirs)
    assert checkpoint.digest(theirs) == checkpoint.digest(ours)
    assert found.planned.anew == ()
    assert all(len(found.changes[f"{table}.ids"]) == 0 for table in content.TABLES)


@pytest.mark.parametrize(
    ("flags", "spec", "tables", "weights"),
    [
        (("--model.hidden", "24,8"), SPEC, set(), {"tower.kernel_0", "tower.bias_0", "tower.kernel_1"}),
        (("--model.dim", "4"), SPEC, {"user", "item", "category", "context"}, None),
        ((), OTHER_SPEC, set(), None),
    ],
    ids=["wider layer", "narrower rows", "other windows"],
)
def test_what_keeps_its_name_and_shape_goes_on_and_nothing_else(
    registry: Registry, flags: tuple[str, ...], spec: FeatureSpec, tables: set[str], weights: set[str] | None
) -> None:
    ours = learned()
    old = checkpoint.full(ours)
    version = publish(registry, old, None)
    theirs = learned(*flags, spec=spec, steps=0)
    fresh = checkpoint.full(theirs)
    found = carry_over(registry, version, theirs)
    new = checkpoint.full(theirs)
    assert {one.name for one in found.planned.anew if one.kind == "table"} == tables
    for table in content.TABLES:
        source = fresh if table in tables else old
        assert all(np.array_equal(new[f"{table}.{name}"], source[f"{table}.{name}"]) for name in COLUMNS), table
    anew = {one.name for one in found.planned.anew if one.kind == "weight"}
    if weights is not None:
        assert anew == weights
    assert anew
    for name in theirs.model.dense:
        assert (old.get(f"dense.{name}", np.zeros(0)).shape == fresh[f"dense.{name}"].shape) == (name not in anew)
        source = fresh if name in anew else old
        assert np.array_equal(new[f"dense.{name}"], source[f"dense.{name}"])
        if f"slots.{name}.m" in fresh:
            assert np.array_equal(new[f"slots.{name}.m"], source[f"slots.{name}.m"])
    # Facts of the log.
    assert theirs.counters == ours.counters
    assert theirs.popular.top().tolist() == ours.popular.top().tolist()
    assert theirs.measures.evaluation.values() == ours.measures.evaluation.values()
    # Another loss is to be expected.
    assert ours.guard != theirs.guard
    if spec == SPEC:
        theirs.step(batches(6, 7)[0])


def test_the_first_version_laid_on_the_old_one_is_the_trainer_that_goes_on(registry: Registry, store: RowStore) -> None:
    ours = learned()
    first = publish(registry, checkpoint.full(ours), None)
    ours.step(batches(6, 7)[0])
    version = publish(registry, checkpoint.changes(ours), first)
    before = checkpoint.digest(ours)
    theirs = learned("--model.dim", "4", steps=0)
    begun(registry, version)
    found = carry_over(registry, version, theirs)
    now = publish(registry, found.changes, version, epoch=2)
    after = checkpoint.digest(theirs)
    again = learned("--model.dim", "4", steps=0)
    checkpoint.restore(registry, now, again, SPEC.digest)
    assert checkpoint.digest(again) == after
    checkpoint.restore(registry, version, ours, SPEC.digest)
    assert checkpoint.digest(ours) == before
    for number in (first, version, now):
        manifest = registry.manifest(number)
        store.apply(manifest, content.decode([registry.read(manifest, SERVING)]), 0)
    user = int(ours.tables["user"].state().ids[0])
    with store.reader() as reader:
        old, new = (reader.version(number) for number in (version, now))
        assert old is not None and new is not None
        assert len(reader.row("user", user, old) or b"") == 4 * 8
        assert reader.row("user", user, new) is None
    theirs.step(batches(7, 8)[0])
    grown = publish(registry, checkpoint.changes(theirs), now, epoch=2)
    checkpoint.restore(registry, grown, again, SPEC.digest)
    assert checkpoint.digest(again) == checkpoint.digest(theirs)
    # Versions that are thinned out across the upgrade.
    base, *deltas = [
        checkpoint.tensors_of(registry, registry.manifest(number)) for number in (first, version, now, grown)
    ]
    for cut in (1, 2):
        thinned = [content.merge(deltas[:cut], full=False), content.merge(deltas[cut:], full=False)]
        checkpoint.load(again, content.merge([base, *thinned]))
        assert checkpoint.digest(again) == checkpoint.digest(theirs)
    checkpoint.load(again, content.merge([base, content.merge(deltas, full=False)]))
    assert checkpoint.digest(again) == checkpoint.digest(theirs)


def test_a_table_that_is_read_no_longer_leaves_nothing_and_begins_anew_when_it_comes_back(registry: Registry) -> None:
    settings = wanted(EVERY)
    spec = FeatureSpec.from_settings(settings)
    model = dataclasses.replace(settings.model, ranker=type(settings.model)().ranker)
    plain = dataclasses.replace(settings, model=model)
    ours, other = Trainer(settings, spec), Trainer(plain, spec)
    for batch in log(ours, 3):
        ours.step(batch)
    version = publish(registry, checkpoint.full(ours), None)
    begun(registry, version)
    found = carry_over(registry, version, other)
    left = {one.name: one for one in found.planned.anew if one.kind == "table"}
    assert left["every"].now is None
    assert left["every"].rows == len(ours.tables["every"]) > 0
    now = publish(registry, found.changes, version, epoch=2)
    checkpoint.restore(registry, now, other, SPEC.digest)
    begun(registry, now)
    back = carry_over(registry, now, ours)
    assert {one.name: one.was for one in back.planned.anew if one.kind == "table"}["every"] is None
    assert len(ours.tables["every"]) == 0
    assert len(ours.tables["user"]) == len(other.tables["user"]) > 0


def test_plan_is_told_in_words() -> None:
    old: dict[str, np.ndarray] = {
        "user.ids": np.zeros(3, np.uint64), "user.rows": np.zeros((3, 4), np.float32),
        "dense.kept": np.zeros((2, 2), np.float32), "dense.gone": np.zeros(5, np.float32),
        "state.counters.steps": np.array(7), "state.counters.trained": np.array(1234),
    }  # fmt: skip
    fresh: dict[str, np.ndarray] = {
        "user.ids": np.zeros(0, np.uint64), "user.rows": np.zeros((0, 8), np.float32),
        "dense.kept": np.ones((2, 2), np.float32), "dense.new": np.ones(6, np.float32),
    }  # fmt: skip
    found = plan(old, fresh)
    assert found.lines() == [
        "carried over:",
        "  1 of 2 dense weights, 4 numbers, with their optimizer's slots",
        "  the counts of 7 steps and 1,234 rows, 0 popular categories, and all measures",
        "starts from scratch:",
        "  table user: 3 rows of width 4, the width is now 8",
        "  weight new: the version has none",
        "  weight gone: 5, no longer read",
        "  the guard's running loss, with the weights",
    ]
    assert found.wanting(("user",)) == found.anew[1:]
    assert found.document() == {"tables": {}, "weights": 1, "anew": [str(one) for one in found.anew]}


def test_fast_weights_keep_their_slots_only_together() -> None:
    old = {f"dense.{name}": np.zeros(2, np.float32) for name in "ab"} | {
        "slots.moving.accum": np.full(4, 5.0, np.float32),
        "slots.powers": np.array([0.5, 0.9]),
        "state.guard.skipped": np.array(3),
    }
    fresh = {f"dense.{name}": np.ones(2, np.float32) for name in "ab"} | {
        "slots.moving.accum": np.zeros(4, np.float32),
        "slots.powers": np.array([0.9, 0.999]),
        "state.guard.skipped": np.array(0),
    }
    kept = carried(old, fresh, plan(old, fresh), ("a", "b"))
    assert kept["slots.moving.accum"].tolist() == [5.0] * 4
    assert (kept["slots.powers"][0], int(kept["state.guard.skipped"])) == (0.5, 3)
    other = fresh | {"dense.b": np.ones(3, np.float32)}
    anew = carried(old, other, plan(old, other), ("a", "b"))
    assert anew["slots.moving.accum"].tolist() == [0.0] * 4
    assert (anew["slots.powers"][0], int(anew["state.guard.skipped"])) == (0.9, 0)
    assert anew["dense.a"].tolist() == [0.0, 0.0]
