"""The trainer learns from attributes; the interest head never sees those of this event's item."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from state.attributes.values import AttributeTable
from state.config.sections import Attributes
from state.config.sources import fields_of
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from tests.trainer.batches import micro_batch, rows_of, with_tables
from tests.trainer.engine.test_step import digests, learned, settings
from trainer.engine.step import Trainer
from trainer.measures.slices import FIRST, SliceMeasures, Slices
from trainer.model.attributes import Columns, combine

WANTED = Attributes("crm", "goods", ("age", "city"), ("brand", "price:10|50"), slices=("age", "brand"), slice_values=4)
USERS, ITEMS = (
    AttributeTable("user", fields_of(WANTED.user_fields)),
    AttributeTable("item", fields_of(WANTED.item_fields)),
)
AGES, BRANDS = ("18-24", "25-34", "65+"), ("acme", "apex", "zeta", "omni", "nova")


def fresh(capacity: int = 4096, wanted: Attributes = WANTED) -> Trainer:
    return with_tables(dataclasses.replace(settings(), attributes=wanted), capacity)


def with_attributes(batch: MicroBatch, seed: int = 0) -> MicroBatch:
    """The batch with users and items of whom something is known; some are unknown, some have no value."""
    rng = np.random.default_rng([seed, int(batch.offset[0])])
    people = [USERS.ids([text, "city"]) for text in AGES] + [USERS.ids([None, None]), USERS.unknown.tolist()]
    goods = [ITEMS.ids([text, "10-50"]) for text in BRANDS] + [ITEMS.ids([None, "<10"]), ITEMS.unknown.tolist()]
    texts = {USERS.ids([text, None])[0]: text for text in AGES} | {ITEMS.ids([text, None])[0]: text for text in BRANDS}
    return dataclasses.replace(
        batch,
        header=dataclasses.replace(batch.header, names=texts, attributes=(USERS.names, ITEMS.names)),
        user_attributes=np.array(people, np.uint64)[rng.integers(0, len(people), len(batch))],
        item_attributes=np.array(goods, np.uint64)[rng.integers(0, len(goods), len(batch))],
    )


def log(count: int = 4, rows: int = 64) -> list[MicroBatch]:
    return [with_attributes(micro_batch(rows, first=number * rows)) for number in range(count)]


def row(trainer: Trainer, one: int) -> np.ndarray:
    table = trainer.tables["context"]
    (at,) = table.find(np.array([one], np.uint64)).tolist()
    assert at, "the id has no row"
    found: np.ndarray = rows_of(table, np.array([at], np.int32))[0]
    return found


def test_the_interest_head_never_sees_this_events_item_attributes() -> None:
    trainer = learned(log(), fresh())
    batch = with_attributes(micro_batch(64, first=900))
    order = np.random.default_rng(3).permutation(64)
    permuted = dataclasses.replace(batch, item_attributes=batch.item_attributes[order])
    before, after = trainer.score(batch), trainer.score(permuted)
    assert (permuted.item_attributes != batch.item_attributes).any()
    assert {name: value.tobytes() for name, value in before.items()} == {
        name: value.tobytes() for name, value in after.items()
    }


def test_the_interest_head_sees_the_users_attributes() -> None:
    trainer = learned(log(), fresh())
    batch = with_attributes(micro_batch(64, first=900))
    rolled = dataclasses.replace(batch, user_attributes=np.roll(batch.user_attributes, 1, 0))
    before, after = trainer.score(batch), trainer.score(rolled)
    assert (before["recent_logits"] != after["recent_logits"]).any()


def test_each_attribute_none_and_unknown_have_rows_that_learn() -> None:
    trainer = learned(log(1), fresh())
    ids = [USERS.ids(["25-34", None])[0], USERS.none_id("age"), USERS.unknown_id("age"), ITEMS.ids(["acme", None])[0]]
    ids += [ITEMS.none_id("brand"), ITEMS.unknown_id("brand"), ITEMS.ids([None, "10-50"])[1]]
    first = [row(trainer, one).copy() for one in ids]
    assert len({one.tobytes() for one in first}) == len(ids)
    learned(log()[1:], trainer)
    for one, before in zip(ids, first, strict=True):
        assert (row(trainer, one) != before).any()


def test_items_that_differ_only_in_an_attribute_come_to_differ_in_engagement() -> None:
    """Items of one brand are clicked, those of the other are shown and not: new items of each follow their brand."""
    trainer, rng = fresh(), np.random.default_rng(1)
    brands = np.array([ITEMS.ids([text, "10-50"]) for text in ("acme", "apex")], np.uint64)

    def impressions(first: int, rows: int = 256) -> tuple[MicroBatch, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        liked = rng.random(rows) < 0.5
        batch = with_attributes(micro_batch(rows, first=first, items=10_000_000))
        label = liked.astype(np.float32)
        return dataclasses.replace(batch, label=label, item_attributes=brands[np.where(liked, 0, 1)]), liked

    for number in range(30):
        trainer.step(impressions(number * 256)[0])
    last, liked = impressions(30 * 256)
    report = trainer.step(last)
    logits = report.judged[0].pairs.logits
    assert logits[liked].mean() > logits[~liked].mean() + 1.0


def test_the_order_of_columns_in_the_log_does_not_matter() -> None:
    batches = log(3)
    turned = [
        dataclasses.replace(
            batch,
            header=dataclasses.replace(batch.header, attributes=(USERS.names[::-1], ITEMS.names[::-1])),
            user_attributes=batch.user_attributes[:, ::-1].copy(),
            item_attributes=batch.item_attributes[:, ::-1].copy(),
        )
        for batch in batches
    ]
    turned = [decode(encode(batch.header, batch.columns)) for batch in turned]
    assert digests(learned(turned, fresh())) == digests(learned(batches, fresh()))


def test_a_log_from_before_there_were_attributes_is_one_of_unknown_ones() -> None:
    trainer = learned([micro_batch(64)], fresh())
    assert row(trainer, USERS.unknown_id("age")).any()
    assert {one.value for one in slices_of(trainer, "age", "brand")} == {"(unknown)"}


def test_without_attributes_a_step_has_the_bits_it_had_before() -> None:
    none = Attributes()
    plain = [micro_batch(64, first=number * 64) for number in range(3)]
    assert digests(learned(log(3), fresh(wanted=none))) == digests(learned(plain, fresh(wanted=none)))
    assert fresh(wanted=none).measures.slices.state() == {}


def test_an_item_with_two_values_in_one_batch_has_both() -> None:
    items, values = np.array([5, 5, 9, 5], np.uint64), np.array([[1, 2], [2, 1], [1, 2], [1, 2]], np.uint64)
    found = combine(items, values)
    assert len(found.item) == 3
    assert (found.item[found.at] == items).all()
    assert (found.attributes[found.at] == values).all()


# Slices


def slices_of(trainer: Trainer, *attributes: str) -> list[SliceMeasures]:
    return [one for one in trainer.measures.of_slices() if one.dimension in attributes]


def test_slices_add_up_to_the_whole() -> None:
    trainer = fresh()
    reports = [trainer.step(batch) for batch in log(3)]
    whole = trainer.measures.progressive.values()
    for attribute in ("age", "brand"):
        mine = [one.figures for one in slices_of(trainer, attribute)]
        assert sum(one["total.rows"] for one in mine) == sum(report.rows for report in reports)
        weighted = sum(one["log_loss"] * one["rows"] for one in mine) / sum(one["rows"] for one in mine)
        assert weighted == pytest.approx(whole["log_loss"], rel=1e-5)


def test_values_beyond_the_setting_share_a_place_and_names_are_those_announced() -> None:
    trainer = fresh()
    learned(log(6), trainer)
    shown = [one.value for one in slices_of(trainer, "brand")]
    assert len(shown) == FIRST + WANTED.slice_values
    assert set(shown) - {"(unknown)", "(none)", "(other)"} < set(BRANDS)
    assert "25-34" in [one.value for one in slices_of(trainer, "age")]


def test_measures_of_other_attributes_are_not_taken_over() -> None:
    measured = learned(log(2), fresh()).measures.slices
    other = Slices(dataclasses.replace(WANTED, slices=("city",)), Columns(WANTED))
    fresh_sums = other.state()["sums"]
    other.load(measured.state())
    assert (other.state()["sums"] == fresh_sums).all()
    same = Slices(WANTED, Columns(WANTED))
    same.load(measured.state())
    assert all((same.state()[name] == value).all() for name, value in measured.state().items())
