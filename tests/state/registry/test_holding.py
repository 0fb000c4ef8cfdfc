"""What control does about a held update, and what is written of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from state.features.mask import Mask
from state.registry.control import (
    MOST_RELEASED,
    Control,
    HeldUpdate,
    SuspectClicks,
    decode,
    encode,
    follow,
    hold,
    pin,
    recover,
    release,
    roll_back,
    start,
)
from tests.state.registry.test_control import reread

CLICKS = (SuspectClicks("ab" * 16, 0, 5, 80), SuspectClicks("ab" * 16, 2, 0, 9))
HELD = HeldUpdate("user", "share of one user", 30.5, 1.0, 7, 40, 90, 1000, 9000, CLICKS)


def who(reason: str = "test", now_ms: int = 5) -> dict[str, Any]:
    return {"actor": "guard", "reason": reason, "now_ms": now_ms}


def first() -> Control:
    return start(actor="trainer", reason="first start", now_ms=0)


def test_what_is_held_and_what_was_let_go_is_written_and_read() -> None:
    held = hold(first(), HELD, **who())
    assert reread(held) == held
    let_go = release(held, **who())
    assert reread(let_go) == let_go
    assert let_go.released == (90,)


def test_a_field_that_is_missing_is_no_control() -> None:
    document = json.loads(encode(hold(first(), HELD, **who())))
    del document["held"]["first"]
    with pytest.raises(ValueError, match="first"):
        decode(json.dumps(document).encode(), {}.__getitem__, {}.__getitem__)


def test_answers_that_an_operator_pinned_stay_there_through_hold_and_release() -> None:
    pinned = pin(first(), 3, **who())
    held = hold(pinned, HELD, **who())
    assert held.serving.version == 3 and held.held is not None and not held.held.followed
    assert release(held, **who()).serving.version == 3


def test_answers_that_were_let_follow_or_pinned_meanwhile_stay_so_at_the_release() -> None:
    held = hold(first(), HELD, **who())
    assert release(follow(held, **who()), **who()).serving.mode == "follow"
    assert release(pin(held, 2, **who()), **who()).serving.version == 2


def test_nothing_is_pinned_where_no_version_is_before_it() -> None:
    held = hold(first(), replace(HELD, version=0), **who())
    assert held.serving.mode == "follow" and held.held is not None


@pytest.mark.parametrize(
    "back", [lambda held: roll_back(held, 7, Mask.NONE, **who()), lambda held: recover(held, 7, **who())]
)
def test_a_new_epoch_holds_nothing_and_remembers_what_was_let_go(back: Any) -> None:
    let_go = release(hold(first(), HELD, **who()), **who())
    held = hold(let_go, replace(HELD, next=200), **who())
    assert held.held is not None
    assert (back(held).held, back(held).released, back(held).epoch) == (None, (90,), 2)


def test_a_second_hold_waits_for_the_first_and_a_release_of_nothing_changes_nothing() -> None:
    held = hold(first(), HELD, **who())
    assert hold(held, replace(HELD, next=200), **who()) is held
    assert release(first(), **who()) == first()


def test_only_so_many_releases_are_remembered() -> None:
    control = first()
    for at in range(MOST_RELEASED + 5):
        control = release(hold(control, replace(HELD, next=at), **who()), **who())
    assert control.released == tuple(range(5, MOST_RELEASED + 5))
