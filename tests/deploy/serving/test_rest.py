"""Workers: real processes that answer, are replaced, and end in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from deploy.serving.answers.host import Host
from deploy.serving.requests.server import ConnectionLimits, DrainingServer
from deploy.serving.rest import COUNTER_BYTES, KINDS, App, make_counters
from deploy.watch import scrape
from state.events.identity import Salt
from state.layout import PROGRAMS
from state.process.network import free_port
from tests import forked
from tests.deploy.serving.stocked import NOW_MS, SALT_KEY, Stores, digest_of, manifest, tensors


@contextmanager
def worker(
    stores: Stores,
    port: int,
    workers: int = 1,
    grpc_port: int = 0,
    popen: Callable[..., subprocess.Popen[str]] = forked.Popen,
    **more: str,
) -> Iterator[subprocess.Popen[str]]:
    given = {
        "port": str(port), "workers": str(workers), "grpc_port": str(grpc_port), "drain_s": "0",
        # A machine that has other things to do is no reason to refuse an answer; what is has tests of its own.
        "max_queue_ms": "60000",
    } | more  # fmt: skip
    environment = os.environ | {f"SPRINGTIDE_SERVING_{name.upper()}": value for name, value in given.items()}
    environment["SPRINGTIDE_PATHS_STATE"] = stores.settings.paths.state
    process = popen(
        [sys.executable, "-m", "deploy.serving.rest"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def answers(port: int, path: str) -> bool:
    """Whether a worker answers with 200; without httpx, of which each client reads all trusted certificates."""
    return scrape.fetch(f"http://127.0.0.1:{port}{path}", timeout_s=30.0)[0] == 200


def test_a_worker_answers_and_ends_in_order(stores: Stores) -> None:
    """It reads what this process writes, refuses a taken port with one line, and SIGTERM ends it with 0."""
    port = free_port()
    with worker(stores, port) as process:
        until(lambda: answers(port, "/readyz"))
        assert answers(port, "/v1/profiles/ann")
        foreign = httpx.get(f"http://127.0.0.1:{port}/v1/profiles/ann", headers={"host": "evil.example"}, timeout=30.0)
        assert foreign.status_code == 403
        program = digest_of(stores.lowered)
        stores.rows.apply(
            manifest(2, program, parent=1), tensors(stores.lowered, 2, {"user": ["ann"]}, []), NOW_MS, follow=True
        )

        def is_followed() -> bool:
            _, answer = scrape.fetch(f"http://127.0.0.1:{port}/v1/profiles/ann", timeout_s=30.0)
            return bool(json.loads(answer)["version"]["number"] == 2)

        until(is_followed)
        with worker(stores, port) as second:
            _, log = second.communicate(timeout=60)
        assert second.returncode == 1 and len(log.splitlines()) == 1 and f"port {port}" in log
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log


def test_a_signal_before_the_server_runs_still_ends_it(stores: Stores) -> None:
    """A parent that is killed while its worker starts must not leave the worker behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    app = App(Host(stores.settings, Salt(SALT_KEY), now_ms=lambda: NOW_MS), CollectorRegistry())
    server = DrainingServer(app, ConnectionLimits(10.0, 10), drain_s=0.0)
    try:
        server.end_on_signals()
        signal.raise_signal(signal.SIGTERM)
        assert server.should_exit
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_says_that_it_ends_before_it_does(stores: Stores) -> None:
    """/readyz turns 503, connections are still accepted, each answer is its connection's last; SIGINT ends that too."""
    port = free_port()
    with worker(stores, port, drain_s="60") as process:
        until(lambda: answers(port, "/readyz"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            assert "connection" not in client.get("/v1/profiles/ann").headers
            process.send_signal(signal.SIGTERM)
            until(lambda: not answers(port, "/readyz"))
            last = client.get("/v1/profiles/ann")
            assert (last.status_code, last.headers["connection"]) == (200, "close")
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60.0)
            assert ready.status_code == 503 and ready.json()["error"] == "this worker is about to end"
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log


def test_workers_do_not_outlive_their_parent(stores: Stores) -> None:
    port = free_port()
    with worker(stores, port, workers=2) as process:
        until(lambda: answers(port, "/healthz"))
        process.kill()
        until(lambda: not answers(port, "/healthz"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_without_salt_says_so(stores: Stores, workers: int) -> None:
    """It does not make one: with another salt nobody would be known; and none is started for ever."""
    stores.settings.salt_path.unlink()
    with worker(stores, free_port(), workers) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1 and "there is no salt" in log


PROFILES = 'springtide_requests_total{code="200",route="profile"}'
OTHERS = 20
STARTS = "springtide_worker_starts_total"


def counted(port: int, series: str) -> float:
    """A value of /metrics, whichever worker answers."""
    status, text = scrape.fetch(f"http://127.0.0.1:{port}/metrics", timeout_s=30.0)
    assert status == 200, text
    return sum(float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(series + " "))


def openmetrics(port: int) -> dict[str, Metric]:
    """The same in OpenMetrics, by name."""
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    asked = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=accept, timeout=30.0, verify=False)
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    return {one.name: one for one in text_string_to_metric_families(asked.text)}


def require_exemplars(port: int, answered: int) -> None:
    """The sums hold for those who accept OpenMetrics; exemplars are of the worker that is asked, if it has answered."""

    def times() -> list[Sample]:
        found: list[Sample] = openmetrics(port)["springtide_request_seconds"].samples
        return [one for one in found if one.labels.get("route") == "profile"]

    assert [one.value for one in times() if one.name.endswith("_count")] == [answered]
    named: list[Sample] = []

    def are_named() -> bool:
        named[:] = [one for one in times() if one.exemplar]
        return bool(named)

    until(are_named)
    assert {one.exemplar.labels["version"] for one in named if one.exemplar} == {"1"}
    assert all(one.exemplar.value <= float(one.labels["le"]) for one in named if one.exemplar)
    families = openmetrics(port)
    assert [one.value for one in families["springtide_build_info"].samples] == [1.0]
    assert [one.value > 0.0 for one in families["process_cpu_seconds"].samples] == [True]


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers of a parent; beside them is Python's own tracker of resources."""
    found = psutil.Process(process.pid).children()
    return [one for one in found if "spawn_main" in " ".join(one.cmdline())]


class Fire:
    """Clients that ask a hundred times a second, each on a connection that it keeps, until the block ends."""

    def __init__(self, port: int, clients: int = 3) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/profiles/ann"
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        self._lock = threading.Lock()
        self.answered, self.failures = 0, list[str]()

    def _ask(self) -> None:
        with httpx.Client(timeout=60.0, verify=False) as client:
            while not self._over.wait(0.01):
                try:
                    response = client.get(self._url)
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                    continue
                if response.status_code != 200:
                    self.failures.append(response.text)
                with self._lock:
                    self.answered += 1

    def __enter__(self) -> Fire:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_a_worker_that_ends_or_is_killed_is_replaced_and_the_other_goes_on(stores: Stores) -> None:
    """Real processes on one socket: an end in order under fire costs no request, a kill costs no worker but its own."""
    port = free_port()
    with worker(stores, port, workers=2, drain_s="3") as process:
        until(lambda: answers(port, "/readyz"))
        until(lambda: counted(port, STARTS) == 2)
        # 1. One drains under fire, and its successor takes up its connections and counters.
        with Fire(port) as fire:
            until(lambda: fire.answered > 20)
            first, second = children(process)
            first.terminate()
            until(lambda: not first.is_running() and counted(port, STARTS) == 3)
            # It accepts connections once it is prepared: no client meets a worker that is not ready.
            assert all(answers(port, "/v1/profiles/ann") for _ in range(OTHERS))
            after = fire.answered
            until(lambda: fire.answered > after + 50)
        assert fire.failures == []
        # An answer is counted after it was sent.
        until(lambda: counted(port, PROFILES) == fire.answered + OTHERS)
        # Each worker says the same, and nothing that the first one counted is lost.
        assert {counted(port, PROFILES) for _ in range(8)} == {fire.answered + OTHERS}
        require_exemplars(port, fire.answered + OTHERS)
        # 2. One is killed.
        second.kill()
        until(lambda: not second.is_running())
        assert all(answers(port, "/v1/profiles/ann") for _ in range(8))
        until(lambda: counted(port, STARTS) == 4)
        assert process.poll() is None and len(children(process)) == 2
        # 3. All end.
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and log.count("starting it again") == 2, log


def test_a_slow_worker_refuses_no_request_that_another_one_answers(stores: Stores) -> None:
    """Nor does it delay readiness: until it is prepared it accepts no connection, over HTTP or gRPC."""
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 2, grpc_port) as process:
        until(lambda: len(children(process)) == 2)
        slow = children(process)[1]
        # It still imports its modules. From here on it is as slow as a compiler may be.
        slow.suspend()
        until(lambda: answers(port, "/readyz"))
        slow.resume()
        statuses, over = Counter[object](), threading.Event()

        def ask() -> None:
            while not over.is_set():
                statuses.update(
                    scrape.fetch(f"http://127.0.0.1:{port}{path}")[0] for path in ("/readyz", "/v1/profiles/ann")
                )
                # Each channel without those that other channels share is a connection of its own.
                options = [("grpc.use_local_subchannel_pool", 1)]
                with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options=options) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    statuses[stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status] += 1

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: counted(port, STARTS) == 2)
            before = statuses.total()
            until(lambda: statuses.total() > before + 3 * OTHERS)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert statuses.keys() == {200, health_pb2.HealthCheckResponse.SERVING}


