"""The line of the training log after any exact rollbacks, also with records that an earlier stream writes too late."""

from __future__ import annotations

import json
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, counts, from_json, has, onward, parting, to_json, turned

CLICKS = Source("ab" * 16, 0)


class Place(NamedTuple):
    """Where a version stands: epoch and offset of the log, and how many clicks it has."""

    epoch: int
    offset: int
    clicks: int


class Record(NamedTuple):
    epoch: int
    click: int


class Model:
    """A stream that writes a record a click, and a log that remembers every line and place there was."""

    def __init__(self) -> None:
        self.log: list[Record | None] = []
        self.line: LogLine = WHOLE
        self.clicks = 0
        self.lines = [WHOLE]
        self.places = [Place(1, 0, 0)]

    def write(self, records: int) -> None:
        for _ in range(records):
            # A transaction's marker takes an offset too.
            self.log += [Record(self.line[-1].epoch, self.clicks), None]
            self.clicks += 1
            self.places.append(Place(self.line[-1].epoch, len(self.log) - 1, self.clicks))

    def turn(self, choice: int, late: int) -> None:
        kept = [one for one in self.places if has(self.line, one.epoch, one.offset)]
        to = kept[choice % len(kept)]
        end, before = len(self.log), self.line[-1].epoch
        self.line = turned(self.line, to.epoch, to.offset, end, ((CLICKS, to.clicks),))
        # The stream had not seen it yet.
        self.log += [Record(before, self.clicks + number) for number in range(late)]
        self.clicks = to.clicks
        self.lines.append(self.line)
        self.places.append(Place(self.line[-1].epoch, onward(self.line, to.offset), to.clicks))


def read(log: list[Record | None], line: LogLine, at: int = 0) -> list[tuple[int, Record]]:
    found = []
    while (at := onward(line, at)) < len(log):
        record = log[at]
        if record is not None and counts(line, record.epoch, at):
            found.append((at, record))
        at += 1
    return found


steps = st.lists(st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 40), st.integers(0, 3))), max_size=10)


def played(taken: list[int | tuple[int, int]]) -> Model:
    model = Model()
    for step in taken:
        if isinstance(step, int):
            model.write(step)
        else:
            model.turn(*step)
    return model


@given(steps)
def test_the_line_has_each_click_once_in_order(taken: list[int | tuple[int, int]]) -> None:
    model = played(taken)
    assert [record.click for _, record in read(model.log, model.line)] == list(range(model.clicks))
    assert from_json(json.loads(json.dumps(to_json(model.line)))) == model.line


@given(steps)
def test_from_every_place_on_the_line_a_version_reads_on_without_a_gap(taken: list[int | tuple[int, int]]) -> None:
    model = played(taken)
    for place in model.places:
        if has(model.line, place.epoch, place.offset):
            clicks = [record.click for _, record in read(model.log, model.line, place.offset)]
            assert clicks == list(range(place.clicks, model.clicks))


@given(steps)
def test_where_two_lines_part_the_earlier_one_has_what_is_to_be_taken_back(taken: list[int | tuple[int, int]]) -> None:
    model = played(taken)
    for before in model.lines:
        found = parting(before, model.line)
        if found is None:
            assert before == model.line
            continue
        (known,) = [clicks for _, clicks in found.sources]
        shared = [one for one in read(model.log, before) if one[0] < found.offset]
        assert shared == [one for one in read(model.log, model.line) if one[0] < found.offset]
        assert [record.click for _, record in shared] == list(range(known))
