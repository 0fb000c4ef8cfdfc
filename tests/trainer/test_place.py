"""The trainer's place: what a record adds to it, whatever came before, and what a version keeps of it."""

from __future__ import annotations

from dataclasses import replace

from state.features.mask import Mask, always
from state.positions import Source
from state.registry.manifest import TOLD_MS, Draft, LogRange, complete
from tests.trainer.clicks import SALT, SPEC, TOPIC, microbatch
from trainer.intake import take_in
from trainer.place import TrainingPlace

RECORDS = [microbatch(number) for number in range(3, 7)]
EVERYBODY = Mask(times=((0, 1 << 60),))


def taken(place: TrainingPlace, record: bytes, offset: int, mask: Mask = Mask.NONE) -> TrainingPlace:
    return place.taken(take_in(record, place.marks, always(mask), SPEC.digest, SALT, "here"), offset, gap=0)


def test_each_row_of_a_record_is_counted_once_as_what_became_of_it() -> None:
    place = TrainingPlace(epoch=1, parent=0, first=0, next=0)
    place = taken(place, RECORDS[0], 0)
    assert (place.next, place.rows, place.before) == (1, 40, 2 * 60), "the line begins at offset 60 of both partitions"
    place = taken(taken(place, RECORDS[0], 2), RECORDS[1], 4, EVERYBODY)
    assert place.counts() == {"rows": 120, "duplicate": 40, "masked": 40, "gap": 0, "before": 120}
    assert place.marks == {Source(TOPIC, 0): 100, Source(TOPIC, 1): 100}
    assert place.next == 5


def test_what_is_handed_over_begins_the_next_version() -> None:
    place = replace(taken(TrainingPlace(epoch=1, parent=7, first=0, next=0), RECORDS[0], 8), changed=True)
    after = place.handed_over(durable=False)
    assert (after.first, after.next, after.changed, after.durable_first) == (9, 9, False, 0)
    assert replace(after, first=place.first, changed=True) == place
    saved = replace(place, unsaved=True).handed_over(durable=True)
    assert (saved.first, saved.durable_first, saved.changed, saved.unsaved) == (9, 9, False, False)


def test_a_version_restores_the_place_that_it_was_made_at() -> None:
    place = taken(TrainingPlace(epoch=2, parent=5, first=0, next=0), RECORDS[0], 8)
    metrics = {f"account.{name}": float(count) for name, count in place.counts().items()}
    metrics[TOLD_MS] = float(place.told_ms)
    log, sources = LogRange("log", "cd" * 16, 0, place.first, place.next), tuple(place.marks.items())
    draft = Draft("delta", 2, 5, log, sources, 1, 1, 5, 4, SPEC.digest, "program", SALT, metrics=metrics)
    restored = TrainingPlace.restored(complete(draft, 6, ((1, 5),), {}), epoch=2, next=place.next)
    assert restored == replace(place, parent=6, first=place.next, durable=6, durable_first=place.next)
