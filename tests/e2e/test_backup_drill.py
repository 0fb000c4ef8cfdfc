"""A drill: backed up while clicks flow, lost, restored elsewhere, and gone on from the log, bit for bit as one that was left alone."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.backup import location
from deploy.backup.making import Scope, make
from deploy.backup.restoring import By, Restored, Since, restore
from deploy.serving.answers.host import Host
from state.events.identity import load_salt
from state.file_store import open_store
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.process import killpoints
from state.process.environment import wall_ms
from state.registry.registry import Registry
from tests import forked
from tests.e2e.evidence import state_at
from tests.e2e.running import ROOT
from tests.e2e.small_loop import BATCH, Applying, SmallLoop, Training
from tests.e2e.test_rollback_steps import BAD, GOOD, clicks, finished, go_back, never_saw, offsets, poisoned
from tests.e2e.test_rollback_steps import LATER as MORE
from tests.memory_log import MemoryLog

NOW_MS = 1_795_719_672_345
FLOWING, AFTER = 6 * BATCH, 2 * BATCH


pytestmark = pytest.mark.usefixtures("no_plan")


def move(loop: SmallLoop, to: Path) -> None:
    """The loop's machine is lost with all that was on it; it begins again at another place, on the same log."""
    loop.close()
    shutil.rmtree(loop.settings.state_dir)
    loop.settings = replace(loop.settings, paths=replace(loop.settings.paths, state=str(to)))


def bring_back(loop: SmallLoop, backups: Path, kafka_lost: bool = False) -> Restored:
    place = open_store(str(backups))
    done = restore(
        loop.settings,
        place,
        location.read_backup(place),
        By("ann", NOW_MS + 60_000),
        lambda more: None,
        Since(kafka_lost=kafka_lost),
    )
    loop.registry = Registry(loop.settings.registry_dir)
    return done


def histories(loop: SmallLoop) -> dict[str, object]:
    """What answers need of serving's histories."""
    path = loop.settings.serving_dir / HISTORIES
    store = HistoryStore(path, loop.settings.features.history, 1 << 27, readonly=True)
    try:
        extras = {
            kind: dict(store.extras(kind, "", 100_000)) for kind in ("item:", "name:", "clicked:", "new:", "feed")
        }
        assert extras["name:"]
        return {"users": store.users(), "digest": store.digest(), "positions": store.positions(), **extras}
    finally:
        store.close()


def ready(loop: SmallLoop) -> bool:
    """Whether a worker calls the histories ready."""
    settings = loop.settings
    host = Host(settings, load_salt(settings.salt_path), wall_ms)
    try:
        return "histories" not in host.missing()
    finally:
        host.close()


def test_what_is_restored_goes_on_as_if_nothing_had_happened(tmp_path: Path, salt: Path) -> None:
    loop, backups, sent = SmallLoop(tmp_path / "here", salt), tmp_path / "backups", 2 * BATCH
    loop.click(*clicks(0, sent))
    loop.settle()
    # 1. A process beside the running loop, whose clicks go on; it is held where it has the histories, and no version yet.
    backup = forked.Popen(
        [sys.executable, "-m", "deploy.cli", "backup", str(backups), "--with-salt"],
        cwd=ROOT,
        env={**os.environ, **loop.settings.environment(), killpoints.VARIABLE: "backup.histories:1:stop"},
    )
    begun = psutil.Process(backup.pid)
    while begun.status() != psutil.STATUS_STOPPED:
        assert backup.poll() is None
        if sent < FLOWING and loop.tick("stream") is False:
            loop.click(*clicks(sent, BATCH))
            sent += BATCH
        for name in loop.NAMES:
            loop.tick(name)
    loop.click(*clicks(sent, AFTER))
    sent += AFTER
    loop.settle()
    begun.resume()
    assert backup.wait(60) == 0
    # 2. The system lives on for a while; nobody keeps that.
    loop.click(*clicks(sent, AFTER))
    sent += AFTER
    loop.settle()
    lost = {
        one.relative_to(loop.settings.registry_dir): one.read_bytes()
        for one in (loop.settings.registry_dir / "versions").rglob("*.*")
    }
    move(loop, tmp_path / "there")
    # 3. Versions are equal, and the cut lies before what the log has by now.
    done = bring_back(loop, backups)
    restored = list((loop.settings.registry_dir / "versions").rglob("*.*"))
    assert len(restored) > 4
    assert all(one.read_bytes() == lost[one.relative_to(loop.settings.registry_dir)] for one in restored)
    (positions,) = done.positions.values()
    (histories,), (version,) = positions.values(), loop.newest.marks.values()
    assert 2 * BATCH <= histories < version == sent - AFTER
    # 4. It goes on from there, and is what a loop is that was left alone.
    loop.settle()
    loop.click(*clicks(sent, MORE))
    loop.settle()
    found = {"records": loop.records(), **loop.content()}
    loop.close()
    alone = SmallLoop(tmp_path / "alone", salt)
    alone.click(*clicks(0, sent + MORE))
    alone.settle()
    assert found == {"records": alone.records(), **alone.content()}
    alone.close()


