"""Two of a kind on one state: the second is refused, and one that was stopped and overtaken harms nothing."""

from __future__ import annotations

import functools
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.history.store import HistoryStore
from state.log import Topics
from tests.conftest import KafkaFactory
from tests.e2e.evidence import LogContent, compare_logs, read_log
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.streaming.streams import FOREVER, StreamProcess, click, running, send, settings_for

CLICKS = 1000
DEADLINE_S = 120.0
AT_WORK = "waiting for the bootstrap"


@pytest.fixture
def parts() -> Iterator[list[Part]]:
    made: list[Part] = []
    yield made
    for part in made:
        part.kill()


def at_work(part: Part) -> bool:
    return AT_WORK in part.said()


@pytest.mark.nightly
def test_a_second_trainer_is_refused_also_after_the_first_died_by_kill_9(
    kafka_settings: KafkaFactory, tmp_path: Path, parts: list[Part]
) -> None:
    settings = replace(load([], {}), kafka=kafka_settings(), paths=replace(load([], {}).paths, state=str(tmp_path)))
    settings = replace(
        settings,
        stream=replace(settings.stream, metrics_port=0),
        trainer=replace(settings.trainer, metrics_port=0),
    )
    with Topics(settings.kafka) as topics:
        topics.ensure(settings.kafka.clicks_topic, 2)

    def begin(log: str) -> Part:
        parts.append(Part("trainer", settings, tmp_path / log))
        return parts[-1]

    for round_ in ("first", "after the kill"):
        holder = begin(f"holder {round_}.log")
        until(functools.partial(at_work, holder), f"the {round_} holder is not at work", DEADLINE_S)
        second = begin(f"second {round_}.log")
        assert second.process.wait(DEADLINE_S) == 1
        (line,) = [line for line in second.said().splitlines() if "LockHeld" in line]
        assert f"process {holder.pid} on {socket.gethostname()}" in line
        assert holder.end() is None
        holder.kill()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Clicks, and what an undisturbed stream makes of them; filled by the first test."""
    return {"salt": tmp_path_factory.mktemp("calm") / "salt"}


def undisturbed(kafka_settings: KafkaFactory, tmp_path: Path, calm: dict[str, object]) -> tuple[LogContent, str]:
    if "log" not in calm:
        kafka = kafka_settings()
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, 2, FOREVER)
        send(kafka, [click(number) for number in range(CLICKS)])
        settings = settings_for(kafka, tmp_path / "calm", Path(str(calm["salt"])))
        with running(settings, tmp_path / "calm-log") as stream:
            until(lambda: done(kafka), "the calm run has not read everything", DEADLINE_S)
            assert stream.stop() == 0
        calm |= {"clicks": kafka.clicks_topic, "log": read_log(kafka, kafka.microbatches_topic)}
        calm["digest"] = digest(settings)
    log = calm["log"]
    assert isinstance(log, LogContent)
    return log, str(calm["digest"])


def digest(settings: Settings) -> str:
    store = HistoryStore(settings.stream_dir / "histories", map_bytes=1 << 30, readonly=True)
    try:
        assert store.totals["rows"] == store.totals["positions"] == CLICKS
        return store.digest()
    finally:
        store.close()


def done(kafka: Kafka) -> bool:
    with Topics(kafka) as topics:
        if kafka.microbatches_topic not in topics.names():
            return False
    return sum(read_log(kafka, kafka.microbatches_topic).marks.values()) == CLICKS


def stopped(stream: StreamProcess) -> bool:
    assert stream.process.poll() is None, stream.lines
    return bool(psutil.Process(stream.process.pid).status() == psutil.STATUS_STOPPED)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("heir_has", "at", "errors"),
    [
        # On another host, from a copy of the state. Records that waited too long for their broker are given up.
        ("a copy", "stream.sent:2", ("FencedWriter", "UnreachableBroker")),
        ("a copy", "stream.acknowledged:2", ("FencedWriter", "UnreachableBroker")),
        # In the same directory, after somebody removed the lock's file.
        ("the same", "stream.acknowledged:2", ("PositionConflict",)),
        ("the same", "stream.committed:2", ("FencedWriter",)),
    ],
)
def test_a_stream_that_was_stopped_and_overtaken_ends_and_harms_nothing(
    kafka_settings: KafkaFactory,
    tmp_path: Path,
    calm: dict[str, object],
    heir_has: str,
    at: str,
    errors: tuple[str, ...],
) -> None:
    expected, expected_digest = undisturbed(kafka_settings, tmp_path, calm)
    kafka = kafka_settings(clicks_topic=calm["clicks"])
    salt = Path(str(calm["salt"]))
    settings = settings_for(kafka, tmp_path / "state", salt)
    with running(settings, tmp_path / "zombie-log", f"{at}:stop") as zombie:
        # 1. One stream stops in the middle of its commit sequence.
        until(lambda: stopped(zombie), "the stream has not stopped", DEADLINE_S)
        # 2. Another takes over and does all the work.
        if heir_has == "a copy":
            shutil.copytree(settings.state_dir, tmp_path / "copy")
            theirs = settings_for(kafka, tmp_path / "copy", salt)
        else:
            theirs = settings
            (settings.stream_dir / "lock").unlink()
        with running(theirs, tmp_path / "heir-log") as heir:
            until(lambda: done(kafka), "the heir has not done the work", DEADLINE_S)
            assert heir.stop() == 0, heir.lines
        before = read_log(kafka, kafka.microbatches_topic)
        # 3. The first one is continued.
        zombie.process.send_signal(signal.SIGCONT)
        assert zombie.wait() == 1
    assert any(error in zombie.lines[-1] for error in errors), zombie.lines[-1]
    assert sum(" ERROR " in line for line in zombie.lines) == 1
    assert not any("Traceback" in line for line in zombie.lines), zombie.lines
    # 4. What it was about to do is not in the log, and the rows are those of an undisturbed stream.
    after = read_log(kafka, kafka.microbatches_topic)
    assert (after.records, after.rows.keys()) == (before.records, before.rows.keys())
    difference = compare_logs(after, expected)
    assert (difference.lost, difference.invented, difference.changed, after.differing, after.gaps) == (0, 0, 0, 0, 0)
    assert digest(theirs) == expected_digest
