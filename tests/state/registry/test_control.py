"""Control's transitions: what each changes, that none loses an earlier mask, and that repeating changes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from state.features.mask import Mask
from state.positions import Source
from state.registry import control as codec
from state.registry.control import Control, ServingChoice, follow, pin, roll_back, start
from state.registry.log_line import turned

WHO = {"actor": "ann", "reason": "because", "now_ms": 5}


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
        return roll_back(control, self.version, self.mask, **WHO)


spans = st.tuples(st.integers(0, 50), st.integers(51, 99))
masks = st.builds(
    Mask,
    generation=st.just(0),
    offsets=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50), st.integers(51, 99)), max_size=2
    ).map(tuple),
    times=st.lists(spans, max_size=2).map(tuple),
    users=st.frozensets(st.integers(1, 2**64 - 1), max_size=2),
)
steps = st.builds(Step, st.sampled_from(["pin", "follow", "rollback"]), st.integers(1, 9), masks)


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
def test_what_was_masked_stays_masked(taken: list[Step]) -> None:
    control = start(**WHO)
    for step in taken:
        after = step(control)
        for mask in (control.mask, step.mask if step.kind == "rollback" else Mask.NONE):
            assert set(mask.offsets) <= set(after.mask.offsets)
            assert set(mask.times) <= set(after.mask.times)
            assert mask.users <= after.mask.users
        assert (after.mask == control.mask) or after.mask.generation == after.generation
        control = after


@given(st.lists(steps, max_size=6))
def test_a_control_survives_its_encoding(taken: list[Step]) -> None:
    control = start(**WHO)
    for step in taken:
        control = step(control)
    assert codec.decode(json.loads(codec.encode(control))) == control


def test_a_rollback_pins_serving_where_the_epoch_begins() -> None:
    control = roll_back(follow(pin(start(**WHO), 3, **WHO), **WHO), 2, Mask.NONE, **WHO)
    assert (control.serving, control.base, control.epoch) == (ServingChoice("pin", 2), 2, 2)


def test_following_and_rolling_back_again_only_pins_again() -> None:
    back = roll_back(start(**WHO), 2, Mask(users=frozenset({7})), **WHO)
    again = roll_back(follow(back, **WHO), 2, Mask(users=frozenset({7})), **WHO)
    assert (again.epoch, again.serving, again.mask) == (back.epoch, ServingChoice("pin", 2), back.mask)


def test_an_exact_rollback_turns_the_log_and_a_fast_one_keeps_its_line() -> None:
    first = start(**WHO)
    line = turned(first.log, 1, 40, 60, ((Source("ab" * 16, 1), 7),))
    exact = roll_back(first, 3, Mask(users=frozenset({5})), **WHO, log=line)
    assert (exact.mode, exact.log, codec.decode(json.loads(codec.encode(exact)))) == ("exact", line, exact)
    later = turned(first.log, 1, 40, 99, ())
    assert roll_back(exact, 3, Mask.NONE, **WHO, log=later) is exact, "asked again it changes nothing"
    assert roll_back(exact, 3, Mask.NONE, **WHO) is exact, "what is exact is fast too"
    fast = roll_back(exact, 2, Mask.NONE, **WHO)
    assert (fast.mode, fast.log, fast.mask) == ("fast", line, exact.mask)
    assert roll_back(fast, 2, Mask.NONE, **WHO, log=later).mode == "exact"


def test_control_without_an_exact_rollback_is_what_an_older_release_reads() -> None:
    document = json.loads(codec.encode(roll_back(start(**WHO), 3, Mask.NONE, **WHO)))
    assert document["format"] == 1
    assert document.keys() & {"mode", "log"} == set()
