"""The engines and the rankers learn what the default ones learn."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from state import probe
from state.config.loading import load
from state.config.sections import Model, TrainerSettings
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from tests.trainer.batches import SPEC, micro_batch
from tests.trainer.engine.test_step import digests, learned, restored
from tests.trainer.engine.test_step import settings as trainer_settings
from tests.trainer.model.test_attributes import WANTED, with_attributes
from trainer.engine import guard
from trainer.engine.adam import FastSlots
from trainer.engine.engine import Measured
from trainer.engine.graphs import engine_name
from trainer.engine.step import Trainer
from trainer.model.default_model import FAST_WEIGHTS
from trainer.model.default_ranker import DefaultRanker
from trainer.model.ranker import MASKED, Ranker
from trainer.model_checks import check_own
from trainer.versions import checkpoint
from trainer.versions.lowering import answers
from trainer.versions.program import sample

ENGINES = ("compiled", "tensorflow")
SMALL = Model(dim=8, hidden=(16, 8), popular=4)
SCORES, GRADIENTS = 1e-5, 1e-4
AFTER_100_STEPS = 0.03
"""Mean difference of a logit after hundred steps: rounding, and what hinges and divisions by small roots make of it.

The compiled engine is as far from itself where its first weights are scaled by 1 + 1e-6.
"""


@pytest.fixture(autouse=True)
def _no_step_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the guard sees a threshold between two roundings, two ways part for good."""
    monkeypatch.setattr(guard, "FACTOR", 1e9)


@functools.cache
def trainer(engine: str, kind: str) -> Trainer:
    """Tracing takes seconds, so that each is made once and cleared."""
    base = trainer_settings()
    own = dataclasses.replace(base.trainer, engine=engine)
    base = dataclasses.replace(base, model=SMALL, trainer=own)
    if kind == "dropout":
        base = dataclasses.replace(base, model=dataclasses.replace(SMALL, dropout=0.3))
    if kind == "labels and attributes":
        events = dataclasses.replace(base.events, context=("tab",), label="clicked")
        base = dataclasses.replace(base, events=events, attributes=WANTED)
    return Trainer(base, SPEC)


def batch(kind: str, rows: int, first: int = 0, seed: int = 0, known: bool = True, targets: bool = True) -> MicroBatch:
    """Rows whose recent categories are distinct, as a history gives them."""
    made = micro_batch(rows, first=first, seed=seed, categories=20, items=40, users=30, context=0)
    recent = made.recent_categories.copy()
    for row in recent:
        distinct = [one for one in dict.fromkeys(row.tolist()) if one and known]
        row[:] = 0
        row[: len(distinct)] = distinct
    drawn = np.random.default_rng([seed, first, 1])
    category = np.where(drawn.random(rows) < 0.8, made.category, np.uint64(0)) if targets else np.zeros(rows, np.uint64)
    item = np.where(drawn.random(rows) < 0.9, made.item, np.uint64(0))
    windows = np.where(recent[:, :, None] != 0, made.category_windows, np.uint16(0))
    made = dataclasses.replace(made, recent_categories=recent, category=category, item=item, category_windows=windows)
    if kind == "labels and attributes":
        label = np.where(drawn.random(rows) < 0.7, drawn.integers(0, 2, rows), np.nan).astype(np.float32)
        context = micro_batch(rows, first=first, seed=seed, context=1).context
        made = with_attributes(dataclasses.replace(made, label=label, context=context), seed)
    return made


def prepared(kind: str, rows: MicroBatch, seed: int, ties: bool) -> tuple[list[Trainer], list[Measured]]:
    """Both engines' measures of the same rows from the same drawn weights; with ties rows say next to nothing."""
    trainers, found = [trainer(engine, kind) for engine in ENGINES], []
    drawn = np.random.default_rng(seed)
    first = trainers[0]
    first.clear()
    noise = {
        name: drawn.normal(0, 0.1, value.shape).astype(np.float32) for name, value in first.model.weights().items()
    }
    for one in trainers:
        one.clear()
        one.model.set_weights({name: value + noise[name] for name, value in one.model.weights().items()})
        weights = one.model.weights()
        one.optimizer.fast = FastSlots.of(np.concatenate([weights[name].reshape(-1) for name in FAST_WEIGHTS]))
        for category in rows.category[rows.category != 0][:3]:
            one.popular.update(np.array([category]), int(rows.at_ms[0]))
        crosses = one._recorder.crosses_of(rows)
        one._observe(rows, crosses)
        for table in one.tables.values():
            held = table.state()
            if ties and held.accum.shape[1]:
                places = table.find(held.ids)
                # Not zero: the ranker knows a category by its row, and the missing row is zero.
                table.put(places, held.rows * np.float32(1e-6), held.accum)
        found.append(one.engine.measure(one._record(rows, crosses, None)))
    return trainers, found


