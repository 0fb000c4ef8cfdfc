"""The operator pins, follows and rolls back a running loop."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest

from tests.e2e.load import Asking
from tests.e2e.running import Loop, counting, led_by, until


def served(loop: Loop) -> tuple[int, int]:
    """Version and epoch of an answer."""
    answer = until(lambda: loop.profile("anyone"), "no answer")
    return answer["version"]["number"], answer["version"]["epoch"]


def iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.fixture(autouse=True)
def following(loop: Loop) -> None:
    """Begins from a loop that follows."""
    loop.springtide("follow", "--reason", "a test begins")


def test_pinned_answers_stay_and_training_goes_on_until_follow(loop: Loop) -> None:
    version, epoch = loop.kept()
    loop.springtide("pin", str(version), "--reason", "look at this one")
    # Answers may have been at this version before.
    until(lambda: loop.metrics("applier").value("springtide_serving_pinned") == 1.0, "the pin is not seen")
    until(lambda: served(loop)[0] == version, "the pin is not seen")
    trained = loop.metrics("trainer").value("springtide_trainer_version") or 0.0
    until(
        lambda: (loop.metrics("trainer").value("springtide_trainer_version") or 0.0) > trained,
        "training did not go on",
    )
    assert served(loop) == (version, epoch)
    loop.springtide("follow", "--reason", "seen enough")
    until(lambda: served(loop)[0] > version, "answers do not follow")


def test_rollback_answers_with_the_version_at_once_and_a_new_epoch_leaves_the_poison_out(loop: Loop) -> None:
    user, poison = "victim-of-the-bots", "poisoned-category"
    loop.answer_trained_on(user, loop.click([(user, "book", "reading", "purchase")] * 5))
    good, epoch = loop.kept()
    # The poison lies alone in its interval of event time.
    begin_s = time.time()
    ends = loop.click([(user, f"bot-{n}", poison, "purchase") for n in range(20)])
    poisoned = loop.answer_trained_on(user, ends, led_by(poison))
    end_s = time.time()
    bad = poisoned["version"]["number"]

    loop.springtide(
        "rollback", "--to", str(good), "--skip-time", f"{iso(begin_s)}..{iso(end_s)}", "--reason", "bots clicked"
    )
    until(lambda: served(loop)[0] == good, f"version {good} is not served")

    # 1. Answers are of the good version, and their windows leave the masked clicks out.
    answer = until(lambda: loop.profile(user), "no answer")
    assert answer["version"]["number"] == good
    assert answer["version"]["mask_generation"] > 0
    assert poison not in [interest["label"] for interest in answer["interests"]]

    # 2. The trainer starts a new epoch from it; versions never reuse a number.
    def new_epoch() -> list[dict[str, object]]:
        return [one for one in loop.springtide("versions") if one["epoch"] == epoch + 1]

    first = min(int(str(one["version"])) for one in until(new_epoch, "no version of the new epoch"))
    assert first > bad
    assert served(loop) == (good, epoch)

    # 3. Answers follow when they are told to, and the poison stays out.
    loop.springtide("follow", "--reason", "the new epoch is good")
    until(lambda: served(loop)[1] == epoch + 1, "answers do not follow into the new epoch")
    ends = loop.click([(user, "book", "reading", "view")])
    answer = loop.answer_trained_on(user, ends, led_by("reading"))
    assert answer["version"]["epoch"] == epoch + 1
    assert poison not in [interest["label"] for interest in answer["interests"]]


def test_an_exact_rollback_takes_stream_and_histories_back_while_clicks_go_on(loop: Loop) -> None:
    user, poison = "victim-of-other-bots", "flooded-category"
    loop.answer_trained_on(user, loop.click([(user, "book", "reading", "purchase")] * 5))
    _, epoch = loop.kept()
    began_s = time.time()
    loop.answer_trained_on(user, loop.click([(user, f"bot-{n}", poison, "purchase") for n in range(20)]))
    done_s = time.time()
    before = loop.springtide("status")["accounting"]
    span = f"{iso(began_s)}..{iso(done_s)}"
    # The version is chosen: clicks that a fast rollback of another test left out are excluded from the log too.
    done = loop.springtide("rollback", "--mode", "exact", "--skip-time", span, "--reason", "bots clicked")
    assert done["plan"]["exact"]["clicks"] > 20
    assert done["control"]["mode"] == "exact"
    loop.springtide("follow", "--reason", "the new epoch is good")
    # Everything of before is learned again, and more: shoppers and attributes go on all the time.
    ends = loop.click([(user, "book", "reading", "view")])
    answer = loop.answer_trained_on(user, ends, counting("purchase.count_1h", 5))
    assert answer["version"]["epoch"] == epoch + 1
    assert poison not in [interest["label"] for interest in answer["interests"]]

    def balanced() -> dict[str, Any] | None:
        found: dict[str, Any] = loop.springtide("status")["accounting"]
        # Not where a test before deleted old records of the log, and another one made the stream's store anew from it.
        return found if found["compared"] or not before["compared"] else None

    account = until(balanced, lambda: f"cannot be compared: {loop.springtide('status')['accounting']}")
    assert account["faults"] == []
    assert account["stream"]["masked"] >= before["stream"]["masked"] + 20


def test_under_load_no_request_fails_none_mixes_versions_and_the_pin_outlives_the_worker(loop: Loop) -> None:
    serving = loop.settings.serving
    with Asking(serving.host, serving.port, 300.0, [f"shopper-{number}" for number in range(200)]) as load:
        good, epoch = loop.kept()
        until(lambda: served(loop)[0] > good + 3, "no newer version")
        until(lambda: not loop.metrics("applier").problem, "the applier does not answer")
        turned = ("--to", str(good), "--reason", "under load", "--follow-when-caught-up", "--wait", "60")
        said = loop.springtide("rollback", *turned)
        told_s = time.monotonic()
        until(lambda: served(loop) == (good, epoch) or served(loop)[1] > epoch, "answers did not turn")
        # The trainer learns again what it had, and then lets answers follow.
        until(lambda: served(loop)[1] > epoch, "answers do not follow by themselves")
    assert (load.failed, load.mixed) == ({}, 0)
    assert load.asked > 300
    # When the command has returned, answers are of the version, or already follow the new epoch.
    assert said["answered_s"] is not None
    first = min(one["version"] for one in loop.springtide("versions", "--all") if one["epoch"] == epoch + 1)
    assert [one for one in load.seen if one.asked_s > told_s and good < one.version < first] == [], "abandoned ones"
    outcome = loop.springtide("history")[-2]["outcome"]
    assert outcome["learned"]["again"]["rows"] == outcome["planned"]["rows"], "what happened is what the plan said"
    assert loop.springtide("history")[-1]["reason"] == "caught up, as the rollback asked"

    pinned, _ = loop.kept()
    loop.springtide("pin", str(pinned), "--reason", "over a restart")
    pid = loop.pid("worker")
    assert pid is not None
    psutil.Process(pid).kill()
    until(lambda: loop.pid("worker") not in (None, pid), "the worker is not started again")
    until(lambda: served(loop)[0] == pinned, "the pin is not seen")
    assert {served(loop)[0] for _ in range(20)} == {pinned}


def test_history_names_who_did_what_and_why(loop: Loop) -> None:
    loop.springtide("pin", str(loop.kept()[0]), "--reason", "for the audit")
    newest = loop.springtide("history")[-1]
    assert newest["action"] == "pin"
    assert newest["reason"] == "for the audit"
    assert newest["actor"]
    loop.springtide("follow", "--reason", "done")
