"""The loop survives the death of each part, stops without a trace, and goes on where it stopped."""

from __future__ import annotations

import os
import re
import signal

import psutil
import pytest

from state.accounts import StreamAccount, check_accounts
from state.history.store import HistoryStore
from tests.e2e.running import Loop, counting, led_by, until
from tests.e2e.watching import Watching

PARTS = ("stream", "trainer", "applier", "worker")


def test_the_loop_recovers_from_the_kill_of_each_part(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    killed = {part: until(lambda part=part: loop.pid(part), f"{part} does not run") for part in PARTS}
    user = "sender-around-the-kills"
    loop.click([(user, "lamp", "light", "purchase")] * 4)
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    ends = loop.click([(user, "lamp", "light", "purchase")] * 6)
    for part, pid in killed.items():
        until(lambda part=part, pid=pid: loop.pid(part) not in (None, pid), f"{part} is not started again")
    # Clicks that were read twice count once.
    loop.answer_trained_on(user, ends, led_by("light"), counting("purchase.count_7d", 10))
    assert [part for part in PARTS if f"{part} died (SIGKILL)" not in loop.said()] == []


@pytest.mark.nightly
def test_the_loop_recovers_from_the_kill_of_kafka_which_is_an_alert_meanwhile(loop: Loop, watching: Watching) -> None:
    pid = loop.pid("kafka")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    watching.wait_for("SpringtideBrokerAway")
    until(lambda: loop.pid("kafka") not in (None, pid), "Kafka is not started again")
    user = "sender-after-the-kill-of-kafka"
    ends = loop.click([(user, "lamp", "light", "purchase")] * 10)
    loop.answer_trained_on(user, ends, led_by("light"), counting("purchase.count_7d", 10))
    assert "Kafka ended with status -9" in loop.said()
    watching.wait_until_over("SpringtideBrokerAway")


def test_ctrl_c_leaves_no_process_and_a_second_start_answers_before_its_kafka_is_up_and_goes_on(loop: Loop) -> None:
    user = "one-who-comes-back"
    ends = loop.click([(user, "tent", "outdoors", "purchase")] * 7)
    before = loop.answer_trained_on(user, ends, led_by("outdoors"), counting("purchase.count_7d", 7))
    running, already = loop.processes(), len(loop.said())
    assert len(running) >= 7

    # 1. Ctrl-C ends all of it.
    assert loop.stop(signal.SIGINT) == 0
    said = loop.said()[already:]
    assert "stopped after" in said
    # Stream and applier have the time that their disks need.
    assert not re.search("(stream|applier) did not end", said), said
    _, alive = psutil.wait_procs(running, timeout=60)
    assert alive == []
    mine = [
        str(loop.settings.state_dir) in word
        for one in psutil.process_iter(["cmdline"])
        for word in one.info["cmdline"] or ()
    ]
    assert not any(mine)

    # 2. Every position is accounted for.
    store = HistoryStore(loop.settings.stream_dir / "histories", readonly=True)
    totals, positions = (
        store.totals,
        {f"{one.topic_id}:{one.partition}": next for one, next in store.positions().items()},
    )
    store.close()
    assert check_accounts(StreamAccount(**totals)) == ()
    assert totals["rows"] > 0

    # 3. The second start answers from what is there, before its Kafka is up.
    loop.begin()
    kafka = until(lambda: loop.pid("kafka"), "Java is not started")
    os.kill(kafka, signal.SIGSTOP)
    try:
        early = until(lambda: loop.profile(user), "no answer without Kafka")
        until(lambda: "  serving  " in loop.said_since_start(), "`up` does not say that serving answers")
        assert early["known"]
        assert early["version"]["number"] >= before["version"]["number"]
        assert early["version"]["age_s"] > 0 and early["at_ms"] >= before["at_ms"]
        assert early["features"]["purchase.count_7d"] == 7
        assert loop.get("/readyz")[0] == 200
        assert "  Kafka  " not in loop.said_since_start()
        assert [loop.pid(part) for part in ("shoppers", "stream", "trainer")] == [None, None, None]
    finally:
        os.kill(kafka, signal.SIGCONT)

    # 4. It goes on: same registry, same positions, no second bootstrap.
    loop.wait_until_up()
    assert "done by an earlier run" in loop.said_since_start()
    after = loop.answer_trained_on(user, ends, led_by("outdoors"), counting("purchase.count_7d", 7))
    assert after["version"]["number"] >= early["version"]["number"]
    assert after["version"]["epoch"] == before["version"]["epoch"]
    ends = loop.click([(user, "tent", "outdoors", "purchase")])
    assert all(ends[source] >= position for source, position in positions.items())
    again = loop.answer_trained_on(user, ends, counting("purchase.count_7d", 8))
    assert again["version"]["number"] > early["version"]["number"]
