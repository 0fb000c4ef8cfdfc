"""How long a new serving host takes from its start until its histories are current, and whether it answers alike.

    python -m tests.bench.new_host_start [--users 1000000] [--events 64] [--asked 200]

Real processes: Kafka, the applier of a host that has served for long, the applier of a new one, and a worker. The old
host writes the snapshot; the log then grows by `RECORDS` records. The new host loads the snapshot and reads those. It
would fetch versions in another thread; these are left out. The worker answers the same questions with the histories of
both hosts.

The stores are made in memory, 9 GB for the defaults, and the rest on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.local_kafka import Broker
from deploy.serving.host_files import CLICKS, Currency
from state.config.settings import Settings
from state.events.identity import load_salt, user_id
from state.history import snapshots
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import CURRENT, HISTORIES, SALT
from state.log import Topics, Writer
from state.positions import Range
from state.process.ports import free_port
from state.process.wall_clock import wall_ms
from state.registry.control import start
from state.registry.registry import Registry
from tests.bench.answers.stores import fill, worker
from tests.bench.new_host import ROWS, SOURCE, record
from tests.bench.report import Figure, Stages, report

RECORDS, PATIENCE_S = 20, 480.0
QUESTION = "http://127.0.0.1:{port}/v1/profiles/user-{user}?at={at}&top=1000&fields=features,vector"

progress = Stages("new_host_start")


class Host:
    """An applier on a state directory in memory."""

    def __init__(self, settings: Settings, port: int, snapshot_every_s: int) -> None:
        self.settings = settings
        self._environment = os.environ | {
            "SPRINGTIDE_PATHS_STATE": settings.paths.state, "SPRINGTIDE_PATHS_REGISTRY": settings.paths.registry,
            "SPRINGTIDE_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{port}", "SPRINGTIDE_SERVING_METRICS_PORT": "0",
            "SPRINGTIDE_HISTORY_SNAPSHOT_EVERY_S": str(snapshot_every_s), "SPRINGTIDE_SERVING_MAX_AGE_S": "4",
            "SPRINGTIDE_PATHS_SALT_FILE": str(settings.salt_path), "SPRINGTIDE_STORAGE_MEMORY_DIR": "",
            "SPRINGTIDE_STORAGE_BUDGET_GB": "200",
        }  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[psutil.Process]:
        process = subprocess.Popen([sys.executable, "-m", "deploy.serving.applier"], env=self._environment)
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()

    def is_current_since(self, at_ms: int) -> bool:
        """Whether the histories have all that the log had at a time."""
        age_s = Currency(self.settings.serving_dir, CURRENT).ages_s(wall_ms())[CLICKS]
        return age_s is not None and wall_ms() - 1000 * age_s >= at_ms


def until(ready: Callable[[], bool], what: str) -> None:
    progress.say(what)
    deadline_s = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        time.sleep(0.05)


def answers(settings: Settings, users: int, asked: int, at_ms: int) -> list[Any]:
    """The answers of a worker for users spread over all of them, without the age of the version."""
    port, found = free_port(), list[Any]()
    with worker(settings.paths.state, port):
        for user in range(0, users, max(1, users // asked)):
            with urllib.request.urlopen(QUESTION.format(port=port, user=user, at=at_ms)) as response:
                found.append(json.load(response))
                found[-1]["version"].pop("age_s")
    return found


def settings_of(memory: Path, disk: Path, name: str) -> Settings:
    """Settings of a host; hosts share the registry and the salt."""
    paths = {"state": memory / name, "registry": disk / "registry", "salt_file": memory / "old" / SALT}
    base = Settings()
    return replace(base, paths=replace(base.paths, **{setting: str(path) for setting, path in paths.items()}))


def make(settings: Settings, users: int, events: int) -> None:
    """Fills the stores of a host that has served for long; its registry has control and no version."""
    progress.say("filling the stores")
    fill(settings, users, events, users)
    store = HistoryStore(settings.serving_dir / HISTORIES, settings.features.history)
    store.commit(Appends.none(), [Range(SOURCE, 0, ROWS, rows=ROWS)])
    store.close()
    Registry(settings.registry_dir).propose(start(actor="bench", reason="a bench", now_ms=1))


def measure(memory: Path, disk: Path, users: int, asked: int) -> dict[str, Figure]:
    """The figures of an old and a new host."""
    one, two = settings_of(memory, disk, "old"), settings_of(memory, disk, "new")
    salt, rng = load_salt(one.salt_path), np.random.default_rng(5)
    known = np.array([user_id(salt, f"user-{number}") for number in range(0, users, 10)], np.uint64)
    topic, begin_ms = one.kafka.microbatches_topic, wall_ms()
    with Broker(disk / "kafka", free_port(), heap_mb=256) as broker:
        port = int(broker.bootstrap_servers.rpartition(":")[2])
        kafka = replace(one.kafka, bootstrap_servers=broker.bootstrap_servers)
        old, new = Host(one, port, 3600), Host(two, port, 0)
        with Topics(kafka) as topics, Writer(kafka) as writer:
            topics.ensure(topic, 1, {})
            writer.send(topic, 0, None, record(1, known, rng, begin_ms, salt.fingerprint))
            writer.flush()
            location = snapshots.location_of(one)
            with old.running() as process:
                until(lambda: bool(snapshots.numbers(location)), "the old host writes a snapshot")
                snapshot_s = sum(process.cpu_times()[:2])
                for number in range(2, 2 + RECORDS):
                    writer.send(topic, 0, None, record(number, known, rng, begin_ms, salt.fingerprint))
                writer.flush()
                sent_ms = wall_ms()
                until(lambda: old.is_current_since(sent_ms), "the old host reads the rest of the log")
        began_s = time.monotonic()
        with new.running() as process:
            until(lambda: new.is_current_since(sent_ms), "a new host starts")
            took_s, used_s = time.monotonic() - began_s, sum(process.cpu_times()[:2])
            newest = snapshots.newest(location)
            assert newest is not None
    at_ms = begin_ms + 1500 * (2 + RECORDS)
    progress.say("the old host's answers")
    before = answers(one, users, asked, at_ms)
    mine, theirs = one.serving_dir / HISTORIES, two.serving_dir / HISTORIES
    mine.rename(memory / "histories")
    theirs.rename(mine)
    progress.say("the new host's answers")
    after = answers(one, users, asked, at_ms)
    different = sum(first != second for first, second in zip(before, after, strict=True))
    return {
        "a new host is current after": Figure(took_s, "s", "<= 60"),
        "the same, processor": Figure(used_s, "cpu-s"),
        "the old host with its snapshot, processor": Figure(snapshot_s, "cpu-s"),
        "size of the snapshot": Figure(newest.bytes / 1e6, "MB"),
        "answers compared": Figure(float(len(before)), "answers"),
        "answers that differ": Figure(float(different), "answers", "<= 0"),
    }


def main() -> None:
    """Takes the figures."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--users", type=int, default=1_000_000)
    flags.add_argument("--events", type=int, default=64)
    flags.add_argument("--asked", type=int, default=200)
    given = flags.parse_args()
    with ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="springtide-bench-", dir=folder)))
            for folder in (Settings().storage.memory_dir, None)
        ]
        make(settings_of(*folders, "old"), given.users, given.events)
        figures = measure(*folders, given.users, given.asked)
    report("new_host_start", figures, {"users": given.users, "events each": given.events, "records after": RECORDS})


if __name__ == "__main__":
    main()