def test_control_that_is_newer_than_the_histories_takes_them_back(tmp_path: Path, salt: Path) -> None:
    loop, to = poisoned(tmp_path / "here", salt)
    mask, backups = offsets(GOOD, GOOD + BAD), tmp_path / "backups"
    loop.end("stream")

    def roll_back() -> None:
        killpoints.armed = None
        go_back(loop, to, mask, "exact")
        loop.settle()
        # One process opens a store once.
        loop.end("stream")
        loop.end("applier")

    killpoints.armed = killpoints.parse("backup.histories", roll_back)
    made = make(loop.settings, open_store(str(backups)), Scope(with_salt=True), NOW_MS, lambda more: None)
    assert made.left_out == ()
    assert (made.epoch, next(iter(made.positions["stream-0"].values()))) == (2, GOOD + BAD)
    move(loop, tmp_path / "there")
    bring_back(loop, backups)
    found = finished(loop)
    assert found == never_saw(tmp_path / "alone", salt, loop.control)


def test_where_kafka_is_lost_too_what_was_learned_goes_on_in_another_log(tmp_path: Path, salt: Path) -> None:
    loop, to = poisoned(tmp_path / "here", salt)
    go_back(loop, to, offsets(GOOD, GOOD + BAD), "exact")
    loop.click(*clicks(GOOD + BAD, MORE))
    loop.settle()
    # The histories have a batch more than the newest version has learned.
    newest, sent = loop.newest, GOOD + BAD + MORE
    loop.click(*clicks(sent, BATCH))
    loop.tick("stream")
    loop.end("stream")
    while loop.tick("applier"):
        pass
    loop.end("applier")
    backups, before = tmp_path / "backups", histories(loop)
    made = make(loop.settings, open_store(str(backups)), Scope(with_salt=True), NOW_MS, lambda more: None)
    assert made.left_out == ()
    assert made.version == newest.version
    lost = sum(made.positions["stream-0"].values()) - sum(newest.marks.values())
    assert lost == BATCH
    move(loop, tmp_path / "there")
    # 1. Another cluster: the topics are others, and empty.
    ids = iter(("11" * 16, "22" * 16, "33" * 16))
    loop.log = MemoryLog(ids=lambda: next(ids))
    kafka = loop.settings.kafka
    for topic in (kafka.clicks_topic, kafka.microbatches_topic, kafka.dead_letters_topic):
        loop.log.topics().ensure(topic, 1)
    done = bring_back(loop, backups, kafka_lost=True)
    assert (done.version, loop.control.epoch, loop.control.base) == (newest.version, made.epoch + 1, newest.version)
    # 2. Answers come from what was learned, and from the restored histories, before anything is learned anew.
    loop.tick("applier")
    loop.settle()
    applier = loop.parts["applier"]
    assert isinstance(applier, Applying) and applier.served == newest.version
    loop.end("applier")
    assert histories(loop) == before
    # A worker is ready by them: its clock runs, and the log was read to its end.
    assert ready(loop)
    trainer = loop.parts["trainer"]
    assert isinstance(trainer, Training)
    weights = trainer.content()["weights"]
    assert weights == state_at(loop.registry, newest.version).digest
    # 3. New clicks are learned on top of it, and the accounts own to what is lost.
    loop.click(*clicks(sent + BATCH, MORE))
    loop.settle()
    assert loop.newest.version > done.first_number - 1
    assert (loop.newest.log.topic_id, loop.newest.log.first < loop.newest.log.next) == ("22" * 16, True)
    training = trainer.content()
    assert training["weights"] != weights
    loop.end("stream")
    store = HistoryStore(loop.settings.stream_dir / HISTORIES, loop.settings.features.history, 1 << 27, readonly=True)
    stream = store.totals
    store.close()
    assert stream["rows"] - training["account"]["rows"] == lost == training["account"]["gap"]
    # 4. A restart goes on from there.
    loop.end("trainer")
    loop.click(*clicks(sent + BATCH + MORE, MORE))
    version = loop.newest.version
    loop.settle()
    assert loop.newest.version > version
    loop.close()
