"""Pin, follow, hold, label and history on a real registry: each a generation with actor and reason."""

from __future__ import annotations

import json
import shlex

import pytest

from deploy import formats
from deploy.operate import masking
from deploy.sections import held_text, held_update
from state.config.loading import load
from state.errors import CorruptVersion, SettingsError, UnfitMask, UnfitVersion, UnknownVersion
from state.process.environment import actor
from state.registry.control import HeldUpdate, SuspectClicks, named
from state.registry.control import hold as hold_update
from tests.deploy.operating import NOW_MS, TOPIC, Operator


def test_a_pin_and_a_follow_are_generations_with_actor_and_reason(operator: Operator) -> None:
    assert "version 3" in operator("pin", "3", "--reason", "odd answers")
    assert "pinned" in next(line for line in operator("versions").splitlines() if line.startswith("3"))
    operator("follow")
    first, pinned, followed = operator.registry.controls()
    assert first.action == "start"
    assert (pinned.serving.version, pinned.reason, pinned.actor) == (3, "odd answers", actor())
    assert (followed.serving.mode, followed.epoch) == ("follow", 1)


def test_a_command_given_twice_changes_nothing_the_second_time(operator: Operator) -> None:
    operator("pin", "3")
    assert "nothing was changed" in operator("pin", "3", "--reason", "again")
    document = json.loads(operator("pin", "3", "-o", "json"))
    assert document["changed"] is False
    with pytest.raises(UnknownVersion, match=r"9 is not kept.*5"):
        operator("pin", "9")
    assert len(operator.registry.controls()) == 2


def test_history_lists_who_did_what_and_why_and_reads_no_older_generations(operator: Operator) -> None:
    operator("rollback", "--skip-time", "8m..now", "--reason", "poisoned feed")
    text = operator("history")
    assert "poisoned feed" in text and "rollback" in text and "clicks from" in text and "not caught up yet" in text
    operator("pin", "1", "--reason", "later")
    (first, *_) = sorted((operator.registry.path / "control").glob("*.json"))
    kept = first.read_bytes()
    first.write_text("damaged")
    text = operator("history", "--last", "1")
    assert "later" in text and "poisoned feed" not in text
    assert "2 older generations are stored too" in text
    with pytest.raises(CorruptVersion, match=first.name):
        operator("history", "--all")
    first.write_bytes(kept)
    assert "outcome" in json.loads(operator("history", "--last", "2", "-o", "json"))[0]


@pytest.mark.parametrize(("verb", "back"), [("hold", "release"), ("pause", "resume")])
def test_publishing_and_training_are_held_and_let_go_as_generations(operator: Operator, verb: str, back: str) -> None:
    operator(verb, "--reason", "look first")
    assert "nothing was changed" in operator(verb)
    document = json.loads(operator(back, "--reason", "fine", "-o", "json"))
    assert document["changed"] is True
    held, let_go = operator.registry.controls()[1:]
    assert (held.publishing, held.training) == ((False, True) if verb == "hold" else (True, False))
    assert (held.action, held.reason, held.actor) == (verb, "look first", actor())
    assert (let_go.publishing, let_go.training, let_go.action) == (True, True, back)
    assert held.epoch == let_go.epoch == 1, "the trainer stays in its epoch"


def test_masks_are_listed_with_rows_and_users_and_lifted_by_number(operator: Operator) -> None:
    assert operator("masks") == "nothing is left out"
    operator("rollback", "--skip", "1:400-439", "--skip-time", "4m..now", "--reason", "bots")
    entries = json.loads(operator("masks", "-o", "json"))
    assert [(one["id"], one["rows"], one["users"], one["reason"]) for one in entries] == [
        (1, 40, 18, "bots"),
        (2, 40, 18, "bots"),
    ]
    assert "offsets 400-439" in operator("masks") and "40" in operator("masks")
    said = operator("unmask", "2", "--reason", "it was a campaign")
    assert "new clicks count again" in said and "rollback --to 4 --mode exact" in said
    assert "nothing was changed" in operator("unmask", "2", "--reason", "again")
    assert "lifted by generation 3" in operator("masks")
    with pytest.raises(UnfitMask, match="there is no mask 7"):
        operator("unmask", "7", "--reason", "typo")
    control = operator.registry.control()
    assert control is not None
    assert ([one.id for one in control.masks], control.reason, control.action) == ([1], "it was a campaign", "unmask")


def test_a_label_is_a_generation_that_lists_and_keeps_the_version(operator: Operator) -> None:
    assert "canary is version 3" in operator("label", "canary", "3", "--reason", "try it")
    assert "canary" in next(line for line in operator("versions").splitlines() if line.startswith("3"))
    assert "nothing was changed" in operator("label", "canary", "3")
    labelled = operator.registry.controls()[-1]
    assert (labelled.action, labelled.labels, labelled.reason) == ("label", (("canary", 3),), "try it")
    assert 3 in named(labelled)
    operator("pin", "2")
    assert operator.registry.controls()[-1].labels == (("canary", 3),)
    operator("label", "canary", "--remove")
    assert operator.registry.controls()[-1].labels == () and 3 not in named(operator.registry.controls()[-1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("canary",), SettingsError), (("canary", "3", "--remove"), SettingsError), (("canary", "9"), UnknownVersion),
        (("Canary!", "3"), UnfitVersion),
    ],
)  # fmt: skip
def test_a_label_that_cannot_be_given_changes_nothing(
    operator: Operator, words: tuple[str, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        operator("label", *words)
    assert len(operator.registry.controls()) == 1


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
    assert control is not None
    assert control.released == (24, 34)


@pytest.mark.parametrize("text", ["yesterday", "", "-5", "-5y", "12:00"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="ISO 8601"):
        formats.parse_time(text, NOW_MS)


@pytest.mark.parametrize("text", ["now", "now..10m", "5..5"])
def test_a_range_of_times_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--skip-time"):
        formats.parse_times(text, NOW_MS)


def test_a_place_needs_one_clear_topic() -> None:
    other = "0000002b" + "0" * 24
    assert masking.parse_place(f"{other}:3:5-5", [TOPIC, other]) == (43, 3, 5, 6)
    for text, topics in (("3:5-5", [TOPIC, other]), ("3:5-5", []), ("3:6-5", [TOPIC]), ("5-6", [TOPIC])):
        with pytest.raises(SettingsError, match="--skip"):
            masking.parse_place(text, topics)
