"""From a rollback's command to the last worker's answer: out of the row store, and from disk with a million rows, under load.

A real Kafka, a real registry whose first version has a million user rows, an
applier and two workers; `springtide rollback` is a process of its own. Clients
ask 300 times a second, some of it in batches, meanwhile.

    python -m tests.bench.rollback [--rows 1000000] [--rate 300]
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port
from deploy.operate.answers import versions_here
from deploy.operate.versions import served_version
from state.config.loading import load
from state.config.settings import Settings
from state.events.identity import load_salt, public_id
from state.features.spec import FeatureSpec
from state.log import Topics, Writer
from state.microbatch.codec import encode
from state.positions import Range, Source
from state.process.wall_clock import wall_ms
from state.registry.control import follow, start
from state.registry.manifest import TOLD_MS, Draft, LogRange
from state.registry.registry import SERVING, Registry
from tests.bench.report import Figure, report
from tests.e2e.load import Asking, Load
from tests.trainer.batches import micro_batch

RECORDS, ROWS, CHANGED, WORKERS = 50, 2048, 10_000, 2
WHO: dict[str, Any] = {"actor": "bench", "reason": "measured", "now_ms": 0}
PATIENCE_S = 120.0


def say(text: str) -> None:
    """Shows how far it is."""
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Stocked:
    """A registry with a million user rows and two small versions more, and the log that they are of."""

    def __init__(self, settings: Settings, rows: int) -> None:
        from trainer.model.default_ranker import DefaultRanker
        from trainer.versions.program import build

        self.settings, self._rng = settings, np.random.default_rng(3)
        self._spec = FeatureSpec.from_settings(settings)
        self._salt = load_salt(settings.salt_path)
        self.registry = Registry(settings.registry_dir)
        self.registry.propose(start(**WHO))
        model = DefaultRanker(settings.model, self._spec)
        self._dense = {f"dense.{name}": value for name, value in model.weights().items()}
        program = build(model)
        self._program = self.registry.specs.add_program(program)
        assert self._program == hashlib.sha256(program).hexdigest()
        self._users = np.unique(self._rng.integers(1, 2**63, rows).astype(np.uint64))
        self._fill_log()

    def _fill_log(self) -> None:
        kafka = self.settings.kafka
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, 1)
            topics.ensure(kafka.microbatches_topic, 1)
            self._clicks = Source(topics.describe(kafka.clicks_topic).topic_id, 0)
            self._log_id = topics.describe(kafka.microbatches_topic).topic_id
        now_ms = wall_ms()
        with Writer(kafka) as writer:
            for _ in range(RECORDS * ROWS):
                writer.send(kafka.clicks_topic, 0, None, b"{}")
            for number in range(RECORDS):
                first = number * ROWS
                batch = micro_batch(ROWS, first=first, at_ms=now_ms - RECORDS * ROWS)
                ranges = (Range(self._clicks, first, first + ROWS, rows=ROWS),)
                header = replace(batch.header, ranges=ranges, salt=self._salt.fingerprint, created_ms=now_ms)
                writer.send(kafka.microbatches_topic, 0, None, encode(header, batch.columns))
            writer.flush()

    def publish(self, parent: int | None, epoch: int, records: int) -> int:
        """Publishes a version that has learned so many records of the log: everything, or what changed since `parent`."""
        from trainer.versions import content

        users = self._users if parent is None else self._rng.choice(self._users, CHANGED, replace=False)
        categories = np.array([public_id(f"category-{n}") for n in range(64)], np.uint64)
        tensors: dict[str, Any] = dict(self._dense)
        for table, ids in (("user", np.sort(users)), ("category", np.sort(categories))):
            tensors[f"{table}.ids"] = ids
            tensors[f"{table}.rows"] = self._rng.random((len(ids), self.settings.model.dim), np.float32)
        tensors["user.accum"] = self._rng.random((len(users), self.settings.model.dim), np.float32)
        tensors["popular"] = categories[: self.settings.model.popular]
        now_ms = wall_ms()
        draft = Draft(
            kind="base" if parent is None else "delta",
            epoch=epoch,
            parent=parent,
            log=LogRange(self.settings.kafka.microbatches_topic, self._log_id, 0, 0, records),
            sources=((self._clicks, records * ROWS),),
            steps=records,
            rows=records * ROWS,
            created_at_ms=now_ms,
            event_time_ms=now_ms,
            spec=self._spec.digest,
            program=self._program,
            salt=self._salt.fingerprint,
            metrics={TOLD_MS: float(now_ms)},
        )
        return self.registry.publish(draft, content.encode(tensors)).version


@contextmanager
def serving(flags: list[str], *more: str) -> Iterator[None]:
    """An applier and the workers."""
    process = subprocess.Popen([sys.executable, "-m", "deploy.serve", *flags, *more], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def until(holds: Any, what: str) -> None:
    """Polls until it holds."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def turn(settings: Settings, flags: list[str], version: int, rate: float, *words: str) -> tuple[float, float, Load]:
    """Goes back to a version under load.

    Returns:
        Seconds from the start of the command to the last answer of another version; the command's processor time, its
        plan included; what the clients saw.
    """
    users = [f"user-{number}" for number in range(500)]
    with Asking(settings.serving.host, settings.serving.port, rate, users) as load:
        time.sleep(2.0)
        began_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, "-m", "deploy.cli", "rollback", "--to", str(version), "--reason", "measured"]
        done = subprocess.run([*line, "--wait", "60", *words, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        time.sleep(2.0)
    say(done.stdout.splitlines()[0])
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return load.last_other(version, began_s) - began_s, used_s, load


def measure(settings: Settings, flags: list[str], rows: int, rate: float) -> dict[str, Figure]:
    """All figures."""
    say(f"a registry with {rows:,} user rows, a log of {RECORDS * ROWS:,}")
    stocked = Stocked(settings, rows)
    first = stocked.publish(None, 1, 0)
    second = stocked.publish(first, 1, RECORDS // 2)
    third = stocked.publish(second, 1, RECORDS)
    serving_bytes = stocked.registry.manifest(first).files[SERVING].bytes
    skip = f"0:{RECORDS // 2 * ROWS + 5}-{RECORDS * ROWS - 1}"
    with serving(flags):
        say("serving takes up the newest version")
        until(lambda: served_version(settings.serving_dir) == third, "the newest version does not answer")
        until(lambda: ready(settings), "no worker answers")
        store_s, used_s, store = turn(settings, flags, second, rate, "--skip", skip)
    fourth = stocked.publish(second, 2, RECORDS)
    stocked.registry.change(lambda control: follow(control, **WHO))
    with serving(flags, "--serving.keep_s", "1"):
        say("the first version leaves the row store")
        until(lambda: served_version(settings.serving_dir) == fourth, "the newest version does not answer")
        until(lambda: first not in (versions_here(settings) or {first}), "the first version stays")
        until(lambda: ready(settings), "no worker answers")
        disk_s, _, disk = turn(settings, flags, first, rate)
    return {
        "answers turn, out of the row store": Figure(store_s, "s", "<= 1"),
        "answers turn, from disk": Figure(disk_s, "s", "<= 5"),
        "processor time of the command, plan included": Figure(used_s, "cpu-s"),
        "from disk, read": Figure(serving_bytes / 1e6, "MB"),
        "from disk, speed": Figure(serving_bytes / 1e6 / disk_s, "MB/s"),
        "requests": Figure(store.asked + disk.asked, "requests"),
        "requests failed": Figure(sum((store.failed + disk.failed).values()), "requests", "<= 0"),
        "answers of two versions": Figure(store.mixed + disk.mixed, "answers", "<= 0"),
    }


def ready(settings: Settings) -> bool:
    """Whether a worker answers."""
    from deploy.watch.address import serving_address
    from deploy.watch.scrape import fetch

    return fetch(serving_address(settings, "/readyz"))[0] == 200


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=300.0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        broker = Broker(Path(folder) / "kafka", free_port(), heap_mb=384)
        broker.start()
        try:
            flags = [
                *("--paths.state", str(Path(folder) / "state"), "--kafka.bootstrap_servers", broker.bootstrap_servers),
                *(
                    "--serving.port",
                    str(free_port()),
                    "--serving.metrics_port",
                    str(free_port()),
                    "--serving.grpc_port",
                    "0",
                ),
                *("--trainer.metrics_port", str(free_port()), "--serving.workers", str(WORKERS)),
            ]
            Path(folder, "state").mkdir()
            figures = measure(load(flags, {}), flags, wanted.rows, wanted.rate)
        finally:
            broker.stop()
    report("rollback", figures, {"rows": wanted.rows, "requests_per_s": wanted.rate, "workers": WORKERS})


if __name__ == "__main__":
    main()
