"""Control: each transition, what stays masked, erased and held, and which records of a log of several branches count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from state.disk import documents
from state.errors import CorruptVersion, UnfitMask
from state.experiments.experiment import Experiment, Schedule
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.positions import Source
from state.registry import manifest
from state.registry.control import (
    MOST_RELEASED,
    Control,
    Decision,
    HeldUpdate,
    SuspectClicks,
    decode,
    encode,
    erase,
    follow,
    hold,
    pin,
    publish,
    recover,
    release,
    roll_back,
    start,
    train,
    unmask,
)
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, LogLine, counts, from_json, has, onward, parting, to_json, turned

NOTHING_KEPT: dict[str, Any] = {}
WHO: Decision = {"actor": "ann", "reason": "because", "now_ms": 5}


@dataclass(frozen=True)
class Step:
    kind: str
    version: int
    mask: Mask

    def __call__(self, control: Control) -> Control:
        if self.kind == "pin":
            return pin(control, self.version, **WHO)
        if self.kind == "follow":
            return follow(control, **WHO)
        if self.kind == "unmask":
            return unmask(control, [one.id for one in control.masks if one.id % 9 < self.version], **WHO)
        if self.kind in ("publish", "train"):
            return (publish if self.kind == "publish" else train)(control, self.version % 2 == 0, **WHO)
        return roll_back(control, self.version, self.mask, **WHO)


def reread(control: Control) -> Control:
    """The control after encoding and decoding."""
    users = {one.users.digest: one.users for one in (*control.masks, *control.lifted)}
    erased = {control.erased.digest: control.erased}
    return decode(encode(control), users.__getitem__, erased.__getitem__)


spans = st.tuples(st.integers(0, 50), st.integers(51, 99))
masks = st.builds(
    Mask,
    generation=st.just(0),
    offsets=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50), st.integers(51, 99)), max_size=2
    ).map(tuple),
    times=st.lists(spans, max_size=2).map(tuple),
    users=st.frozensets(st.integers(1, 2**64 - 1), max_size=2).map(MaskedUsers.of),
)
steps = st.builds(
    Step, st.sampled_from(["pin", "follow", "rollback", "unmask", "publish", "train"]), st.integers(1, 9), masks
)


@given(st.lists(steps, max_size=12))
def test_every_transition_adds_one_generation_or_none(taken: list[Step]) -> None:
    control = start(**WHO)
    for step in taken:
        after = step(control)
        assert after is control or after.generation == control.generation + 1
        assert after.epoch - control.epoch in (0, 1)
        assert (after.epoch == control.epoch) or (step.kind == "rollback" and after.base == step.version)
        control = after


@given(st.lists(steps, max_size=12), steps)
def test_a_repeated_transition_changes_nothing(taken: list[Step], step: Step) -> None:
    control = start(**WHO)
    for earlier in taken:
        control = earlier(control)
    once = step(control)
    assert step(once) is once


@given(st.lists(steps, max_size=12))
def test_what_was_masked_stays_masked_until_it_is_lifted(taken: list[Step]) -> None:
    control = start(**WHO)
    for step in taken:
        after = step(control)
        if step.kind == "unmask":
            control = after
            continue
        for mask in (control.mask, step.mask if step.kind == "rollback" else Mask.NONE):
            assert set(mask.offsets) <= set(after.mask.offsets)
            assert set(mask.times) <= set(after.mask.times)
            assert set(mask.users) <= set(after.mask.users)
        assert (after.mask == control.mask) or after.mask.generation == after.generation
        assert after.masks[: len(control.masks)] == control.masks, "an old mask keeps its number"
        control = after


@given(st.lists(steps, max_size=6))
def test_a_control_survives_its_encoding(taken: list[Step]) -> None:
    control = start(**WHO)
    for step in taken:
        control = step(control)
    assert reread(control) == control


def test_an_exact_rollback_turns_the_log_and_a_fast_one_keeps_its_line() -> None:
    first = start(**WHO)
    line = turned(first.log, 1, 40, 60, ((Source("ab" * 16, 1), 7),))
    exact = roll_back(first, 3, Mask(times=((5, 6),)), **WHO, log=line)
    assert (exact.mode, exact.log, reread(exact)) == ("exact", line, exact)
    later = turned(first.log, 1, 40, 99, ())
    assert roll_back(exact, 3, Mask.NONE, **WHO, log=later) is exact, "asked again it changes nothing"
    assert roll_back(exact, 3, Mask.NONE, **WHO) is exact, "what is exact is fast too"
    fast = roll_back(exact, 2, Mask.NONE, **WHO)
    assert (fast.mode, fast.log, fast.mask) == ("fast", line, exact.mask)
    assert roll_back(fast, 2, Mask.NONE, **WHO, log=later).mode == "exact"


def test_control_without_an_exact_rollback_is_what_an_older_release_reads() -> None:
    document = json.loads(encode(roll_back(start(**WHO), 3, Mask.NONE, **WHO)))
    assert document["format"] == 1
    assert document.keys() & {"mode", "log", "masks", "publishing", "training", "plan"} == set()
    assert document["mask"] == {"generation": 0, "offsets": [], "times": [], "users": []}
    for more in (
        roll_back(start(**WHO), 3, Mask(times=((1, 2),)), **WHO),
        roll_back(start(**WHO), 3, Mask.NONE, **WHO, then_follow=True),
        publish(start(**WHO), False, **WHO),
        train(start(**WHO), False, **WHO),
    ):
        assert json.loads(encode(more))["format"] == 2, "0.1.0 would do it wrong"


def test_masks_of_0_1_0_get_numbers_and_can_be_lifted() -> None:
    old = json.loads(encode(start(**WHO)))
    old["mask"] = {
        "generation": 4,
        "offsets": [[42, 1, 100, 200]],
        "times": [[5, 9]],
        "users": [f"{user:016x}" for user in (7, 2**64 - 1)],
    }
    control = decode(json.dumps(old).encode(), NOTHING_KEPT.__getitem__, NOTHING_KEPT.__getitem__)
    assert [one.id for one in control.masks] == [1, 2, 3]
    assert control.mask == Mask(4, ((42, 1, 100, 200),), ((5, 9),), MaskedUsers.of([7, 2**64 - 1]))
    free = unmask(control, [3], **WHO)
    assert (free.mask.users, free.mask.times, free.last_mask) == (MaskedUsers.NOBODY, ((5, 9),), 3)


def test_a_lifted_mask_still_counts_for_records_written_before_it_was_lifted() -> None:
    back = roll_back(start(**WHO), 2, Mask(times=((1, 9),), offsets=((42, 0, 3, 5),)), **WHO)
    free = unmask(pin(back, 3, **WHO), [2], **WHO)
    (lifted,) = free.lifted
    assert (lifted.id, lifted.lifted, free.generation) == (2, 4, 4)
    assert [bool(free.mask_at(generation).times) for generation in (0, 2, 3, 4, 5)] == [True, True, True, False, False]
    assert all(free.mask_at(generation).offsets for generation in (0, 2, 4)), "the other one goes on"
    assert unmask(free, [2], **WHO) is free, "asked again it changes nothing"
    with pytest.raises(UnfitMask, match=r"there is no mask 3.*springtide masks`: 1"):
        unmask(free, [3], **WHO)


def test_a_rollback_after_a_lift_learns_again_what_was_lifted_and_never_reuses_its_number() -> None:
    free = unmask(roll_back(start(**WHO), 2, Mask(times=((1, 9),)), **WHO), [1], **WHO)
    again = roll_back(free, 2, Mask.NONE, **WHO)
    assert (again.epoch, again.lifted, bool(again.mask_at(0))) == (3, (), False)
    (masked,) = roll_back(again, 2, Mask(times=((1, 9),)), **WHO).masks
    assert masked.id == 2


def test_users_who_are_masked_already_are_not_stored_again() -> None:
    back = roll_back(start(**WHO), 2, Mask(users=MaskedUsers.of([1, 2, 3])), **WHO)
    more = roll_back(back, 1, Mask(users=MaskedUsers.of([2, 3, 4])), **WHO)
    assert [list(one.users) for one in more.masks] == [[1, 2, 3], [4]]
    assert list(more.mask.users) == [1, 2, 3, 4]


CLICKS = (SuspectClicks("ab" * 16, 0, 5, 80), SuspectClicks("ab" * 16, 2, 0, 9))
HELD = HeldUpdate("user", "share of one user", 30.5, 1.0, 7, 40, 90, 1000, 9000, CLICKS)


def test_what_is_held_and_what_was_let_go_is_written_and_read() -> None:
    held = hold(start(**WHO), HELD, **WHO)
    assert reread(held) == held
    let_go = release(held, **WHO)
    assert reread(let_go) == let_go
    assert let_go.released == (90,)


def test_a_field_that_is_missing_is_no_control() -> None:
    document = json.loads(encode(hold(start(**WHO), HELD, **WHO)))
    del document["held"]["first"]
    with pytest.raises(ValueError, match="first"):
        decode(json.dumps(document).encode(), NOTHING_KEPT.__getitem__, NOTHING_KEPT.__getitem__)


def test_answers_that_an_operator_pinned_stay_there_through_hold_and_release() -> None:
    pinned = pin(start(**WHO), 3, **WHO)
    held = hold(pinned, HELD, **WHO)
    assert held.serving.version == 3 and held.held is not None and not held.held.followed
    assert release(held, **WHO).serving.version == 3


def test_answers_that_were_let_follow_or_pinned_meanwhile_stay_so_at_the_release() -> None:
    held = hold(start(**WHO), HELD, **WHO)
    assert release(follow(held, **WHO), **WHO).serving.mode == "follow"
    assert release(pin(held, 2, **WHO), **WHO).serving.version == 2


def test_nothing_is_pinned_where_no_version_is_before_it() -> None:
    held = hold(start(**WHO), replace(HELD, version=0), **WHO)
    assert held.serving.mode == "follow" and held.held is not None


@pytest.mark.parametrize(
    "back", [lambda held: roll_back(held, 7, Mask.NONE, **WHO), lambda held: recover(held, 7, **WHO)]
)
def test_a_new_epoch_holds_nothing_and_remembers_what_was_let_go(back: Any) -> None:
    let_go = release(hold(start(**WHO), HELD, **WHO), **WHO)
    held = hold(let_go, replace(HELD, next=200), **WHO)
    assert held.held is not None
    assert (back(held).held, back(held).released, back(held).epoch) == (None, (90,), 2)


def test_a_second_hold_waits_for_the_first_and_a_release_of_nothing_changes_nothing() -> None:
    held = hold(start(**WHO), HELD, **WHO)
    assert hold(held, replace(HELD, next=200), **WHO) is held
    assert release(start(**WHO), **WHO) == start(**WHO)


def test_only_so_many_releases_are_remembered() -> None:
    control = start(**WHO)
    for at in range(MOST_RELEASED + 5):
        control = release(hold(control, replace(HELD, next=at), **WHO), **WHO)
    assert control.released == tuple(range(5, MOST_RELEASED + 5))


CONTROLS_WHO: dict[str, Any] = {"actor": "ann", "reason": "because", "now_ms": 5}
USER = 0x1122334455667788
ids = st.frozensets(st.integers(0, 2**64 - 1), max_size=20)


@pytest.fixture
def controls(tmp_path: Path) -> Controls:
    made = Controls(tmp_path)
    made.propose(start(**CONTROLS_WHO))
    return made


@given(ids, ids, st.lists(st.integers(0, 2**64 - 1), max_size=9))
def test_masked_users_are_a_set(mine: frozenset[int], others: frozenset[int], asked: list[int]) -> None:
    asked = [*asked, *list(mine)[:3]]
    users, more = MaskedUsers.of(mine), MaskedUsers.of(others)
    assert users.has(np.array(asked, np.uint64)).tolist() == [one in mine for one in asked]
    assert [one in users for one in asked] == [one in mine for one in asked]
    assert (list(users | more), len(users)) == (sorted(mine | others), len(mine))
    assert (users == more) == (mine == others)
    assert MaskedUsers.from_bytes(users.to_bytes()) == users
    mask = Mask(3, ((1, 2, 3, 4),), ((5, 6),), users)
    assert Mask.from_bytes(mask.to_bytes()) == Mask.from_json(mask.to_json()) == mask


def test_a_million_users_leave_control_small_and_lie_in_one_file(controls: Controls) -> None:
    users = MaskedUsers(np.arange(1, 1_000_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 >> 20))
    controls.change(lambda control: roll_back(control, 1, Mask(users=users), **CONTROLS_WHO))
    controls.change(lambda control: pin(control, 2, **CONTROLS_WHO))
    assert max(path.stat().st_size for path in (controls.path / "control").iterdir()) < 2000
    (file,) = (controls.path / "masks").iterdir()
    assert file.stat().st_size == 8_000_000
    other = Controls(controls.path)
    assert [one.mask.users == users for one in other.controls()] == [False, True, True]
    second, third = (one.masks[0].users for one in other.controls()[1:])
    assert second is third, "it is read once"


def test_a_control_that_outgrows_its_file_is_refused(controls: Controls) -> None:
    mask = Mask(times=tuple((at, at + 1) for at in range(0, 6000, 2)))
    with pytest.raises(UnfitMask, match=r"3000 masks.*100,000 are allowed.*unmask"):
        controls.change(lambda control: roll_back(control, 1, mask, **CONTROLS_WHO))
    assert len(controls.controls()) == 1


def masking(control: Control) -> Control:
    return roll_back(control, 1, Mask(users=MaskedUsers.of([USER])), **CONTROLS_WHO)


def erasing(control: Control) -> Control:
    return erase(control, MaskedUsers.of([USER]), [(42, 0, 100)], **CONTROLS_WHO)


@pytest.mark.parametrize(("change", "noun"), [(masking, "the users of a mask"), (erasing, "an erasure")])
def test_control_whose_users_are_damaged_or_missing_is_refused(
    controls: Controls, change: Callable[[Control], Control], noun: str
) -> None:
    controls.change(change)
    (file,) = (controls.path / "masks").iterdir()
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(CorruptVersion, match=f"{noun}, fails its digest.*restore it"):
        Controls(controls.path).control()
    file.unlink()
    with pytest.raises(CorruptVersion, match=f"{noun}, is missing"):
        Controls(controls.path).control()


def test_every_later_generation_has_the_erasure_whatever_it_decides(controls: Controls) -> None:
    controls.change(erasing)
    controls.change(lambda control: roll_back(control, 3, Mask(times=((0, 9),)), **CONTROLS_WHO))
    controls.change(lambda control: erase(control, MaskedUsers.of([USER, 9]), [(42, 0, 200)], **CONTROLS_WHO))
    controls.change(lambda control: unmask(control, [1], **CONTROLS_WHO))
    controls.change(lambda control: follow(control, **CONTROLS_WHO))
    with pytest.raises(UnfitMask, match="there is no mask 2"):
        controls.change(lambda control: unmask(control, [2], **CONTROLS_WHO))
    newest = Controls(controls.path).control()
    assert newest is not None and newest.action == "follow"
    assert [(one.id, one.generation, len(one.users)) for one in newest.erased] == [(1, 2, 1), (2, 4, 2)]
    assert newest.mask.erased == newest.mask_at(0).erased == newest.erased
    assert (newest.mask.times, newest.mask_generation) == ((), 5)
    assert [one.erased.last for one in Controls(controls.path).controls()] == [0, 1, 1, 2, 2, 2]


def test_many_erasures_leave_controls_file_as_small_as_one(controls: Controls) -> None:
    controls.change(erasing)
    sizes = []
    for number in range(1, 21):
        control = controls.control()
        assert control is not None
        made = controls.propose(erase(control, MaskedUsers.of([number]), [(42, 0, 100)], **CONTROLS_WHO))
        sizes.append((controls.path / "control" / f"{made.generation:08d}.json").stat().st_size)
    assert max(sizes) - min(sizes) < 8
    assert Controls(controls.path).control() == made


def test_the_pseudonym_is_in_the_erasures_file_alone(controls: Controls) -> None:
    controls.change(erasing)
    forms = [USER.to_bytes(8, "little"), USER.to_bytes(8, "big"), b"%016x" % USER, b"%d" % USER]
    having = [
        path.suffix
        for path in controls.path.rglob("*")
        if path.is_file() and any(f in path.read_bytes() for f in forms)
    ]
    assert having == [".erased"]


def test_the_newest_generation_is_found_without_reading_the_others(
    controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2, 40):
        controls.propose(pin(controls.control() or start(**CONTROLS_WHO), number, **CONTROLS_WHO))
    read: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    other = Controls(controls.path)
    assert (other.control() or start(**CONTROLS_WHO)).generation == 39
    assert read == ["00000039.json"]
    # An epoch is found by halves, and what ended it likewise.
    controls.propose(roll_back(controls.control() or start(**CONTROLS_WHO), 3, Mask.NONE, **CONTROLS_WHO))
    controls.propose(pin(controls.control() or start(**CONTROLS_WHO), 4, **CONTROLS_WHO))
    read.clear()
    other = Controls(controls.path)
    assert [(other.beginning_of(epoch) or start(**CONTROLS_WHO)).generation for epoch in (1, 2)] == [1, 40]
    assert other.beginning_of(3) is None
    assert [one.generation for one in other.last_of_epochs(1, 2)] == [39, 41]
    assert len(read) < 30


@given(st.binary(max_size=60))
@example(b"")
@example(b"{}")
@example(b"\xff")
@example(documents.seal(b"[1]"))
@example(documents.seal(b"{}"))
def test_bytes_that_are_no_document_are_refused_by_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        manifest.decode(data)
    with pytest.raises(ValueError, match=r"."):
        documents.decode_sealed(data, Experiment)


def test_each_flipped_byte_of_a_document_is_seen() -> None:
    data = documents.encode_sealed(Schedule(7, "retrain-1"))
    assert documents.decode_sealed(data, Schedule) == Schedule(7, "retrain-1")
    for place in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            documents.decode_sealed(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], Schedule)


CLICKS_SOURCE = Source("ab" * 16, 0)


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
        self.line = turned(self.line, to.epoch, to.offset, end, ((CLICKS_SOURCE, to.clicks),))
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


steps_of_log = st.lists(st.one_of(st.integers(0, 5), st.tuples(st.integers(0, 40), st.integers(0, 3))), max_size=10)


def played(taken: list[int | tuple[int, int]]) -> Model:
    model = Model()
    for step in taken:
        if isinstance(step, int):
            model.write(step)
        else:
            model.turn(*step)
    return model


@given(steps_of_log)
def test_the_line_has_each_click_once_in_order(taken: list[int | tuple[int, int]]) -> None:
    model = played(taken)
    assert [record.click for _, record in read(model.log, model.line)] == list(range(model.clicks))
    assert from_json(json.loads(json.dumps(to_json(model.line)))) == model.line


@given(steps_of_log)
def test_from_every_place_on_the_line_a_version_reads_on_without_a_gap(taken: list[int | tuple[int, int]]) -> None:
    model = played(taken)
    for place in model.places:
        if has(model.line, place.epoch, place.offset):
            clicks = [record.click for _, record in read(model.log, model.line, place.offset)]
            assert clicks == list(range(place.clicks, model.clicks))


@given(steps_of_log)
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