def gradients(one: Trainer, measured: Measured) -> dict[str, np.ndarray]:
    """By dense weight, and by table in the order of rows; both engines name rows in an order of their own."""
    found = measured.found
    dense = found.dense if one.engine.name == "compiled" else dict(zip(one.model.dense, found.dense, strict=True))
    held = {name: np.array(dense[name]) for name in one.model.dense}
    names = ("user", "item", "category", "context")
    sparse = found.sparse if one.engine.name == "compiled" else dict(zip(names, found.sparse, strict=True))
    for name in names:
        order = np.argsort(measured.rows[name][1:])
        held[name] = np.array(sparse[name])[1:][order]
    return held


@settings(
    max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    kind=st.sampled_from(["plain", "dropout", "labels and attributes"]),
    rows=st.integers(1, 75),
    seed=st.integers(0, 2**20),
    known=st.booleans(),
    targets=st.booleans(),
    ties=st.booleans(),
)
def test_scores_and_gradients_of_any_record_are_the_same(
    kind: str, rows: int, seed: int, known: bool, targets: bool, ties: bool
) -> None:
    made = batch(kind, rows, seed=seed, known=known, targets=targets)
    trainers, (one, other) = prepared(kind, made, seed, ties)
    for name in (
        "recent_logits",
        "popular_logits",
        "successor_logits",
        "interest_loss",
        "engagement",
        "engagement_loss",
    ):
        ours, theirs = getattr(one.scores, name), getattr(other.scores, name)
        # Sums of float32 are as exact as their largest term; what is masked is no score.
        largest = np.abs(ours, where=ours > MASKED / 2, out=np.zeros_like(ours)).max(initial=1.0)
        np.testing.assert_allclose(ours, theirs, rtol=SCORES, atol=SCORES * largest, err_msg=name)
    logits = np.concatenate([one.scores.recent_logits, one.scores.popular_logits, one.scores.successor_logits], 1)
    ranked = np.sort(logits, 1)
    apart = np.diff(ranked, axis=1)
    # A tie within rounding is decided by rounding.
    clear = ((apart > 1e-4) | (apart == 0)).all(1)
    assert (one.scores.rank == other.scores.rank)[clear].all()
    assert one.squared_norm == pytest.approx(other.squared_norm, rel=1e-3, abs=1e-9)
    ours, theirs = (gradients(*each) for each in zip(trainers, (one, other), strict=True))
    for name, value in ours.items():
        np.testing.assert_allclose(
            value,
            theirs[name],
            rtol=GRADIENTS,
            atol=GRADIENTS * max(1e-4, np.abs(value).max(initial=0.0)),
            err_msg=name,
        )


@pytest.mark.parametrize("kind", ["plain", "dropout", "labels and attributes"])
def test_each_engine_predicts_what_the_graph_does_and_changes_nothing(kind: str) -> None:
    made = batch(kind, 75)
    trainers, _ = prepared(kind, made, 3, False)
    for one in trainers:
        for number in range(3):
            one.step(batch(kind, 75, first=number * 75))
        before, ranker = checkpoint.digest(one), one.ranker()
        # Masks of probes and samples leave gaps, which no record has; and a pair's category may be a recent one.
        asked = [probe.inputs(one.model.shapes()), sample(one.model)]
        recent = asked[1]["recent_rows"]
        asked[1]["category_row"][4:9] = recent[4:9, 2]
        recent[9:12] = 0.0
        asked[1]["category_row"][11:14] = 0.0
        for inputs in asked:
            expected = answers(ranker, inputs)
            assert set(one.engine.predict(inputs)) == set(expected)
            assert probe.check(1, expected, one.engine.predict(inputs)) < probe.TOLERANCE
        assert checkpoint.digest(one) == before


