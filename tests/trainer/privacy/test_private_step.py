"""A private step: bits are a function of key and log, no unit moves more than the bound, and a row reads no other one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from state.microbatch.batch import MicroBatch
from state.ranking.crosses import Values
from tests.trainer.batches import rows_of
from tests.trainer.privacy.batches import CONTEXT, labelled, place, shared
from trainer.engine.engine import CROSS
from trainer.engine.private_engine import FROZEN, LISTED, LOSSES, USER, PrivateEngine
from trainer.engine.private_step import ROUNDING, Noise, PrivateTrainer, Units, clipped
from trainer.engine.record import Record
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.ranker import Targets
from trainer.privacy import LearnedCrosses
from trainer.versions import checkpoint

CLIP = 1.0 / HYPERPARAMETERS.loss_scale


@pytest.fixture
def made() -> PrivateTrainer:
    """A trainer that has learned nothing."""
    found = shared(*CONTEXT)
    found.clear()
    return found


def learned(one: PrivateTrainer, first: int, last: int) -> str:
    for number in range(first, last):
        one.step(labelled(number), place=place(number))
    return checkpoint.digest(one)


def engine_of(one: PrivateTrainer) -> PrivateEngine:
    assert isinstance(one.engine, PrivateEngine)
    return one.engine


def records_of(one: PrivateTrainer, *batches: MicroBatch) -> list[Record]:
    """The records of batches, of all of whose ids the trainer has rows."""
    for batch in (*batches, *batches):
        one._observe(batch, one._recorder.crosses_of(batch))
    return [one._record(batch, one._recorder.crosses_of(batch), (0, 0)) for batch in batches]


def told(one: PrivateTrainer, record: Record) -> np.ndarray:
    """The sum of the gradients of a record by all that an update tells, without noise."""
    measured = one.engine.measure(record, move=False)
    silent = engine_of(one).noised(measured, record, lambda name, count: np.zeros(count), 0.0).found
    rows = dict(zip(engine_of(one)._embeddings, silent.sparse, strict=True))[LISTED].numpy()
    # In the order of the popular categories: which rows come first depends on the others.
    places = one.tables[LISTED].find(record.ids["popular"])
    found = [measured.rows[LISTED].tolist().index(place) for place in places.tolist()]
    parts = [part.numpy().reshape(-1) for part in silent.dense]
    crosses, derivatives = engine_of(one).crosses.derivatives(record, measured.scores.engagement[: len(record)])
    by_cross = np.zeros(one.tables[CROSS].capacity)
    by_cross[measured.rows[CROSS][crosses]] = derivatives
    return np.concatenate([*parts, rows[found].reshape(-1), by_cross]).astype(np.float64)


def only(record: Record, rows: np.ndarray, factors: np.ndarray) -> Record:
    """The record in which no other rows have a loss, and these a scaled one."""
    kept = np.where(rows, factors, 0.0).astype(np.float32)
    names = ("weight", "label_weight", "negative_weight")
    scaled = {name: getattr(record.targets, name) * kept for name in names}
    return dataclasses.replace(record, targets=record.targets._replace(**scaled))


def only_loss(record: Record, loss: str) -> Targets:
    others = [factor for name, factors in LOSSES.items() if name != loss for factor in factors]
    return record.targets._replace(**{name: np.zeros_like(getattr(record.targets, name)) for name in others})


def test_the_same_key_and_log_make_the_same_digests_and_another_key_others(made: PrivateTrainer) -> None:
    first = learned(made, 0, 3)
    made.clear()
    assert learned(made, 0, 3) == first
    ours = made.private._noise
    made.private._noise = Noise(b"another key of the noise")
    made.clear()
    assert learned(made, 0, 3) != first
    made.private._noise = ours
    made.clear()
    # The same rows under another condition get other noise.
    learned(made, 0, 3)
    weights = made.model.weights()
    made.clear()
    for number in range(3):
        made.step(labelled(number), place=dataclasses.replace(place(number), epoch=2))
    assert any((value != weights[name]).any() for name, value in made.model.weights().items())


def test_a_trainer_restored_in_between_has_the_same_bits(made: PrivateTrainer) -> None:
    learned(made, 0, 2)
    kept = {name: np.array(value) for name, value in made.state().items()}
    assert kept["privacy.used"].sum() > 0
    whole = {name: table.state() for name, table in made.tables.items()}
    weights, slots = made.model.weights(), made.optimizer.slots()
    straight = learned(made, 2, 4)
    made.clear()
    for name, table in made.tables.items():
        table.load(whole[name])
    made.model.set_weights(weights)
    made.optimizer.set_slots(slots)
    made.load(kept)
    assert learned(made, 2, 4) == straight


@pytest.mark.parametrize("by_user", [True, False])
def test_no_unit_changes_a_release_by_more_than_the_bound(made: PrivateTrainer, by_user: bool) -> None:
    learned(made, 0, 2)
    drawn = np.random.default_rng(3)
    # Weights far from where they began, and rows with the largest features there are.
    made.model.set_weights(
        {
            name: one * 3 + drawn.normal(0, 0.3, one.shape).astype(np.float32)
            for name, one in made.model.weights().items()
        }
    )
    batch = labelled(5, 40)
    large = np.where(np.arange(40)[:, None] % 3 == 0, np.uint16(65_535), batch.features)
    batch = dataclasses.replace(
        batch, features=large, weight=np.where(np.arange(40) % 5 == 0, 1e4, 1.0).astype(np.float32),
        user=batch.user[np.arange(40) // 4],
    )  # fmt: skip
    (record,) = records_of(made, batch)
    lengths = engine_of(made).lengths(record, tuple(LOSSES))
    for loss, bounds in zip(LOSSES, lengths.T, strict=True):
        one = dataclasses.replace(record, targets=only_loss(record, loss))
        exact = np.array(
            [np.linalg.norm(told(made, only(one, np.arange(40) == row, np.ones(40)))) for row in range(40)]
        )
        assert (exact <= bounds * 1.0001 + 1e-12).all(), "an upper bound"
        some = exact > 1e-4 * exact.max()
        assert some.any() and (bounds[some] <= 3.0 * exact[some]).all(), "and no idle one"
    of = np.unique(batch.user, return_inverse=True)[1] if by_user else np.arange(40)
    within = made.private.within(engine_of(made), record, Units(of, np.ones(40, np.bool_)))
    longest = [np.linalg.norm(told(made, only(within, of == unit, np.ones(40)))) for unit in range(of.max() + 1)]
    assert max(longest) <= CLIP
    assert max(longest) > 0.3 * CLIP, "some are clipped"


def test_rows_of_a_unit_are_clipped_together_and_excluded_rows_change_nothing() -> None:
    units = Units(np.array([0, 0, 1, 2, 3]), np.array([True, True, True, False, True]))
    factors = clipped(np.array([5e8, 5e8, 0.1, 7.0, np.inf], np.float32), units, 2.0)
    assert factors[0] * 5e8 + factors[1] * 5e8 <= 2.0 and factors[0] * 1e9 > 2.0 * (1 - 3 * ROUNDING)
    assert factors[2:].tolist() == [1.0, 0.0, 0.0]


def test_what_a_row_tells_is_a_function_of_the_row_alone(made: PrivateTrainer) -> None:
    learned(made, 0, 2)
    batch = labelled(7, 48)
    first = np.arange(48) < 24
    # The same rows beside others: other partners, categories, items and labels.
    beside = dataclasses.replace(
        batch,
        category=np.where(first, batch.category, batch.category[::-1]),
        item=np.where(first, batch.item, batch.item[::-1]),
        user=np.where(first, batch.user, batch.user[::-1]),
        features=np.where(first[:, None], batch.features, np.uint16(9)),
        label=np.where(first, batch.label, np.float32(1.0)),
    )
    found = [told(made, only(one, first, np.ones(48))) for one in records_of(made, batch, beside)]
    assert np.abs(found[0] - found[1]).max() <= 1e-6 * np.abs(found[0]).max()


def test_a_users_own_crosses_are_learned_row_after_row_and_read_no_row_of_others(made: PrivateTrainer) -> None:
    learned(made, 0, 2)
    batch, first = labelled(7, 48), np.arange(48) < 24
    batch = dataclasses.replace(batch, user=np.where(first, np.uint64(1), np.uint64(2)))
    otherwise = dataclasses.replace(batch, label=np.where(first, 1 - batch.label, batch.label).astype(np.float32))
    one, other = (engine_of(made).crosses.measure(record)[1].logits for record in records_of(made, batch, otherwise))
    assert (one[first] != other[first]).any() and one[~first].any()
    assert (one[~first] == other[~first]).all()


def test_the_noise_has_its_deviation_on_everything_shared(made: PrivateTrainer) -> None:
    learned(made, 0, 2)
    (record,) = records_of(made, labelled(8))
    update = made.private.begin(labelled(8).user, "a record", 0)
    record = only(record, np.zeros(len(record), bool), np.zeros(len(record)))
    plain = made.engine.measure(record, move=False)
    deviation = made.private.noise * CLIP
    noised = engine_of(made).noised(plain, record, made.private._normal(update), deviation)
    found = noised.found
    tables = dict(zip(engine_of(made)._embeddings, found.sparse, strict=True))
    popular = (record.ids["popular"] != 0).sum()
    moved = tables[LISTED].numpy()[np.abs(tables[LISTED].numpy()).sum(1) > 0]
    assert len(moved) == popular > 0
    assert all(not tables[name].numpy().any() for name in ("item", "context", "user"))
    before = rows_of(made.tables[CROSS], plain.rows[CROSS])
    assert noised.crossed is not None
    assert np.count_nonzero(noised.crossed.rows[:, 0] != before[:, 0]) == np.unique(record.ids["cross"]).size - 1 > 0
    dense = dict(zip(made.model.weights(), found.dense, strict=True))
    frozen = [dense.pop(name).numpy() for name in list(dense) if name.startswith(FROZEN)]
    assert frozen and not any(one.any() for one in frozen), "the tower stays as it began"
    values = np.concatenate([part.numpy().reshape(-1) for part in dense.values()] + [moved.reshape(-1)]) / deviation
    assert (values != 0).all() and abs(values.std() - 1.0) < 5 / np.sqrt(2 * values.size)


@pytest.mark.parametrize("by_user", [True, False])
def test_a_users_own_row_is_learned_only_where_all_rows_of_the_user_are_one_unit(
    made: PrivateTrainer, by_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that a single row teaches tells of it in each later row of the user, which the account of a row does not count.
    monkeypatch.setattr(made.private, "_by_user", by_user)
    learned(made, 0, 2)
    before = made.tables[USER].state()
    learned(made, 2, 4)
    after = made.tables[USER].state()
    assert (before.rows != after.rows[np.isin(after.ids, before.ids)]).any() == by_user


def test_nothing_is_learned_of_transitions_nor_of_crosses_of_items_and_counts_have_noise(
    made: PrivateTrainer,
) -> None:
    learned(made, 0, 3)
    assert len(made.transitions) == 0 == made.transitions.pending
    none = np.zeros((96, 0), np.uint64)
    batches = [labelled(number) for number in range(3)]
    values = (Values(one.user, one.item, one.category, one.context, none, none, one.features, none) for one in batches)
    ids, crosses = np.concatenate([made.crosses.ids(one) for one in values]), made.tables[CROSS].state()
    columns = LearnedCrosses.of(made.crosses.kinds, "user")
    assert all(np.isin(ids[:, each], crosses.ids).any() for each in columns)
    assert not np.isin(np.delete(ids, columns.both, 1), crosses.ids).any()
    assert not crosses.rows[np.isin(crosses.ids, made.crosses.shares)].any(), "shares stay as they began"
    counts = made.popular.state()["counts"]
    assert len(counts) > 4 and (counts % 65_536 != 0).all()


def test_a_user_takes_part_in_a_limited_number_of_updates(made: PrivateTrainer) -> None:
    one_user = dataclasses.replace(labelled(0), user=np.full(96, 77, np.uint64))
    for number in range(made.private.updates):
        made.step(one_user, place=place(number))
        assert made.private.allowance.left_out == 0
    update = made.private.begin(one_user.user, "a record", 0)
    assert not update.units.learned.any() and made.private.allowance.left_out == 96
    factors = clipped(np.ones(96, np.float32), update.units, CLIP)
    assert not factors.any()


def test_a_record_without_a_place_is_refused(made: PrivateTrainer) -> None:
    with pytest.raises(ValueError, match="a place in the log"):
        made.step(labelled(0))
    with pytest.raises(ValueError, match="trainer_of"):
        made.engine.measure(records_of(made, labelled(0))[0])
