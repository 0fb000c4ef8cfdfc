"""How many profiles one worker answers, how fast, and how far that is from an empty answer.

A real worker process on real stores: users with full histories, rows of every
user, item and category, a program of the default model. The client is another
process with as many connections as `CONNECTIONS`, each with one request on its
way. The floor is the same server's /healthz in the same run.

    python -m tests.bench.serving [--users 20000] [--seconds 8]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from state.config.settings import Settings
from state.events.identity import load_salt, public_id, user_id
from state.features.spec import EVENT, FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.positions import Source
from state.registry.manifest import LogRange, Manifest
from state.rows.store import RowStore
from tests.bench.report import Figure, report

CONNECTIONS = 32
CATEGORIES = 64
ITEMS = 4000
SOURCE = Source("ab" * 16, 0)


# The client


class Connection(asyncio.Protocol):
    """One connection with one request on its way at any time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._began_s = 0.0
        self._expected = 0
        self._received = 0
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._began_s = time.perf_counter()
        self._received = self._expected = 0
        self._transport.write(self._load.request())

    def data_received(self, data: bytes) -> None:
        if not self._expected:
            assert data.startswith(b"HTTP/1.1 200"), data[:300]
            head = data.index(b"\r\n\r\n") + 4
            at = data.index(b"content-length: ") + 16
            self._expected = head + int(data[at : data.index(b"\r\n", at)])
        self._received += len(data)
        if self._received >= self._expected:
            self._load.took_s.append(time.perf_counter() - self._began_s)
            self._load.body_bytes = self._expected
            if self._load.goes_on():
                self._ask()
            else:
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.left -= 1
        if not self._load.left:
            self._load.done.set_result(None)


class Load:
    """What the connections share."""

    def __init__(self, path: str, users: int, seconds: float) -> None:
        drawn = random.Random(3)
        paths = [path.format(user=drawn.randrange(users)) for _ in range(50_000)] if "{user}" in path else [path]
        self._requests = [f"GET {one} HTTP/1.1\r\nhost: bench\r\n\r\n".encode() for one in paths]
        self._next = 0
        self._until_s = time.perf_counter() + seconds
        self.took_s: list[float] = []
        self.body_bytes = 0
        self.left = CONNECTIONS
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def request(self) -> bytes:
        self._next = (self._next + 1) % len(self._requests)
        return self._requests[self._next]

    def goes_on(self) -> bool:
        return time.perf_counter() < self._until_s


async def client(port: int, path: str, users: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    load = Load(path, users, seconds)
    began_s = time.perf_counter()
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Connection(load), "127.0.0.1", port)
    await load.done
    took_ms = np.array(load.took_s) * 1000
    return {
        "per_s": len(took_ms) / (time.perf_counter() - began_s),
        "p50_ms": float(np.percentile(took_ms, 50)),
        "p99_ms": float(np.percentile(took_ms, 99)),
        "bytes": load.body_bytes,
    }


