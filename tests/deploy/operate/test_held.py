"""What the guard holds is told with the commands about it, and they do what they say."""

from __future__ import annotations

import json
import shlex

from deploy.sections import held_text, held_update
from state.config.loading import load
from state.registry.control import HeldUpdate, SuspectClicks
from state.registry.control import hold as hold_update
from tests.deploy.operating import TOPIC, Operator

UPDATE = HeldUpdate("user", "share of one user", 30.5, 1.0, 3, 20, 24, 1000, 9000, (SuspectClicks(TOPIC, 1, 400, 480),))


def hold(operator: Operator) -> None:
    operator.registry.change(lambda now: hold_update(now, UPDATE, actor="guard", reason="a flood", now_ms=5))


def test_status_says_rule_numbers_and_place_and_nothing_where_nothing_is_held(operator: Operator) -> None:
    settings = load(["--paths.state", str(operator.state)], {})
    assert held_update(settings) is None
    hold(operator)
    found = held_update(settings)
    assert found is not None
    word, text = held_text(found)
    assert word == "HOLDS"
    assert "user: share of one user is 30.5, usually 1, from partition 1 offset 400 on" in text
    assert "answers stay at version 3" in text
    assert json.loads(json.dumps(found))["clicks"] == [{"topic_id": TOPIC, "partition": 1, "first": 400, "next": 480}]


def test_the_rollback_that_is_proposed_can_be_typed(operator: Operator) -> None:
    hold(operator)
    found = held_update(load(["--paths.state", str(operator.state)], {}))
    assert found is not None
    program, *words = shlex.split(found["commands"][0])
    assert program == "springtide"
    assert "epoch 2 starts from version 3" in operator(*words, "--wait", "0")
    back = operator.registry.control()
    assert back is not None and back.held is None and back.serving.then_follow
    assert [(one.mask.offsets) for one in back.masks] == [((0x2A, 1, 400, 480),)]
    assert "guard: user" in operator("history")


def test_release_and_resume_let_go_what_is_held(operator: Operator) -> None:
    for place, command in enumerate(("release", "resume")):
        hold(operator) if place == 0 else operator.registry.change(
            lambda now: hold_update(
                now, HeldUpdate("item", "share", 9.0, 1.0, 3, 30, 34, 0, 9), actor="guard", reason="-", now_ms=6
            )
        )
        said = operator(command, "--reason", "a sale")
        assert "is accepted" in said and "not held again" in said
        control = operator.registry.control()
        assert control is not None and control.held is None and control.serving.mode == "follow"
        assert (control.action, control.reason) == (command, "a sale")
    assert control.released == (24, 34)
