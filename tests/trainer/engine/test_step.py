"""The step: the same bits from the same log, whatever the layout; the guard keeps poison out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state.config.settings import Settings
from state.errors import SettingsError, TrainingHeld
from state.microbatch.batch import MicroBatch
from tests.trainer.batches import SPEC, micro_batch, spread, with_tables
from trainer import device as devices
from trainer.engine.guard import Verdict
from trainer.engine.record import _targets
from trainer.engine.step import Trainer
from trainer.model.candidates import candidates, partners
from trainer.publications import ProbedRanker

ROOT = Path(__file__).resolve().parents[3]


def settings(admit_after: int = 1, **trainer: Any) -> Settings:
    base = Settings()
    return dataclasses.replace(
        base,
        trainer=dataclasses.replace(base.trainer, device="cpu", admit_after=admit_after, **trainer),
    )


def fresh(capacity: int = 4096, admit_after: int = 1, context: tuple[str, ...] = (), **trainer: Any) -> Trainer:
    """A trainer in its first state."""
    base = settings(admit_after, **trainer)
    return with_tables(dataclasses.replace(base, events=dataclasses.replace(base.events, context=context)), capacity)


def digests(trainer: Trainer) -> dict[str, str]:
    """A digest of every part of a trainer."""
    found = {f"table.{name}": table.digest() for name, table in trainer.tables.items()}
    arrays = trainer.model.weights() | {f"slot.{name}": value for name, value in trainer.optimizer.slots().items()}
    arrays |= trainer.state()
    return found | {
        name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for name, value in arrays.items()
    }


def learned(batches: list[MicroBatch], trainer: Trainer) -> Trainer:
    for batch in batches:
        trainer.step(batch)
    return trainer


def log(count: int = 6, rows: int = 64) -> list[MicroBatch]:
    return [micro_batch(rows, first=number * rows) for number in range(count)]


def restored(source: Trainer, target: Trainer) -> Trainer:
    """What a version does: state out of one trainer, into another."""
    target.clear()
    for name, table in target.tables.items():
        table.load(source.tables[name].state())
    target.model.set_weights(source.model.weights())
    target.optimizer.set_slots(source.optimizer.slots())
    target.load(source.state())
    return target


if __name__ == "__main__":
    print(hashlib.sha256(repr(sorted(digests(learned(log(), Trainer(settings(), SPEC))).items())).encode()).hexdigest())


@pytest.mark.parametrize("threads", (2, 3))
def test_any_number_of_threads_makes_the_same_bits(threads: int) -> None:
    batches = [micro_batch(1100, first=1100 * number, context=2) for number in range(3)]
    # A third of the rows have labels, from which crosses learn.
    labels = np.resize(np.array([0.0, np.nan, 1.0, np.nan, np.nan, np.nan], np.float32), 1100)
    batches = [dataclasses.replace(batch, label=labels) for batch in batches]

    def found(threads: int) -> tuple[dict[str, str], dict[str, bytes]]:
        trainer = learned(batches, fresh(context=("country", "device"), threads=threads))
        measures = trainer.measures.progressive.state() | trainer.measures.breakdown.state()
        return digests(trainer), {name: value.tobytes() for name, value in measures.items()}

    assert found(threads) == found(1)


@pytest.mark.parametrize("kernels", ["found", pytest.param("compiled", marks=pytest.mark.nightly)])
def test_fresh_process_makes_the_same_bits_whether_it_compiles_or_finds_kernels(tmp_path: Path, kernels: str) -> None:
    here = hashlib.sha256(repr(sorted(digests(learned(log(), fresh())).items())).encode()).hexdigest()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    if kernels == "compiled":
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    line = [sys.executable, __file__]
    there = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert there.stdout.split()[-1] == here


def test_interest_never_sees_what_was_clicked() -> None:
    trainer = learned(log(), fresh())
    batch = micro_batch(64, first=9000)
    order = np.random.default_rng(0).permutation(64)
    shuffled = dataclasses.replace(
        batch,
        item=batch.item[order],
        category=batch.category[order],
        action=batch.action[order],
        weight=batch.weight[order],
    )
    before, after = trainer.score(batch), trainer.score(shuffled)
    for name, value in before.items():
        assert (value == after[name]).all()


def test_loss_falls_and_top1_rises() -> None:
    trainer = fresh()
    rows = micro_batch(512)
    # A rule to learn: the second label wins.
    chosen = np.where(rows.recent_categories[:, 1] != 0, rows.recent_categories[:, 1], rows.category)
    batch = dataclasses.replace(rows, category=chosen)
    first = trainer.step(batch)
    for _ in range(40):
        last = trainer.step(batch)
    assert last.interest_log_loss < 0.7 * first.interest_log_loss
    assert last.quality.total("top1") > first.quality.total("top1") + 100
    assert last.quality.engagement_log_loss < first.quality.engagement_log_loss


def test_skipped_step_changes_no_weight_and_keeps_its_sightings() -> None:
    trainer = learned(log(22, rows=16), fresh())
    trainer.guard = dataclasses.replace(trainer.guard, norm=1e-9)
    before = digests(trainer)
    known = len(trainer.tables["user"])
    batch = dataclasses.replace(micro_batch(16, first=5000), user=spread(np.arange(10_000, 10_016)))
    report = trainer.step(batch)
    after = digests(trainer)
    assert report.verdict is Verdict.SKIP
    assert trainer.counters.skipped == 16
    assert len(trainer.tables["user"]) == known + 16
    same = [name for name in before if not name.startswith(("table.", "counters.", "guard.", "evaluation."))]
    assert {name: before[name] for name in same} == {name: after[name] for name in same}


@pytest.mark.parametrize("weight", [1.0, np.inf, np.nan])
def test_measures_count_the_rows_of_skipped_steps(weight: float) -> None:
    trainer = learned(log(22, rows=16), fresh())
    before = trainer.measures.progressive.values()
    assert before["total.skipped"] == before["skipped"] == 0
    trainer.guard = dataclasses.replace(trainer.guard, norm=1e-9)
    batch = micro_batch(16, first=5000)
    # What no model could have known: it costs more than the rows before.
    batch = dataclasses.replace(batch, category=spread(np.arange(1, 17) + 7000), weight=np.full(16, weight, np.float32))
    report = trainer.step(batch)
    assert report.verdict is Verdict.SKIP
    after, rows = trainer.measures.progressive.values(), trainer.measures.evaluation.values()
    assert rows["total.rows"] == 22 * 16 + 16
    assert after["total.skipped"] == pytest.approx(16 / (23 * 16))
    assert after["total.log_loss"] > before["total.log_loss"]
    assert all(np.isfinite(value) for value in (*after.values(), *rows.values()))


def test_a_model_with_logits_that_are_not_finite_names_no_candidate() -> None:
    trainer = learned(log(2), fresh())
    weights = trainer.model.weights()
    trainer.model.set_weights({name: np.full_like(weight, np.nan) for name, weight in weights.items()})
    report = trainer.step(micro_batch(64, first=5000))
    assert report.verdict is Verdict.SKIP
    measured = trainer.measures.progressive.values() | trainer.measures.evaluation.values()
    assert all(np.isfinite(value) for value in measured.values())
    assert measured["total.rows"] == 192
    assert measured["total.skipped"] == pytest.approx(1 / 3)
    assert report.quality.total("top1") == report.quality.total("top5") == 0


def test_held_trainer_refuses_until_its_state_is_replaced() -> None:
    trainer = learned(log(1), fresh())
    state = trainer.state()
    trainer.guard = dataclasses.replace(trainer.guard, held=True, skipped=20)
    with pytest.raises(TrainingHeld, match="rollback"):
        trainer.step(micro_batch(4))
    trainer.load(state)
    assert trainer.step(micro_batch(4, first=64)).verdict is Verdict.ACCEPT


def test_no_row_is_no_step() -> None:
    with pytest.raises(ValueError, match="no step"):
        fresh().step(micro_batch(4).take(np.zeros(4, bool)))


def test_ids_expire_by_log_time() -> None:
    trainer = fresh(expire_s=3600.0)
    trainer.step(micro_batch(16))
    trainer.step(micro_batch(1, first=16, at_ms=1_700_000_000_000 + 10 * 3_600_000))
    assert len(trainer.tables["user"]) <= 2


@pytest.mark.parametrize("rows_per_update", [0, 3])
def test_a_user_whose_windows_are_empty_again_is_known_and_one_never_seen_is_new(rows_per_update: int) -> None:
    trainer = fresh(rows_per_update=rows_per_update)
    first = micro_batch(8)
    silent = dataclasses.replace(first, recent_categories=np.zeros_like(first.recent_categories))
    trainer.step(silent)
    measured = trainer.measures.evaluation.values()
    assert (measured["total.known.rows"], measured["total.new.rows"]) == (0, 8)
    # Eight days later, of nobody a category is left in the windows.
    later = micro_batch(8, first=8, at_ms=1_700_000_000_000 + 8 * 86_400_000)
    user = np.where(np.arange(8) < 6, silent.user, spread(np.arange(10_000, 10_008)))
    trainer.step(dataclasses.replace(later, user=user, recent_categories=silent.recent_categories))
    measured = trainer.measures.evaluation.values()
    assert (measured["total.known.rows"], measured["total.new.rows"]) == (6, 10)


def test_known_labels_are_learned_instead_of_drawn_negatives() -> None:
    batch = dataclasses.replace(micro_batch(8), label=np.array([0, 1] * 4, np.float32))
    report = fresh().step(batch)
    assert report.judged[0].pairs.positive.tolist() == [False, True] * 4


def test_candidates_agree_with_a_plain_definition() -> None:
    batch = micro_batch(200, categories=30)
    popular = np.append(spread(np.arange(1, 7)), np.zeros(2, np.uint64))
    partner = partners(np.zeros(200, np.uint64), np.zeros(200, np.uint64), batch.offset)
    # Three of the ids that are neither a label of the row nor popular, and a gap.
    rare = [
        [one for one in spread(np.arange(7, 31)).tolist() if one not in labels]
        for labels in batch.recent_categories.tolist()
    ]
    successors = np.array([[*found[:3], 0] for found in rare], np.uint64)
    found = candidates(batch.category, batch.recent_categories, popular, successors, partner)
    slots = SPEC.recent_categories
    kinds = set()
    for row in range(200):
        labels, own, last = batch.recent_categories[row].tolist(), int(batch.category[row]), successors[row].tolist()
        foreign = int(batch.category[partner[row]])
        offered = [p for p in popular.tolist() if p]
        mask = [float(p != 0 and p not in labels) for p in popular.tolist()]
        assert found.popular_mask[row].tolist() == mask
        if own in labels:
            kinds.add("label")
            assert labels[found.target[row]] == own
        elif own in offered:
            kinds.add("popular")
            assert popular[found.target[row] - slots] == own
        elif own in last:
            kinds.add("successor")
            assert last[found.target[row] - slots - popular.size] == own
        else:
            kinds.add("other")
            assert found.target[row] == slots + popular.size + len(last) and found.other[row] == own
            continue
        assert found.other[row] == (0 if foreign in labels or foreign in offered or foreign in last else foreign)
    assert kinds == {"label", "popular", "successor", "other"}


def test_missing_gpu_is_named() -> None:
    with pytest.raises(SettingsError, match=r"trainer\.device is gpu"):
        devices.pick("gpu", [])


def test_the_gpus_are_those_that_tensorflow_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not at the top: the fresh process below has no need of it.
    import tensorflow as tf

    assert devices.gpus() == [gpu.name for gpu in tf.config.list_physical_devices("GPU")]
    # Where a driver may be, TensorFlow is asked.
    monkeypatch.setattr(devices, "CUDA", None)
    assert devices.may_have_gpu()


def nameless(batch: MicroBatch, rows: slice = slice(None)) -> MicroBatch:
    """The batch with clicks of probe users in some rows."""
    item, category, label = batch.item.copy(), batch.category.copy(), batch.label.copy()
    item[rows], category[rows], label[rows] = 0, 0, np.nan
    return dataclasses.replace(batch, item=item, category=category, label=label)


def test_clicks_of_probe_users_alone_change_no_weight_and_not_what_the_guard_expects() -> None:
    batches, probes = log(), [nameless(micro_batch(1, first=9_000 + number)) for number in range(3)]
    plain = fresh()
    expected = {**digests(learned(batches, plain)), "guard": str(plain.guard)}
    trainer = fresh()
    for number, batch in enumerate(batches):
        trainer.step(batch)
        if number % 2:
            trainer.step(probes[number // 2])
    found = {**digests(trainer), "guard": str(trainer.guard)}
    changed = {name for name in expected if expected[name] != found[name]}
    counted = {f"counters.{name}" for name in ("trained", "steps", "log_ms", "event_time_ms")}
    assert changed == {"table.user", *counted}


def test_a_click_of_a_probe_user_is_measured_by_nobody_and_no_half_of_a_pair() -> None:
    batch = nameless(micro_batch(64), slice(5, 6))
    trainer = fresh()
    trainer.step(batch)
    assert trainer.measures.evaluation.values()["rows"] == 63
    source = np.zeros(64, np.uint64)
    partner = partners(source, source, batch.opened)
    targets = _targets(batch, np.zeros(64, np.int32), partner)
    alone = (np.arange(64) == 5) | (partner == 5)
    assert not targets.negative_weight[alone].any()
    assert not targets.label_weight[5]
    same = batch.item == batch.item[partner]
    assert (targets.negative_weight[~alone & ~same] > 0).all()


def test_a_probe_is_answered_with_the_weights_that_steps_learned() -> None:
    trainer, other = fresh(), Trainer(settings(), SPEC)
    probed = ProbedRanker(trainer.model, trainer.engine.predict)
    before = probed.answers()
    learned(log(), trainer)
    after = probed.answers()
    other.model.set_weights(trainer.model.weights())
    expected = ProbedRanker(other.model, other.engine.predict).answers()
    assert {name for name, value in after.items() if (value != expected[name]).any()} == set()
    assert any((value != before[name]).any() for name, value in after.items())
