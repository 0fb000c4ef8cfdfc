"""The trainer's dedup: however often the stream dies and writes again, and the trainer dies and reads again, each row counts once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.features.erased import MaskedUsers
from state.features.mask import Mask, always
from state.microbatch.batch import Header, Kind
from state.microbatch.codec import encode
from state.positions import Range, Source
from tests.microbatches import columns
from trainer.intake import RecordFilter

SPEC, SALT = "ab" * 32, "cd" * 8
SOURCES = (Source("ab" * 16, 0), Source("ab" * 16, 1))

# What the stream does with a cut: rows of each partition, then whether it dies between the log and the commit.
cuts = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=1, max_size=14)
# What the trainer does after a record: nothing, publish, or die.
fates = st.lists(st.sampled_from(["go on", "publish", "die"]), min_size=1, max_size=14)


def record(parts: list[Range]) -> bytes:
    offsets = np.concatenate([np.arange(part.first, part.next) for part in parts] or [np.zeros(0, np.int64)])
    source = np.repeat(np.arange(len(parts)), [part.rows for part in parts])
    made = columns(len(offsets), offset=offsets, source=source)
    return encode(Header(SPEC, SALT, tuple(parts), created_ms=0), made)


def written(plan: list[tuple[int, int, bool]]) -> tuple[list[bytes], dict[Source, int]]:
    """The log of a stream that dies and cuts differently afterwards, and how far it came in the end."""
    log: list[bytes] = []
    committed = dict.fromkeys(SOURCES, 0)
    reached = dict.fromkeys(SOURCES, 0)
    for first, second, dies in plan:
        parts = []
        for source, rows in zip(SOURCES, (first, second), strict=True):
            at = committed[source]
            # Some cuts name a source without rows, some do not name it at all.
            if rows:
                parts.append(Range(source, at, at + rows, rows=rows))
                reached[source] = max(reached[source], at + rows)
        log.append(record(parts))
        if not dies:
            committed |= {part.source: part.next for part in parts}
    return log, reached


@dataclass
class Trainer:
    """Learns rows, publishes, dies, and goes on from what it published."""

    next: int = 0
    marks: dict[Source, int] = field(default_factory=dict)
    learned: list[tuple[Source, int]] = field(default_factory=list)
    rows: int = 0
    duplicate: int = 0

    def copy(self) -> Trainer:
        return Trainer(self.next, dict(self.marks), list(self.learned), self.rows, self.duplicate)

    def take(self, value: bytes) -> None:
        found = RecordFilter(SPEC, SALT).take_in(value, self.marks, always(Mask.NONE), "here")
        sources = [part.source for part in found.batch.header.ranges]
        kept = zip(found.batch.source.tolist(), found.batch.offset.tolist(), strict=True)
        self.learned += [(sources[source], offset) for source, offset in kept]
        self.marks, self.next = found.marks, self.next + 1
        self.rows += found.rows
        self.duplicate += found.duplicate
        assert found.gaps == []


def learned(log: list[bytes], fates: list[str]) -> Trainer:
    trainer = published = Trainer()
    deaths = 0
    while trainer.next < len(log):
        trainer.take(log[trainer.next])
        fate = fates[(trainer.next + deaths) % len(fates)]
        if fate == "publish":
            published = trainer.copy()
        elif fate == "die" and deaths < 20:
            deaths += 1
            trainer = published.copy()
    return trainer


@given(plan=cuts, fates=fates)
def test_each_row_is_learned_once_in_order_whichever_process_dies(
    plan: list[tuple[int, int, bool]], fates: list[str]
) -> None:
    log, reached = written(plan)
    trainer = learned(log, fates)
    for source in SOURCES:
        assert [offset for one, offset in trainer.learned if one == source] == list(range(reached[source]))
    assert trainer.marks == {source: end for source, end in reached.items() if end}
    assert trainer.rows == len(trainer.learned) + trainer.duplicate
    # A trainer that never died learned the same, in the same order, with the same account.
    calm = learned(log, ["go on"])
    assert (calm.learned, calm.rows, calm.duplicate) == (trainer.learned, trainer.rows, trainer.duplicate)


def test_a_row_that_no_record_holds_and_one_that_two_hold_are_noticed() -> None:
    first, third = (record([Range(SOURCES[0], at, at + 2, rows=2)]) for at in (0, 4))
    marks = RecordFilter(SPEC, SALT).take_in(first, {}, always(Mask.NONE), "here").marks
    lost = RecordFilter(SPEC, SALT).take_in(third, marks, always(Mask.NONE), "here")
    assert lost.gaps == [(SOURCES[0], 2, 4)]
    twice = RecordFilter(SPEC, SALT).take_in(first, marks, always(Mask.NONE), "here")
    assert (twice.rows, twice.duplicate, len(twice.batch)) == (2, 2, 0)


def joined(opened: int, at: int) -> bytes:
    """A record of one source: an event at `at` that labels the impression at `opened` and ends the wait of the one before it."""
    made = columns(
        3,
        offset=np.full(3, at),
        kind=[Kind.FEEDBACK, Kind.JOINED, Kind.EXPIRED],
        waited=[0, at - opened, at - opened + 1],
        at_ms=[5000, 3000, 2000],
        delay_ms=[0, 2000, 1000],
    )
    part = Range(SOURCES[0], at, at + 1, feedback=1, joined=1, expired=1)
    return encode(Header(SPEC, SALT, (part,), created_ms=0), made)


def test_only_rows_to_learn_from_are_taken_and_counted() -> None:
    value = joined(opened=10, at=20)
    found = RecordFilter(SPEC, SALT).take_in(value, {SOURCES[0]: 20}, always(Mask.NONE), "here")
    assert (found.rows, found.duplicate, found.batch.opened.tolist()) == (2, 0, [10, 9])
    again = RecordFilter(SPEC, SALT).take_in(value, found.marks, always(Mask.NONE), "here")
    assert (again.rows, again.duplicate, len(again.batch)) == (2, 2, 0)


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (Mask(1, offsets=((0xABABABAB, 0, 10, 11),)), [9]),  # the impression
        (Mask(1, offsets=((0xABABABAB, 0, 20, 21),)), [9]),  # its click, which only ended the other's wait
        (Mask(1, offsets=((0xABABABAB, 0, 9, 10),)), [10]),
        (Mask(1, times=((3000, 3001),)), [9]),
        (Mask(1, times=((5000, 5001),)), [9]),
        (Mask(1, times=((4000, 4999),)), [10, 9]),
        (Mask(1, users=MaskedUsers.of([0])), []),
    ],
)
def test_a_mask_leaves_out_a_row_with_its_impression_or_its_click(mask: Mask, left: list[int]) -> None:
    found = RecordFilter(SPEC, SALT).take_in(joined(opened=10, at=20), {}, always(mask), "here")
    assert found.batch.opened.tolist() == left
    assert (found.rows, found.masked) == (2, 2 - len(left))
