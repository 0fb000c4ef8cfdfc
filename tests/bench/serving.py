"""How many profiles one worker answers, how fast, while versions arrive too, and how far that is from an empty answer.

A real worker process on real stores: users with histories of the length of
Taobao's, a million rows of users, lists of what came next, a program of the
default model. The client is another process. The floor is the same server's
/healthz in the same run; the peer is a plain FastAPI server around the same
model as a SavedModel, which looks nothing up.

    python -m tests.bench.serving [--users 20000] [--rows 1000000] [--seconds 8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from state.config.settings import Settings
from state.layout import ROWS
from state.process.environment import wall_ms
from state.process.network import free_port
from state.registry.manifest import Manifest
from state.rows.store import RowStore
from tests.bench.answers.asking import Load, Taken, measure
from tests.bench.answers.bare import bare
from tests.bench.answers.peer import export, peer
from tests.bench.answers.stores import SOURCE, Ids, fill, worker
from tests.bench.report import Figure, Stages, report

TAOBAO_EVENTS = 104  # the mean of 84,475 clicks of 815 users
PROFILE = "/v1/profiles/user-{user}"
TOGETHER = 100
HALF = 0.5  # of what a closed loop gets: the rate of an open one
A_FIFTH = 0.2  # likewise, where an applier needs its part of two cores too
APPLIED = 10_000
APPLY_EVERY_S = 0.2
COMPUTES = """
import sys, time
while True:
    end = time.perf_counter() + float(sys.argv[1])
    while time.perf_counter() < end: pass
    time.sleep(float(sys.argv[2]))
"""

progress = Stages("serving")


@dataclass(frozen=True)
class Host:
    """What is measured.

    Attributes:
        port: Of the worker.
        process: It.
        users: Who have histories.
        seconds: How long each figure is measured.
    """

    port: int
    process: subprocess.Popen[bytes]
    users: int
    seconds: float

    def ask(self, stage: str, path: str, part: float = 1.0, **other: Any) -> Taken:
        """Asks for a part of the time; in one run after another, for there are two cores."""
        progress.say(stage)
        return measure(Load(self.port, path, self.users, self.seconds * part, **other))

    def cpu_s(self) -> float:
        """Processor time of the worker so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def per_cpu_s(self, stage: str) -> float:
        """Profiles per processor second of the process, in a closed loop."""
        began_s = self.cpu_s()
        answers = self.ask(stage, PROFILE, HALF).per_s * self.seconds * HALF
        return answers / (self.cpu_s() - began_s)


class Applying:
    """Applies versions of `APPLIED` rows each, `1 / APPLY_EVERY_S` a second, while it is open; as the applier does.

    Args:
        settings: With the state directory.
        ids: Of the rows.
        base: The version that is there.
        dim: Of the rows.
    """

    def __init__(self, settings: Settings, ids: Ids, base: Manifest, dim: int) -> None:
        self._store = RowStore(settings.serving_dir / ROWS)
        self._rng, self._base, self._dim = np.random.default_rng(5), base, dim
        self._users = np.concatenate([ids.users, ids.others])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="applying")
        self.took_s: list[float] = []
        self.used_s: list[float] = []

    def __enter__(self) -> Applying:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._store.close()

    def _run(self) -> None:
        version = self._base.version
        while not self._over.wait(APPLY_EVERY_S):
            version += 1
            ids = np.unique(self._rng.choice(self._users, APPLIED))
            rows = self._rng.normal(0, 0.1, (len(ids), self._dim)).astype(np.float32)
            manifest = replace(
                self._base, version=version, kind="delta", parent=version - 1, visible=((1, version),),
                sources=((SOURCE, version),),
            )  # fmt: skip
            began_s, before_s = time.perf_counter(), time.thread_time()
            self._store.apply(manifest, {"user.ids": ids, "user.rows": rows}, wall_ms(), follow=True)
            self.took_s.append((time.perf_counter() - began_s) * APPLIED / len(ids))
            self.used_s.append((time.thread_time() - before_s) * APPLIED / len(ids))


@contextmanager
def computing(seconds: float) -> Iterator[None]:
    """In the block, another process computes for `seconds` and then sleeps for `APPLY_EVERY_S`, again and again.

    It touches nothing of the host. What it costs answers is the wait for a core.
    """
    with subprocess.Popen([sys.executable, "-c", COMPUTES, str(seconds), str(APPLY_EVERY_S)]) as process:
        try:
            yield
        finally:
            process.kill()