def measure(port: int, path: str, users: int, seconds: float) -> dict[str, float]:
    """Runs the client in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.serving", "client", str(port), path, str(users), str(seconds)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


# The stores


def fill(settings: Settings, users: int, events: int) -> None:
    """Full histories, rows of everything, one version with a program of the default model."""
    from trainer.model.default_ranker import DefaultRanker
    from trainer.versions.program import build

    spec, folder = FeatureSpec.from_settings(settings), settings.serving_dir
    salt = load_salt(settings.salt_path)
    rng = np.random.default_rng(11)
    now_ms = time.time_ns() // 1_000_000
    categories = np.array([public_id(f"category-{n}") for n in range(CATEGORIES)], np.uint64)
    items = np.array([public_id(f"item-{n}") for n in range(ITEMS)], np.uint64)
    ids = np.array([user_id(salt, f"user-{n}") for n in range(users)], np.uint64)

    histories = HistoryStore(folder / HISTORIES, settings.features.history, settings.serving.map_gb << 30)
    for first in range(0, users, 2000):
        some = ids[first : first + 2000]
        clicks = np.zeros(len(some) * events, EVENT)
        age_ms = rng.exponential(86_400_000, len(clicks)).astype(np.int64)
        clicks["at_ms"] = now_ms - age_ms
        clicks["category"] = categories[rng.zipf(1.3, len(clicks)) % CATEGORIES]
        clicks["item"] = items[rng.integers(0, ITEMS, len(clicks))]
        clicks["action"] = rng.integers(0, 4, len(clicks))
        clicks["topic"] = SOURCE.topic
        histories.commit(Appends.of(np.repeat(some, events), clicks))
    names = {f"name:{identity:016x}": f"category-{n}".encode() for n, identity in enumerate(categories.tolist())}
    clock = {"clock": json.dumps({"event_ms": now_ms, "accepted_ms": now_ms}).encode(), "caught_up": b"1"}
    histories.commit(Appends.none(), (), names | clock)
    histories.close()

    model = DefaultRanker(settings.model, spec)
    program = build(model)
    digest = hashlib.sha256(program).hexdigest()
    (folder / PROGRAMS).mkdir()
    (folder / PROGRAMS / f"{digest}.tflite").write_bytes(program)
    tensors: dict[str, Any] = {f"dense.{name}": value for name, value in model.weights().items()}
    for table, of in (("user", ids), ("item", items), ("category", categories)):
        tensors[f"{table}.ids"] = of
        tensors[f"{table}.rows"] = rng.normal(0, 0.1, (len(of), settings.model.dim)).astype(np.float32)
    tensors["popular"] = categories[: settings.model.popular]
    manifest = Manifest(
        version=1, kind="base", epoch=1, parent=None, visible=((1, 1),), log=LogRange(), sources=((SOURCE, 1),), steps=1,
        rows=1, created_at_ms=now_ms, event_time_ms=now_ms, spec=spec.digest, program=digest, salt=salt.fingerprint,
        mask_generation=0, metrics={}, environment={}, files={},
    )  # fmt: skip
    rows = RowStore(folder / ROWS, settings.serving.map_gb << 30)
    rows.apply(manifest, tensors, now_ms, follow=True)
    rows.close()


@contextmanager
def worker(state: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "SPRINGTIDE_PATHS_STATE": state,
        "SPRINGTIDE_SERVING_PORT": str(port),
        "SPRINGTIDE_SERVING_GRPC_PORT": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "deploy.serving.rest"], env=environment)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
            break
        except urllib.error.URLError:
            assert time.monotonic() < deadline and process.poll() is None, "the worker did not become ready"
            time.sleep(0.05)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Processor time of a process so far."""
    import psutil

    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def main(users: int, events: int, seconds: float, keep: str) -> None:
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        state = keep or folder
        settings = Settings()
        settings = replace(settings, paths=replace(settings.paths, state=state))
        if not settings.serving_dir.exists():
            Path(state).mkdir(exist_ok=True)
            fill(settings, users, events)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        with worker(state, port) as process:
            measure(port, "/v1/profiles/user-{user}", users, 2.0)
            before = measure(port, "/healthz", users, seconds / 2)
            began_cpu_s = cpu_s(process)
            profiles = measure(port, "/v1/profiles/user-{user}", users, seconds)
            used_s = cpu_s(process) - began_cpu_s
            with_item = measure(port, "/v1/profiles/user-{user}?item=item-7&category=category-7", users, seconds / 2)
            cold = measure(port, "/v1/profiles/nobody-{user}", users, seconds / 2)
            after = measure(port, "/healthz", users, seconds / 2)
    floor = max(before["per_s"], after["per_s"])
    report(
        "serving",
        {
            "profile answers": Figure(profiles["per_s"], "answers/s", ">= 3000"),
            "profile p50": Figure(profiles["p50_ms"], "ms"),
            "profile p99": Figure(profiles["p99_ms"], "ms", "<= 10"),
            "profile answers per worker cpu-second": Figure(profiles["per_s"] * seconds / used_s, "answers/cpu-s"),
            "profile answers with an item": Figure(with_item["per_s"], "answers/s"),
            "cold-start answers": Figure(cold["per_s"], "answers/s"),
            "floor: /healthz": Figure(floor, "answers/s"),
            "floor p99": Figure(min(before["p99_ms"], after["p99_ms"]), "ms"),
            "profile / floor": Figure(profiles["per_s"] / floor, "ratio"),
            "size of an answer": Figure(profiles["bytes"], "bytes"),
        },
        {"users": users, "events_per_user": events, "connections": CONNECTIONS, "workers": 1, "seconds": seconds},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        import uvloop

        _, _, port_, path_, users_, seconds_ = sys.argv
        print(json.dumps(uvloop.run(client(int(port_), path_, int(users_), float(seconds_)))))
    else:
        flags = argparse.ArgumentParser(description=__doc__)
        flags.add_argument("--users", type=int, default=20_000)
        flags.add_argument("--events", type=int, default=256, help="events of each user")
        flags.add_argument("--seconds", type=float, default=8.0)
        flags.add_argument("--keep", default="", help="state directory to keep between runs")
        given = flags.parse_args()
        main(given.users, given.events, given.seconds, given.keep)
