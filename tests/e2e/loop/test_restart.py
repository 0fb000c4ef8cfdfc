"""The running loop goes on after deaths of parts, a power cut, a restart and a bad record."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import status
from state.accounts import StreamAccount, check_accounts
from state.history.store import HistoryStore
from state.log import Topics, Writer
from state.registry.registry import MOST_BETWEEN, Registry
from tests.e2e.running import Loop, counting, led_by, until
from tests.e2e.watching import Watching
from tests.segments import cut_back, forget_clean_stop

PARTS = ("stream", "trainer", "applier", "worker")


def runs_again(loop: Loop, part: str, killed: int) -> bool:
    return loop.pid(part) not in (None, killed)


def test_the_loop_recovers_from_the_kill_of_each_part(loop: Loop) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    killed = {part: until(partial(loop.pid, part), f"{part} does not run") for part in PARTS}
    user = "sender-around-the-kills"
    loop.click([(user, "lamp", "light", "purchase")] * 4)
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    ends = loop.click([(user, "lamp", "light", "purchase")] * 6)
    for part, pid in killed.items():
        until(partial(runs_again, loop, part, pid), f"{part} is not started again")
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


def stopped_by_ctrl_c(loop: Loop) -> dict[str, int]:
    """Stops the loop as Ctrl-C does; no process remains, and every position is accounted for. Returns the positions."""
    running, already = loop.processes(), len(loop.said())
    assert len(running) >= 7
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
    store = HistoryStore(loop.settings.stream_dir / "histories", readonly=True)
    totals = store.totals
    positions = {f"{one.topic_id}:{one.partition}": next for one, next in store.positions().items()}
    store.close()
    assert check_accounts(StreamAccount(**totals)) == ()
    assert totals["rows"] > 0
    return positions


def test_ctrl_c_leaves_no_process_and_every_position_accounted_for(loop: Loop) -> None:
    """The folder's last test: see `conftest.py`."""
    stopped_by_ctrl_c(loop)


@pytest.mark.nightly
def test_a_second_start_answers_before_its_kafka_is_up_and_goes_on(loop: Loop) -> None:
    user = "one-who-comes-back"
    ends = loop.click([(user, "tent", "outdoors", "purchase")] * 7)
    before = loop.answer_trained_on(user, ends, led_by("outdoors"), counting("purchase.count_7d", 7))
    positions = stopped_by_ctrl_c(loop)

    # 1. The second start answers from what is there, before its Kafka is up.
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
        until(
            lambda: "histories" in loop.get("/readyz")[1].get("degraded", {}), "/readyz does not say that Kafka is away"
        )
        assert "  Kafka  " not in loop.said_since_start()
        assert [loop.pid(part) for part in ("shoppers", "stream", "trainer")] == [None, None, None]
    finally:
        os.kill(kafka, signal.SIGCONT)

    # 2. It goes on: same registry, same positions, no second bootstrap.
    loop.wait_until_up()
    assert "done by an earlier run" in loop.said_since_start()
    until(lambda: "degraded" not in loop.get("/readyz")[1], "/readyz does not say that Kafka is back")
    after = loop.answer_trained_on(user, ends, led_by("outdoors"), counting("purchase.count_7d", 7))
    assert after["version"]["number"] >= early["version"]["number"]
    assert after["version"]["epoch"] == before["version"]["epoch"]
    ends = loop.click([(user, "tent", "outdoors", "purchase")])
    assert all(ends[source] >= position for source, position in positions.items())
    again = loop.answer_trained_on(user, ends, counting("purchase.count_7d", 8))
    assert again["version"]["number"] > early["version"]["number"]


PAGE = 4096
CLICKS_LOST, POSITIONS_LOST = 5, 31


def pull_the_plug(loop: Loop) -> None:
    """Kills all of it at one moment, Kafka among them, which is otherwise asked to stop."""
    running = loop.processes()
    assert loop.process is not None
    # Stopped first: it would start again what dies before it.
    loop.process.send_signal(signal.SIGSTOP)
    for process in running:
        if process.pid != loop.process.pid:
            process.kill()
    loop.process.kill()
    loop.process.wait()
    assert psutil.wait_procs(running, timeout=60)[1] == []