@pytest.mark.parametrize("kind", ["plain", "labels and attributes"])
def test_after_hundred_steps_they_are_a_stated_distance_apart(kind: str) -> None:
    trainers = [trainer(engine, kind) for engine in ENGINES]
    reports = []
    for one in trainers:
        one.clear()
        reports.append([one.step(batch(kind, 40, first=number * 40)) for number in range(100)])
    probe = batch(kind, 64, first=9000)
    ours, theirs = (one.score(probe) for one in trainers)
    apart = np.concatenate([np.abs(value - theirs[name]).reshape(-1) for name, value in ours.items()])
    assert apart.mean() < AFTER_100_STEPS
    hits = [sum(one.quality.total("top1") for one in some) for some in reports]
    assert abs(hits[0] - hits[1]) <= 4
    losses = [np.nanmean([one.interest_log_loss for one in some]) for some in reports]
    assert losses[0] == pytest.approx(losses[1], abs=3e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_per_update_learns_within_a_record_as_records_of_so_many_rows_do(engine: str) -> None:
    one, made = trainer(engine, "plain"), batch("plain", 60)
    one.clear()
    held = one.settings
    one.settings = dataclasses.replace(held, trainer=dataclasses.replace(held.trainer, rows_per_update=20))
    try:
        report = one.step(made)
    finally:
        one.settings = held
    within = one.model.weights(), one.tables["category"].digest(), one.counters.trained
    one.clear()
    numbers = np.arange(60)
    # Ids are known from the whole record on: observe them all first, as the step does.
    one._observe(made, one._recorder.crosses_of(made))
    updates = [one._update(made.take(numbers // 20 == part), np.zeros((20, 0), np.uint64), None) for part in range(3)]
    assert report.rows == 60 and report.quality.total("top1") == sum(
        int((update.scores.rank[update.record.targets.slot >= 0] < 1).sum()) for update in updates
    )
    for name, weight in one.model.weights().items():
        np.testing.assert_array_equal(weight, within[0][name], err_msg=name)
    assert (one.tables["category"].digest(), one.counters.trained) == within[1:]


def test_auto_takes_compiled_loops_for_the_default_ranker_on_a_cpu_alone() -> None:
    ranker = DefaultRanker(SMALL, SPEC)

    def name(wanted: str, ranker: Ranker, device: str) -> str:
        return engine_name(Settings(trainer=TrainerSettings(engine=wanted)), ranker, device)

    class Own(DefaultRanker):
        """Somebody's own."""

    assert name("auto", ranker, "/CPU:0") == "compiled"
    assert name("auto", ranker, "/GPU:0") == "tensorflow"
    assert name("auto", Own(SMALL, SPEC), "/CPU:0") == "tensorflow"
    assert name("tensorflow", ranker, "/CPU:0") == "tensorflow"
    with pytest.raises(SettingsError, match=r"trainer\.engine is compiled.*set trainer\.engine to auto"):
        name("compiled", ranker, "/GPU:0")


EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
CONFIGURED = {path.parent.name: path for path in EXAMPLES.glob("*/springtide.toml")}


def settings_of(name: str) -> Settings:
    """The example's model, trained in small tables; without the preprocessing that only a bootstrap can analyse."""
    own = load(["--config", str(CONFIGURED[name])] if name in CONFIGURED else [], env={})
    trainer = dataclasses.replace(own.trainer, admit_after=1, device="cpu")
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
        latest: dict[str, Any] = {name: column.copy() for name, column in empty.items()}
        latest["sequence_categories"][:, :known] = batch.recent_categories[:, :known]
        latest["sequence_items"][:, :known] = batch.recent_categories[:, :known]
        latest["sequence_actions"] = (latest["sequence_items"] != 0).astype(np.uint16) * (1 + batch.action[:, None])
        made.append(dataclasses.replace(batch, **latest))
    return made


# Tracing and lowering a ranker takes seconds: one that is nearly the default, and one with sequences and a table of its own.
QUICK = ("default", "plain_network", "din")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] * (name not in QUICK))
        for name in ("default", *sorted(CONFIGURED))
    ],
)
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
    losses = [trainer.step(log[0]).interest_log_loss for _ in range(30)]
    assert losses[-1] < losses[0], "what is seen again and again is learned"