def test_workers_that_wait_for_a_version_answer_health_checks_and_none_refuses_once_one_is_ready(
    stores: Stores,
) -> None:
    port = free_port()
    program = stores.settings.serving_dir / PROGRAMS / f"{digest_of(stores.lowered)}.tflite"
    away = program.rename(program.with_name("away"))
    with worker(stores, port, workers=2):
        until(lambda: counted(port, STARTS) == 2 if answers(port, "/healthz") else False)
        until(lambda: "compiling" not in scrape.fetch(f"http://127.0.0.1:{port}/readyz")[1])
        assert all(answers(port, "/healthz") and not answers(port, "/readyz") for _ in range(OTHERS))
        assert scrape.fetch(f"http://127.0.0.1:{port}/v1/profiles/ann")[0] == 503
        away.rename(program)
        until(lambda: answers(port, "/readyz"))
        assert all(answers(port, "/readyz") and answers(port, "/v1/profiles/ann") for _ in range(3 * OTHERS))


@pytest.mark.parametrize("count", [1, 3])
def test_the_room_of_counters_is_there_before_a_worker_is(tmp_path: Path, count: int) -> None:
    """A page that a full disk cannot give would end who writes to it; what an earlier run counted is gone."""
    (tmp_path / "counters").mkdir()
    (tmp_path / "counters" / "counter_7.db").write_bytes(b"old")
    make_counters(tmp_path / "counters", count)
    files = list((tmp_path / "counters").iterdir())
    assert len(files) == len(KINDS) * count
    assert all(one.stat().st_blocks * 512 >= COUNTER_BYTES for one in files)
