"""What the whole loop can take: a backlog, the highest rate at which it keeps up, and freshness at half of that.

    python -m tests.bench.limits [--old CHECKOUT] [--backlog N] [--users N] [--hold-s S] [--from-rate R] [--bursts N]

With a checkout of another release, both are measured on brokers of their own
with the same clicks. A loop is what `springtide up` runs, with its own Kafka
outside: the backlog is written while the loop is down.

A rate is held if the clicks that no answer has learned stay as many: from the
second quarter of `--hold-s` to the last one they grow by less than 2 % of the
clicks written meanwhile. The next rate is a sixteenth higher; at the end,
steps of 3 and 1.5 % find the limit more exactly. Both loops run, and are
offered each rate in turn, twice if need be, because the speed of a machine
changes within minutes. The one that waits takes some 6 % of two cores.
Freshness is from the acknowledgement of a burst to the first answer by weights
that learned it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from deploy.local_kafka import Broker
from state.config.sections import Kafka
from state.log import Topics, Writer, partition_of
from state.log.bulk import BulkWriter
from state.process.environment import wall_ms
from state.process.network import HOST, free_port, free_ports
from tests.bench.report import Figure, Stages, report
from tests.bench.stream import CHUNK, PACE_S, PARTITIONS, Clicks
from tests.e2e.running import PORTS, ROOT
from tests.reading import append_encoded

OLD_PORTS = ("serving.port", "stream.metrics_port", "trainer.metrics_port", "serving.metrics_port")
"""Ports of 0.1.0."""
FIRST = 20_000
"""Clicks that are there at the first start, for the base."""
STEP = 1.0625
FINER = (STEP**0.5, STEP**0.25)
"""The steps that are tried at the end, from the highest rate that was held."""
GROWTH = 0.02
START_S, CATCH_UP_S, PATIENCE_S = 300.0, 900.0, 30.0
BURST_CLICKS = 3
LOG_LINES = 40
POLL_S = 0.005
APART_S = 0.2
"""The most time between two bursts. It is drawn: bursts right after an answer would always meet the loop in the same phase."""

progress = Stages("limits")


class Measured:
    """The loop of one checkout, beside a broker.

    Args:
        name: In the figures.
        checkout: Of a release.
        folder: For its state.
        users: Who click.
    """

    def __init__(self, name: str, checkout: Path, folder: Path, users: int) -> None:
        self.name, self.checkout, self.folder = name, checkout, folder
        folder.mkdir()
        self.broker = Broker(folder / "kafka", free_port(), heap_mb=512)
        self.broker.start()
        self.kafka = Kafka(bootstrap_servers=self.broker.bootstrap_servers, clicks_partitions=PARTITIONS)
        self.clicks = Clicks(users)
        with Topics(self.kafka) as topics:
            topics.ensure(self.kafka.clicks_topic, PARTITIONS)
            self._id = topics.describe(self.kafka.clicks_topic).topic_id
        # 0.1.0 names the sources in every answer.
        self.fields = "?fields=sources" if checkout == ROOT else ""
        self.ports = free_ports(PORTS if checkout == ROOT else OLD_PORTS)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The loop, while it is open."""
        flags: dict[str, object] = {
            **self.ports, "kafka.bootstrap_servers": self.kafka.bootstrap_servers, "paths.state": self.folder / "state",
            "shoppers.rate": 1, "bootstrap.min_rows": 2000,
        }  # fmt: skip
        if self.checkout == ROOT:
            flags["console.port"] = 0
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.up", *words],
                cwd=self.checkout, env=dict(os.environ), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(240)

    @contextmanager
    def started(self) -> Iterator[None]:
        """The loop, while it is open, once it has learned some clicks: serving answers long before the trainer is ready."""
        with self.running():
            self.write(FIRST)
            self.wait_for(self.ends(), START_S)
            yield

    def write(self, count: int) -> None:
        """Writes clicks of now as fast as it goes."""
        with BulkWriter(self.kafka, self.kafka.clicks_topic) as writer:
            for _ in range(0, count, CHUNK):
                append_encoded(writer, *self.clicks.take(CHUNK, wall_ms()))

    def ends(self) -> dict[int, int]:
        """The end of each partition of the clicks."""
        with Topics(self.kafka) as topics:
            return {number: end for number, (_, end) in topics.ends(self.kafka.clicks_topic).items()}

    def learned(self) -> dict[int, int]:
        """Position of each partition before which an answer of now has learned everything; empty where none answers."""
        with suppress(OSError, http.client.HTTPException):
            worker = http.client.HTTPConnection(HOST, self.ports["serving.port"], timeout=PATIENCE_S)
            worker.request("GET", f"/v1/profiles/nobody{self.fields}")
            answer: dict[str, Any] = json.loads(worker.getresponse().read())
            worker.close()
            sources = answer["version"]["sources"] if "version" in answer else {}
            return {number: sources.get(f"{self._id}:{number}", 0) for number in range(PARTITIONS)}
        return {}

    def behind(self, ends: dict[int, int]) -> int:
        """Clicks before `ends` that no answer has learned; -1 where none answers."""
        learned = self.learned()
        return sum(max(0, end - learned[number]) for number, end in ends.items()) if learned else -1

    def wait_for(self, ends: dict[int, int], patience_s: float) -> None:
        """Returns once an answer has learned everything before `ends`."""
        deadline_s = time.monotonic() + patience_s
        while behind := self.behind(ends):
            progress.say(f"{self.name}: catching up", f"{behind:,} clicks behind")
            if time.monotonic() > deadline_s:
                # Its folder is removed at the end.
                log = "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise SystemExit(
                    f"{self.name}: {behind:,} clicks behind after {patience_s:.0f} s; its log ends:\n{log}"
                )
            threading.Event().wait(0.1)

    def backlog(self, count: int) -> tuple[float, float]:
        """Writes a backlog while the loop is down; returns seconds from the start to the first and to fresh answers."""
        self.write(count)
        begin_s, ends = time.monotonic(), self.ends()
        with self.running():
            while self.behind(ends) < 0:
                threading.Event().wait(0.1)
            first_s = time.monotonic() - begin_s
            self.wait_for(ends, CATCH_UP_S)
            return first_s, time.monotonic() - begin_s

    @contextmanager
    def offered(self, rate: float) -> Iterator[None]:
        """Writes `rate` clicks a second while it is open."""
        over = threading.Event()

        def write() -> None:
            begin_s, sent = time.monotonic(), 0
            with BulkWriter(self.kafka, self.kafka.clicks_topic) as writer:
                while not over.wait(PACE_S):
                    if (count := int((time.monotonic() - begin_s) * rate) - sent) > 0:
                        append_encoded(writer, *self.clicks.take(count, wall_ms()))
                        sent += count

        writing = threading.Thread(target=write)
        writing.start()
        try:
            yield
        finally:
            over.set()
            writing.join()

    def holds(self, rate: float, hold_s: float) -> bool:
        """Whether answers keep up with `rate` clicks a second."""
        with self.offered(rate):
            early, late = list[int](), list[int]()
            begin_s = time.monotonic()
            while (passed_s := time.monotonic() - begin_s) < hold_s:
                progress.say(f"{self.name}: {rate:,.0f} clicks/s", f"{passed_s:.0f} of {hold_s:.0f} s")
                threading.Event().wait(0.5)
                if passed_s > 0.25 * hold_s:
                    (early if passed_s < 0.5 * hold_s else late).append(self.behind(self.ends()))
            begin, end = np.median(early), np.median(late[len(late) // 2 :])
        progress.say(f"{self.name}: {rate:,.0f} clicks/s: {begin:,.0f}, later {end:,.0f} clicks behind")
        self.wait_for(self.ends(), CATCH_UP_S)
        return bool(end - begin < GROWTH * rate * hold_s / 2)


def highest(loops: Sequence[Measured], rate: float, hold_s: float) -> dict[str, float]:
    """The highest rate that each of the running loops holds, by name: tried from `rate` upwards, else downwards."""
    held: dict[str, float] = {}
    going, offered = list(loops), rate
    while going:
        going = [loop for loop in going if loop.holds(offered, hold_s) or loop.holds(offered, hold_s)]
        held |= {loop.name: offered for loop in going}
        offered *= STEP
    for loop in loops:
        offered = rate
        while loop.name not in held:
            offered /= STEP
            if loop.holds(offered, hold_s):
                held[loop.name] = offered
    for step in FINER:
        for loop in loops:
            if loop.holds(held[loop.name] * step, hold_s):
                held[loop.name] *= step
    return held


def freshness(kafka: Kafka, host: str, port: int, bursts: int, fields: str = "?fields=sources") -> list[float]:
    """Seconds from acknowledged to answered by a version trained on it, one for each burst.

    Args:
        kafka: Of the clicks.
        host: Of a worker.
        port: Its port.
        bursts: How many, of `BURST_CLICKS` clicks each.
        fields: What makes an answer name its sources; a query.

    Raises:
        RuntimeError: No answer had learned a burst after `PATIENCE_S`.
    """
    worker = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    measured, pauses = [], random.Random(0)
    with Topics(kafka) as topics, Writer(kafka) as writer:
        about = topics.describe(kafka.clicks_topic)
        for number in range(bursts):
            progress.say("weight freshness", f"burst {number} of {bursts}")
            time.sleep(pauses.uniform(0.0, APART_S))
            user = f"bench-shopper-{number % 50}"
            click = {"user": user, "item": f"item-{number}", "category": f"category-{number % 64}", "action": "view"}
            for _ in range(BURST_CLICKS):
                value = json.dumps(click | {"time": wall_ms()}).encode()
                writer.send(kafka.clicks_topic, None, user.encode(), value)
            writer.flush()
            acknowledged_s = time.monotonic()
            partition = partition_of(user.encode(), about.partitions)
            # Others write too: the end is at or after the burst, never before it.
            end = topics.ends(kafka.clicks_topic)[partition][1]
            source = f"{about.topic_id}:{partition}"
            while True:
                worker.request("GET", f"/v1/profiles/{user}{fields}")
                answer = json.loads(worker.getresponse().read())
                if answer["version"]["sources"].get(source, 0) >= end:
                    break
                if time.monotonic() - acknowledged_s > PATIENCE_S:
                    raise RuntimeError(f"burst {number}: no version covers {source} to {end}")
                time.sleep(POLL_S)
            measured.append(time.monotonic() - acknowledged_s)
    worker.close()
    return measured


def main() -> None:
    """Runs the benchmark."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--old", type=Path, help="a checkout of another release")
    flags.add_argument("--backlog", type=int, default=1_000_000)
    flags.add_argument("--users", type=int, default=20_000)
    flags.add_argument("--hold-s", type=float, default=300.0)
    flags.add_argument("--from-rate", type=float, default=8000.0, help="the first rate, clicks/s")
    flags.add_argument("--bursts", type=int, default=200)
    given = flags.parse_args()
    checkouts = {"this release": ROOT} | ({"old": given.old.absolute()} if given.old else {})
    figures: dict[str, Figure] = {}
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="springtide-limits-"))
        loops = []
        for place, (name, checkout) in enumerate(checkouts.items()):
            loop = Measured(name, checkout, Path(folder, str(place)), given.users)
            stack.callback(loop.broker.stop)
            with loop.started():
                pass
            first_s, fresh_s = loop.backlog(given.backlog)
            found[name] = {"first answer after a start": first_s, "backlog to fresh answers": fresh_s}
            loops.append(loop)
        with ExitStack() as running:
            for loop in loops:
                running.enter_context(loop.started())
            for name, rate in highest(loops, given.from_rate, given.hold_s).items():
                found[name]["highest rate"] = rate
        for loop in loops:
            one = found[loop.name]
            with loop.started(), loop.offered(one["highest rate"] / 2):
                threading.Event().wait(10.0)
                waits_s = freshness(loop.kafka, HOST, loop.ports["serving.port"], given.bursts, loop.fields)
            p50, p99 = np.percentile(waits_s, [50, 99])
            one["freshness at half of it, p50"] = 1000 * float(p50)
            one["freshness at half of it, p99"] = 1000 * float(p99)
    goals = {"freshness at half of it, p50": "<= 150", "freshness at half of it, p99": "<= 400"}
    for name, one in found.items():
        for what, value in one.items():
            unit = "clicks/s" if what == "highest rate" else "ms" if what in goals else "s"
            figures[f"{name}: {what}"] = Figure(value, unit, goals.get(what, "") if name == "this release" else "")
    if given.old:
        new, old = found["this release"], found["old"]
        figures["highest rate, ratio"] = Figure(new["highest rate"] / old["highest rate"], "ratio", ">= 1.3")
        ratio = old["backlog to fresh answers"] / new["backlog to fresh answers"]
        figures["backlog caught up, ratio of speeds"] = Figure(ratio, "ratio", ">= 1.3")
    report("limits", figures, {"backlog": given.backlog, "held for s": given.hold_s})


if __name__ == "__main__":
    main()
