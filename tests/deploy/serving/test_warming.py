"""A worker is ready once its kernels are compiled and one answer of each kind was computed; it answers health checks meanwhile."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.answers.host import Host
from deploy.serving.host_files import CLICKS, VERSIONS
from deploy.serving.requests.rotation import Rotation
from deploy.serving.rest import Warming
from deploy.watch.scrape import Scrape, parsed
from state.errors import NotReady
from state.events.identity import Salt
from state.kernels import Kernels
from state.process.network import free_port
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores
from tests.deploy.serving.test_rest import answers, until, worker

FIRST_ANSWERS = """
import asyncio, logging, sys
from prometheus_client import CollectorRegistry
from deploy.serving.answers.host import Host
from deploy.serving.rest import App
from deploy.serving.rest import Warming
from state.compiled import FIRST_CALLS
from state.kernels import Kernels
from state.config.loading import load
from state.events.identity import load_salt
from state.process.environment import wall_ms

PATHS = (
    "/v1/profiles/ann", "/v1/recommendations/ann", "/v1/similar/ann", "/v1/profiles/ann/explain?item=i1",
)
BODIES = {
    "/v1/rank": b'{"user_id": "ann", "items": ["i1", "i2"]}',
    "/v1/profiles:batch": b'{"users": ["ann", "bob", "cid", "dan", "eve"]}',
}

def scope_of(method, path):
    path, _, query = path.partition("?")
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": [(b"content-type", b"application/json")],
    }

async def run():
    settings = load([])
    host = Host(settings, load_salt(settings.salt_path, create=False), wall_ms)
    app = App(host, CollectorRegistry())
    warming = Warming(host, Kernels(CollectorRegistry(), logging.getLogger(), uses=["state.features.kernel"]))
    warming.start()
    while host.missing():
        await asyncio.sleep(0.02)
    before = set(sys.modules)
    statuses = set()
    for method, path, body in [("GET", p, b"") for p in PATHS] + [("POST", p, b) for p, b in BODIES.items()]:
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}
        async def send(message):
            if "status" in message:
                statuses.add((path, message["status"]))
        await app(scope_of(method, path), receive, send)
    print(sorted(statuses))
    print("late", FIRST_CALLS, sorted(set(sys.modules) - before))

asyncio.run(run())
"""


def test_the_first_answer_of_each_kind_compiles_and_imports_nothing(stores: Stores) -> None:
    stores.close()
    environment = os.environ | {"SPRINGTIDE_PATHS_STATE": str(stores.settings.paths.state)}
    done = subprocess.run([sys.executable, "-c", FIRST_ANSWERS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses, late = done.stdout.splitlines()
    assert statuses.count(", 200)") == 6, statuses
    assert late == "late [] []"


@pytest.mark.nightly
def test_a_worker_with_an_empty_kernel_cache_answers_health_checks_and_is_not_ready(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    port = free_port()
    # Not forked: Numba reads the variable when it is imported.
    with worker(stores, port, popen=subprocess.Popen):
        until(lambda: answers(port, "/healthz"))
        url, waited_s, compiling = f"http://127.0.0.1:{port}", [], 0
        while (ready := httpx.get(f"{url}/readyz", timeout=60.0)).status_code != 200:
            if "compiling kernels" in ready.json()["error"]:
                compiling += 1
                began_s = time.monotonic()
                refused = httpx.get(f"{url}/v1/profiles/ann", timeout=60.0)
                waited_s.append(time.monotonic() - began_s)
                # The last kernel may have been ready in between.
                assert refused.status_code in (503, 200)
                gauges = Scrape(parsed(httpx.get(f"{url}/metrics", timeout=60.0).text))
                assert (gauges.value("springtide_kernels_total") or 0) > 1
            time.sleep(0.05)
        assert compiling
        # The event loop goes on: the compiler takes several seconds, and an answer waits for none of them.
        assert sorted(waited_s)[len(waited_s) // 2] < 1.0
        gauges = Scrape(parsed(httpx.get(f"{url}/metrics", timeout=60.0).text))
        assert gauges.value("springtide_kernels_ready") == gauges.value("springtide_kernels_total")
        assert answers(port, "/v1/profiles/ann")


def test_questions_wait_for_no_compiler(stores: Stores) -> None:
    stores.close()
    host = Host(stores.settings, Salt(SALT_KEY), now_ms=lambda: NOW_MS)
    kernels = Kernels(CollectorRegistry(), logging.getLogger())
    warming = Warming(host, kernels)
    assert host.missing() == {"program": kernels.progress}
    with pytest.raises(NotReady, match="compiling kernels, 0 of"):
        host.predictor()

    async def warmed() -> None:
        warming.start()
        while host.missing():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(warmed(), 120.0))
    host.close()


def test_a_worker_is_ready_once_no_other_one_accepts_connections_unprepared(stores: Stores) -> None:
    stores.close()
    host, states = Host(stores.settings, Salt(SALT_KEY), now_ms=lambda: NOW_MS), (ctypes.c_ubyte * 2)()
    first, second = Rotation(states, 0), Rotation(states, 1)
    host.others_wait = lambda: not first.is_settled
    for rotation in (first, second):
        assert rotation.open()
    prepare(host, first.prepare)
    assert host.missing() == {"program": Host.OTHERS}
    assert first.accepts and not second.accepts
    second.closed()
    assert host.missing() == {}
    assert not second.open() and first.is_settled
    # Where the prepared one dies, somebody has to answer health checks.
    first.closed()
    assert second.accepts
    host.close()


def test_a_worker_whose_host_is_behind_is_prepared_for_what_it_can_answer(stores: Stores) -> None:
    """Else a worker that is replaced during an outage would stay out of rotation until its end."""
    stores.close()
    settings = replace(stores.settings, serving=replace(stores.settings.serving, max_age_s=30.0))
    host, rotation = Host(settings, Salt(SALT_KEY), now_ms=lambda: NOW_MS), Rotation()
    prepare(host, rotation.prepare)
    assert host.warm and host.missing().keys() == {VERSIONS, CLICKS}
    host.close()


def prepare(host: Host, prepared: Callable[[], object]) -> None:
    async def run() -> None:
        Warming(host, Kernels(CollectorRegistry(), logging.getLogger()), prepared).start()
        while not host.warm:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 120.0))
