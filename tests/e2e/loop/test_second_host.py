"""A second serving host of the running loop: it answers as the first one does; `tests/e2e/test_many_hosts.py` has more hosts and S3."""

from __future__ import annotations

from pathlib import Path

from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import Loop
from tests.e2e.test_many_hosts import USER, reached, without_age


def test_a_second_host_learns_from_clicks_and_a_pin_makes_answers_equal(loop: Loop, tmp_path: Path) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    host = ServingHost("second", tmp_path / "second", loop, {})
    host.start()
    try:
        ends = loop.click([(USER, "lamp", "light", "purchase")] * 7)
        learned = loop.answer_trained_on(USER, ends)["version"]["number"]
        both = [loop.profile, host.profile]
        reached(
            both,
            lambda one: one["version"]["number"] >= learned and one["features"]["purchase.count_7d"] == 7,
            host.said,
        )
        pinned = loop.springtide("pin", str(loop.kept()[0]), "--reason", "a test")
        number = pinned["control"]["serving"]["version"]
        answers = reached(both, lambda one: one["version"]["number"] == number, host.said)
        moment = str(answers[0]["at_ms"])
        first, second = (without_age(ask(USER, at=moment) or {}) for ask in both)
        assert first == second
        loop.springtide("follow", "--reason", "a test ends")
        reached(both, lambda one: one["version"]["number"] > number, host.said)
    finally:
        host.stop()
        forget_memory(tmp_path)