def main(users: int, events: int, rows: int, seconds: float) -> None:
    """Measures and reports."""
    settings = Settings()
    # In memory, where the applier has them.
    with tempfile.TemporaryDirectory(prefix="springtide-bench-", dir=settings.storage.memory_dir) as folder:
        settings = replace(settings, paths=replace(settings.paths, state=folder))
        progress.say("filling the stores")
        ids, base, model = fill(settings, users, events, rows)
        export(Path(folder, "peer"), model)
        port = free_port()
        progress.say("starting")
        with worker(folder, port) as (process, ready_s):
            host = Host(port, process, users, seconds)
            figures = measured(host, settings, ids, base)
        with bare(port) as process:
            least = Host(port, process, users, seconds)
            figures["bare ASGI answers per cpu-second"] = Figure(least.per_cpu_s("a bare answer"), "answers/cpu-s")
        with peer(Path(folder, "peer"), port) as process:
            theirs = Host(port, process, users, seconds)
            theirs.ask("warm up the peer", PROFILE, 0.25)
            plain = theirs.ask("the peer, closed loop", PROFILE, 0.5)
    figures["peer: FastAPI with a SavedModel"] = Figure(plain.per_s, "answers/s")
    figures["peer p99"] = Figure(plain.p99_ms, "ms")
    figures["profile / peer"] = Figure(figures["profile answers"].value / plain.per_s, "ratio", ">= 5")
    figures["start to ready"] = Figure(ready_s, "s", "<= 2")
    conditions = {
        "users": users,
        "events_per_user": events,
        "rows": rows,
        "connections": Load.connections,
        "workers": 1,
    }
    report("serving", figures, {**conditions, "seconds": seconds})


def measured(host: Host, settings: Settings, ids: Ids, base: Manifest) -> dict[str, Figure]:
    """The figures of one worker."""
    host.ask("warm up", PROFILE, 0.25)
    before = host.ask("floor", "/healthz", 0.5)
    began_s = host.cpu_s()
    profiles = host.ask("profiles, closed loop", PROFILE)
    used_s = host.cpu_s() - began_s
    everything = host.ask("profiles with all fields", f"{PROFILE}?fields=features,vector,attributes", 0.5)
    with_item = host.ask("profiles with an item", f"{PROFILE}?item=item-7&category=category-7", 0.5)
    cold = host.ask("cold starts", "/v1/profiles/nobody-{user}", 0.5)
    recommended = host.ask("recommendations", "/v1/recommendations/user-{user}", 0.5, connections=1)
    batch = host.ask("batches", "/v1/profiles:batch", 0.5, connections=1, together=TOGETHER)
    after = host.ask("floor", "/healthz", 0.5)
    loaded = host.ask("profiles, open loop", PROFILE, rate=HALF * profiles.per_s)
    rate = A_FIFTH * profiles.per_s
    steady = host.ask("profiles, a fifth of it", PROFILE, rate=rate)
    with Applying(settings, ids, base, settings.model.dim) as applying:
        under = host.ask("profiles, a fifth of it, while versions arrive", PROFILE, rate=rate)
    apply_s = float(np.median(applying.used_s))
    with computing(apply_s):
        contended = host.ask("profiles, a fifth of it, while another process computes", PROFILE, rate=rate)
    again = host.ask("profiles, a fifth of it again", PROFILE, rate=rate)
    floor = max(before.per_s, after.per_s)
    calm_ms = (steady.p99_ms + again.p99_ms) / 2
    return {
        "profile answers": Figure(profiles.per_s, "answers/s", ">= 10000"),
        "profile p50": Figure(profiles.p50_ms, "ms"),
        "profile p99": Figure(profiles.p99_ms, "ms", "<= 5"),
        "profile answers per worker cpu-second": Figure(profiles.per_s * host.seconds / used_s, "answers/cpu-s"),
        "profile p99, open loop at half that rate": Figure(loaded.p99_ms, "ms", "<= 5"),
        "profile p99, open loop at a fifth": Figure(calm_ms, "ms", "<= 5"),
        "the same while versions arrive / without": Figure(under.p99_ms / calm_ms, "ratio", "<= 1.2"),
        "the same while another process computes as long / without": Figure(contended.p99_ms / calm_ms, "ratio"),
        f"{APPLIED:,} rows applied, median": Figure(1000 * float(np.median(applying.took_s)), "ms", "<= 50"),
        "processor time of that": Figure(1000 * apply_s, "ms"),
        "profile answers with all fields": Figure(everything.per_s, "answers/s"),
        "profile answers with an item": Figure(with_item.per_s, "answers/s"),
        "cold-start answers": Figure(cold.per_s, "answers/s"),
        f"{TOGETHER} users in a call, p99": Figure(batch.p99_ms, "ms", "<= 20"),
        f"users in calls of {TOGETHER}": Figure(TOGETHER * batch.per_s, "answers/s"),
        "recommendations": Figure(recommended.per_s, "answers/s"),
        "recommendations p99, one connection": Figure(recommended.p99_ms, "ms"),
        "floor: /healthz": Figure(floor, "answers/s"),
        "floor p99": Figure(min(before.p99_ms, after.p99_ms), "ms"),
        "profile / floor": Figure(profiles.per_s / floor, "ratio"),
        "size of an answer": Figure(profiles.bytes, "bytes"),
        "size of one with all fields": Figure(everything.bytes, "bytes"),
    }


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--users", type=int, default=20_000)
    flags.add_argument("--events", type=int, default=TAOBAO_EVENTS, help="of each user")
    flags.add_argument("--rows", type=int, default=1_000_000, help="of users")
    flags.add_argument("--seconds", type=float, default=8.0)
    given = flags.parse_args()
    main(given.users, given.events, given.rows, given.seconds)
