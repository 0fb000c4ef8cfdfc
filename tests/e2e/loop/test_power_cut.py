"""A power cut: `up` heals by itself what had not reached the disk, says what it did, and nothing is learned twice or from what is gone.

What the test throws away, of a loop that is killed as a whole:

- of the local Kafka, the newest records of the clicks and of the training log, down into the middle of a transaction (its
  record is left, its marker is not), and the marks of a clean stop. Other topics (groups, transactions, attributes) and the
  cluster's own metadata, which Kafka syncs, stay whole;
- of the stream's and serving's stores all that lies in memory; of one on the disk, a part of its pages (they become
  zeros), and the start of the machine that its mark names;
- of the registry the versions that are not durable, names and all. Each other file was synced before it appeared: the disk
  keeps its word about what it synced.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from state.log import Topics
from state.registry.registry import MOST_BETWEEN, Registry
from tests.e2e.loop.test_bad_record import balanced
from tests.e2e.running import Loop, counting, until
from tests.segments import cut_back, forget_clean_stop

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
    accepted = "(the local Kafka lost what was not on disk): topic springtide.clicks.v1"
    until(lambda: accepted in (settings.logs_dir / "stream.log").read_text(), "the stream did not notice the cut")
    recovered = until(
        lambda: [one for one in loop.springtide("history") if one["action"] == "recover"], "the trainer did not go back"
    )[-1]
    assert recovered["actor"].startswith("trainer:") and "was cut back to offset" in recovered["reason"]
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
