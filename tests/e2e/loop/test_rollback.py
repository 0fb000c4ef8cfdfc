"""The operator pins, follows and rolls back a running loop, also under load; rollbacks with masks are drills of `test_runbook.py`."""

from __future__ import annotations

import time

import psutil
import pytest

from deploy.watch.scrape import serving_address
from tests.e2e.client import Client
from tests.e2e.running import Loop, until


def served(loop: Loop) -> tuple[int, int]:
    """Version and epoch of an answer."""
    answer = until(lambda: loop.profile("anyone"), "no answer")
    return answer["version"]["number"], answer["version"]["epoch"]


@pytest.fixture(autouse=True)
def following(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")


def test_under_load_no_request_fails_none_mixes_versions_and_the_pin_outlives_the_worker(loop: Loop) -> None:
    users = [f"shopper-{number}" for number in range(200)]
    clients = [Client(serving_address(loop.settings), users, every_s=0.03) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        good, epoch = loop.kept()
        for client in clients:
            client.may_turn_to(good)
        until(lambda: served(loop)[0] > good + 3, "no newer version")
        until(lambda: not loop.metrics("applier").problem, "the applier does not answer")
        turned = ("--to", str(good), "--reason", "under load", "--follow-when-caught-up", "--wait", "60")
        said = loop.springtide("rollback", *turned)
        told_s = time.monotonic()
        until(lambda: served(loop) == (good, epoch) or served(loop)[1] > epoch, "answers did not turn")
        # The trainer learns again what it had, and then lets answers follow.
        until(lambda: served(loop)[1] > epoch, "answers do not follow by themselves")
    finally:
        found = [client.finish() for client in clients]
    assert [(one.failed, one.mixed, one.went_back) for one in found] == [({}, 0, 0)] * len(clients)
    assert sum(one.given for one in found) > 300
    # When the command has returned, answers are of the version, or already follow the new epoch.
    assert said["answered_s"] is not None
    first = min(one["version"] for one in loop.springtide("versions", "--all") if one["epoch"] == epoch + 1)
    seen = [version for one in found for asked_s, version in one.seen if asked_s > told_s]
    assert [version for version in seen if good < version < first] == [], "abandoned ones"
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