def lose_pages(store: Path) -> None:
    """Removes a store in memory; of another one it makes the last third of the pages zeros, and its mark one of before."""
    if store.is_symlink():
        shutil.rmtree(store.resolve().parent)
        return
    with (store / "data.mdb").open("r+b") as data:
        pages = data.seek(0, os.SEEK_END) // PAGE
        data.seek(pages * 2 // 3 * PAGE)
        data.write(bytes((pages - pages * 2 // 3) * PAGE))
    (store / "mark.json").write_text(json.dumps({"clean": False, "boot_id": "before the power cut"}))


@pytest.mark.nightly
def test_the_loop_heals_itself_after_a_power_cut(loop: Loop) -> None:
    settings = loop.settings
    before = loop.answer_trained_on(
        "one-before-the-cut", loop.click([("one-before-the-cut", "tent", "outdoors", "view")])
    )
    said, registry = len(loop.said()), Registry(settings.registry_dir)
    with Topics(settings.kafka) as topics:
        log = topics.ends(settings.kafka.microbatches_topic)[0][1]
    # More arrives, is learned and published.
    until(lambda: registry.manifest(registry.versions()[-1]).log.next > log + POSITIONS_LOST, "it does not learn on")
    pull_the_plug(loop)

    # 1. What had not reached the disk.
    data = settings.kafka_dir / "data"
    newest = registry.manifest(registry.versions()[-1])
    # The last record is there, its transaction's marker is not.
    end = newest.log.next - POSITIONS_LOST
    kept = cut_back(data, settings.kafka.microbatches_topic, 0, end, in_a_transaction=True)
    # Of the clicks more is lost than of the log: it holds some whose offsets others will take.
    left = next(one for one in map(registry.manifest, reversed(registry.versions())) if one.log.next <= kept)
    for source, mark in left.sources:
        assert cut_back(data, settings.kafka.clicks_topic, source.partition, mark - CLICKS_LOST) < mark
    forget_clean_stop(data)
    for store in (settings.stream_dir / "histories", settings.serving_dir / "histories", settings.serving_dir / "rows"):
        lose_pages(store)

    shutil.rmtree(settings.registry_dir / "recent")
    (settings.registry_dir / "recent.boot").write_text("before the power cut")

    # 2. One command, as always.
    loop.start()
    until(lambda: "CorruptStore" in loop.said()[said:], "nobody finds its store damaged")
    rebuilt = settings.logs_dir / "rebuild-history.log"
    until(lambda: "stream needs rebuild-history first" in loop.said()[said:], "the histories are not rebuilt")
    # By whom depends on the moment: the coordinator may have known of a commit under way, or of a transaction that was open.
    with Topics(settings.kafka) as topics:
        until(
            lambda: topics.ends(settings.kafka.microbatches_topic, committed_only=True)[0][1] > kept,
            lambda: (
                f"nobody reads past the open transaction: {rebuilt.read_text() if rebuilt.exists() else loop.said()[said:]}"
            ),
        )
    accepted = "(the local Kafka lost records that were not on disk): topic springtide.clicks.v1"
    until(lambda: accepted in (settings.logs_dir / "stream.log").read_text(), "the stream did not notice the cut")
    recovered = until(
        lambda: [one for one in loop.springtide("history") if one["action"] == "recover"], "the trainer did not go back"
    )[-1]
    assert recovered["actor"].startswith("trainer:") and "was truncated to offset" in recovered["reason"]
    assert registry.manifest(recovered["base"]).log.next <= kept

    # 3. It lives: new clicks are learned and answered, what was known before is known.
    ends = loop.click([("one-after-the-cut", "tent", "outdoors", "purchase")] * 5)
    # Each of the five has an offset of its own.
    after = loop.answer_trained_on("one-after-the-cut", ends, counting("purchase.count_7d", 5))
    assert after["version"]["epoch"] == recovered["epoch"] > before["version"]["epoch"]
    assert after["version"]["number"] > newest.version + MOST_BETWEEN, "no number that was lost comes again"
    loop.answer_trained_on("one-before-the-cut", ends, counting("view.count_7d", 1))
    # 4. Accounts balance, and the new line is recomputed bit for bit from before the cut.
    until(lambda: balanced(loop), "the accounts do not balance")
    verified = loop.springtide("verify", str(loop.kept()[0]), "--from", str(recovered["base"]))
    assert verified["outcome"] == "equal", verified


@pytest.mark.nightly
def test_answers_go_on_while_the_trainer_cannot_until_the_record_is_left_out(loop: Loop, watching: Watching) -> None:
    kafka = loop.settings.kafka
    worker, stream = loop.pid("worker"), loop.pid("stream")
    begin = len(loop.said())
    with Writer(kafka) as writer:
        writer.send(kafka.microbatches_topic, 0, None, b"hello")
        writer.flush()
    with Topics(kafka) as topics:
        end = topics.ends(kafka.microbatches_topic)[0][1]
    died = r"trainer died \(exit 1\): .*offset (\d+): a value of 5 bytes is no micro-batch.*after \d+ deaths in a row"
    until(lambda: re.search(died, loop.said()[begin:]), "the trainer does not die twice")
    found = re.search(died, loop.said()[begin:])
    assert found is not None
    offset = int(found[1])
    assert offset < end
    # The terminal's line is short; the log has what to type.
    words = f"springtide train (or up) --skip-record {offset} --reason TEXT"
    assert words in (loop.settings.logs_dir / "trainer.log").read_text()
    # 1. Nobody else is harmed.
    assert loop.running
    assert (loop.pid("worker"), loop.pid("stream")) == (worker, stream)
    loop.click([("while-it-cannot", "tent", "outdoors", "purchase")] * 3)
    answer = until(lambda: known(loop, "while-it-cannot"), "clicks do not reach answers")
    assert answer["purchase.count_7d"] == 3
    dying = until(lambda: state_of(loop)["figures"]["dying"], "status does not say it")
    assert dying["trainer"] >= 2
    watching.wait_for("SpringtidePartDying", part="trainer")
    # 2. The operator types it.
    assert loop.stop() == 0
    loop.start("--skip-record", str(offset), "--reason", "a test wrote it")
    loop.answer_trained_on("once-it-can", loop.click([("once-it-can", "tent", "outdoors", "purchase")]))
    assert loop.metrics("trainer").value("springtide_trainer_records_left_out_total") == 1
    account = until(lambda: balanced(loop), "the accounts do not balance")
    assert account["trainer"]["records_left_out"] == 1
    watching.wait_until_over("SpringtidePartDying")


def known(loop: Loop, user: str) -> dict[str, int] | None:
    answer = loop.profile(user)
    return answer["features"] if answer and answer["features"]["purchase.count_7d"] else None


def balanced(loop: Loop) -> dict[str, dict[str, int]] | None:
    account: dict[str, dict[str, int]] = state_of(loop)["accounting"]
    return account if account["balanced"] else None


def state_of(loop: Loop) -> dict[str, Any]:
    """What `springtide status -o json` shows, whatever is wrong."""
    return status.document(loop.settings, status.take(loop.settings))
