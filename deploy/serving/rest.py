"""A serving worker's process: `python -m deploy.serving.rest [flags]`, HTTP and gRPC on one event loop."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, values

from deploy.serving.answers.explaining import explain
from deploy.serving.answers.host import Answers, Host
from deploy.serving.answers.items import rank, recommend, similar
from deploy.serving.answers.program import BATCHES
from deploy.serving.answers.query import NOBODY, NamedItem, Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.answers.tensor_model import TensorModel
from deploy.serving.requests.access import Access, Tokens, are_wanted, is_loopback, make_missing
from deploy.serving.requests.endpoints import (
    health_endpoints,
    host_endpoints,
    profile_endpoints,
    profile_service,
    segment_endpoints,
)
from deploy.serving.requests.grpc_server import GrpcAddress, GrpcServer, Service
from deploy.serving.requests.http import (
    LAST,
    Endpoint,
    Receive,
    Request,
    Response,
    Routes,
    Scope,
    Send,
    answer,
    encode,
    failure,
    header,
)
from deploy.serving.requests.openapi import document_endpoints
from deploy.serving.requests.rotation import Rotation, States
from deploy.serving.requests.routing import Router, Split
from deploy.serving.requests.server import ConnectionLimits, DrainingServer, listen
from deploy.serving.requests.tensorflow_serving import model_endpoints, model_services
from deploy.serving.requests.worker_metrics import RequestCounts, of_all_workers
from deploy.supervisor import Backoff, how
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SpringtideError, WorkerFailed
from state.events.identity import load_salt
from state.features.spec import KERNELS as FEATURE_KERNELS
from state.kernels import Kernels
from state.layout import WORKER_COUNTERS
from state.metrics import WorkerMetrics, add_process, say_build
from state.process import log_lines
from state.process.environment import freeze_objects, wall_ms
from state.process.part import Work, reported, run_process
from state.registry.hosts import RoutingTable

WAIT_S = 0.1
COUNTERS = "PROMETHEUS_MULTIPROC_DIR"
KINDS = ("counter", "histogram", "gauge_max", "gauge_min")
COUNTER_BYTES = 1 << 20
"""Initial size of a counter file, as prometheus_client creates it; one per kind and worker."""


@dataclass
class Worker:
    """One of the workers.

    Attributes:
        ready: Set once its event loop ran, in its first life or a later one.
        deaths: In a row.
        again_s: When it is started again; None while it runs.
    """

    number: int
    ready: Event
    process: SpawnProcess | None = None
    since_s: float = 0.0
    deaths: Backoff = field(default_factory=Backoff)
    again_s: float | None = 0.0


class Workers:
    """Starts and supervises a host's workers; `run` returns after `stop`.

    `counters` is the directory of their counters, which is emptied. `target` names what a worker's process calls:
    (number, socket, event, states of the rotation, parent's arguments).
    """

    def __init__(
        self, bound: socket.socket, count: int, counters: Path, target: Callable[..., None], arguments: list[str]
    ) -> None:
        self._bound, self._target, self._arguments = bound, target, arguments
        self._context = multiprocessing.get_context("spawn")
        self._stopping = False
        make_counters(counters, count)
        os.environ[COUNTERS] = str(counters.resolve())
        self.workers = [Worker(number, self._context.Event()) for number in range(count)]
        # Without a lock, which a killed worker would keep.
        self._states = self._context.RawArray(ctypes.c_ubyte, count)

    def stop(self, *_: object) -> None:
        """Ends all workers cleanly."""
        self._stopping = True
        for worker in self.workers:
            if worker.process is not None and worker.process.is_alive():
                worker.process.terminate()

    def run(self) -> int:
        """Returns the exit code once all have ended: 1 if a worker never became ready."""
        failed = False
        while not self._stopping:
            # Check every worker, also after one that failed.
            failed = False in {self._check(worker) for worker in self.workers}
            if failed:
                self.stop()
            alive = [worker.process.sentinel for worker in self.workers if worker.process and worker.again_s is None]
            if not self._stopping:
                multiprocessing.connection.wait(alive, WAIT_S) if alive else time.sleep(WAIT_S)
        self.stop()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.join()
        return int(failed)

    def _check(self, worker: Worker) -> bool:
        """Starts a worker, or restarts it when due; false if it never became ready."""
        now_s = time.monotonic()
        if worker.again_s is None:
            process = worker.process
            assert process is not None
            if process.is_alive():
                return True
            process.join()
            Rotation(self._states, worker.number).closed()
            if not worker.ready.is_set():
                return self._stopping
            # A worker that was asked to end did not crash: its successor may start at once.
            worker.deaths = Backoff() if process.exitcode == 0 else worker.deaths.after(now_s - worker.since_s)
            worker.again_s = now_s + worker.deaths.wait_s
            ended = how(process.exitcode or 0)
            _log.warning("serving worker %d ended (%s); %s", worker.number, ended, worker.deaths.as_text())
        if now_s >= worker.again_s:
            arguments = (worker.number, self._bound, worker.ready, self._states, self._arguments)
            worker.process = self._context.Process(target=self._target, args=arguments)
            worker.process.start()
            worker.since_s, worker.again_s = now_s, None
        return True


def make_counters(folder: Path, count: int) -> None:
    """Creates empty counter files for this many workers, at their full size; raises OSError if there is no space.

    Later, a lack of space would end a worker that writes there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        for kind in KINDS:
            with (folder / f"{kind}_{number}.db").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, COUNTER_BYTES)


def end_with_parent() -> None:
    """Makes this process end cleanly when its parent is gone, so that it does not keep the port."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


def count_as(number: int) -> None:
    """Makes this process continue the counters of earlier workers with this number; exemplars are its own."""
    kind = values.MultiProcessValue(process_identifier=lambda: number)
    kind.set_exemplar = lambda value, exemplar: setattr(value, "_exemplar", exemplar)
    kind.get_exemplar = lambda value: getattr(value, "_exemplar", None)
    values.ValueClass = kind


ITEMS = BATCHES[-1] + 1
"""Enough items to need the program for many pairs."""
POLL_S = 0.1
CONNECTIONS = 4096  # of a worker, and of concurrent gRPC calls
OWN_FILES = 256
"""Open files of a worker in addition to its connections."""
UNKNOWN = "unknown"
"""Metrics' label value of a request that matches no endpoint."""
Done = Callable[[Response], None]
_log = logging.getLogger(__name__)


class App:
    """A worker's HTTP API as an ASGI application: routes requests, answers them, reports errors and counts.

    Args:
        shown_metrics: The metrics that /metrics shows; None for `registry`.
        tokens: The tokens that requests need; None if they need none.
        split: Answers a share of the users from a trial; None if this host takes part in no rollout.

    Attributes:
        router: Forwards requests about users that other hosts hold; None if this host is not in the routing table.
    """

    def __init__(
        self,
        host: Host,
        registry: CollectorRegistry,
        shown_metrics: CollectorRegistry | None = None,
        tokens: Tokens | None = None,
        split: Split | None = None,
    ) -> None:
        self.host, self._tokens, self._split = host, tokens, split
        self._draining = False
        self.router: Router | None = None
        self.metrics = WorkerMetrics(registry)
        self.counts = RequestCounts(self.metrics, lambda: host.version)
        self._answers = Answers(host, self.metrics)
        self._model = TensorModel(host.predictor, self._answers.steps, self.metrics)
        self.endpoints: list[Endpoint] = [
            *profile_endpoints(self._answers),
            *health_endpoints(host, shown_metrics or registry, lambda: self.draining),
            *model_endpoints(self._model),
            *segment_endpoints(host),
            *host_endpoints(lambda: RoutingTable() if self.router is None else self.router.table),
        ]
        self.endpoints += document_endpoints(self.endpoints)
        self._routes = Routes(self.endpoints)

    def grpc_services(self) -> list[Service]:
        """Returns the gRPC services, which answer as the endpoints do."""
        return [profile_service(self.endpoints, self.router), *model_services(self._model)]

    @property
    def draining(self) -> bool:
        """Whether the worker is about to end: answers then end their connections. Setting it withdraws the host's entry."""
        return self._draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._draining = draining
        if draining and self.router is not None:
            self.router.leave()

    def ready(self) -> bool:
        """Whether this worker can answer and is not about to end."""
        return not self.draining and not self.host.missing()

    def count_refused(self, reason: str) -> None:
        """Counts a connection or a request that was refused before it was routed."""
        self.metrics.refused.labels(reason).inc()

    def close(self) -> None:
        """Closes the stores; the next request opens them again."""
        self.host.close()
        if self._split is not None:
            self._split.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        response = asyncio.get_running_loop().create_future()
        answering = self.respond(scope, receive, response.set_result)
        if answering is not None:
            await answering
        await answer(send, await response)

    def respond(self, scope: Scope, receive: Receive, done: Done) -> Coroutine[Any, Any, None] | None:
        """Answers one request with minimal overhead: the endpoint of a profile needs no task.

        `done` is called with the response, in a later iteration of the event loop. Returns what is to be awaited, if
        anything.
        """
        began_s, name = self.counts.clock_s(), UNKNOWN
        try:
            endpoint, placeholders = self._routes.find(scope)
            name = endpoint.name
            if self._tokens is not None:
                self._tokens.require(header(scope, b"authorization"), endpoint.role)
            request = Request(scope, receive, placeholders, endpoint)
            if endpoint.soon is None or self._split is not None:
                return self._answer(request, done, began_s)
            if self.router is not None and not self.router.is_here(request):
                return self._answer(request, done, began_s)
            body = endpoint.soon(request)
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
            asyncio.get_running_loop().call_soon(lambda: done(self._counted(name, response, began_s)))
            return None

        def end(answered: asyncio.Future[bytes]) -> None:
            try:
                response = Response(200, answered.result())
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as of `_failure`
                response = self._failure(name, error)
            done(self._counted(name, response, began_s))

        body.add_done_callback(end)
        return None

    async def _answer(self, request: Request, done: Done, began_s: float) -> None:
        name = request.endpoint.name
        answer = request.endpoint.answer if self._split is None else self._split.answer
        try:
            response = await (answer(request) if self.router is None else self.router.answer(request, answer))
        except Exception as error:  # noqa: BLE001 - as of `_failure`
            response = self._failure(name, error)
        done(self._counted(name, response, began_s))

    def _failure(self, name: str, error: BaseException) -> Response:
        """Reports an error. Errors of other types are logged, and further requests are answered."""
        if isinstance(error, SpringtideError):
            return failure(error)
        _log.error("a request for %s failed", name, exc_info=error)
        return failure(WorkerFailed("the worker failed; its log has the cause", "report it with the worker's log"))

    def _counted(self, name: str, response: Response, began_s: float) -> Response:
        self.counts.count(name, response.status, began_s)
        return response._replace(headers=[*response.headers, LAST]) if self.draining else response


class Warming:
    """Prepares a worker: its kernels, then one answer of each kind. Until then the host is not ready.

    `prepared` is called afterwards.
    """

    def __init__(self, host: Host, kernels: Kernels, prepared: Callable[[], object] = lambda: None) -> None:
        self._host, self._kernels, self._prepared = host, kernels, prepared
        host.kernels, host.warm = kernels, False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Prepares the worker while the event loop answers; the kernels are compiled in a thread."""
        # A daemon: a stop does not wait for the compiler.
        threading.Thread(target=self._kernels.prepare, name="kernels", daemon=True).start()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._host.answers():
            await asyncio.sleep(POLL_S)
        for _ in self._steps():
            await asyncio.sleep(0)

    def _steps(self) -> Generator[None]:
        began_s = time.monotonic()
        for compute in one_of_each(self._host):
            try:
                encode(compute())
            except SpringtideError as error:
                _log.info("an answer could not be prepared: %s", error)
            except Exception:  # noqa: BLE001 - clients may ask for others
                _log.exception("an answer could not be prepared")
            yield
        # Modules have 100,000 objects. A full garbage collection that visits them delays all answers by 60 ms.
        freeze_objects()
        self._host.warm = True
        self._prepared()
        _log.info("ready: one answer of each kind prepared in %.1f s", time.monotonic() - began_s)


def one_of_each(host: Host) -> list[Callable[[], Any]]:
    """Returns functions that compute an answer of each kind, about an unknown user; none is counted or kept."""
    everything, lean = Query(NOBODY), Query(NOBODY, fields=frozenset(), top=0)
    items = [NamedItem(str(number)) for number in range(ITEMS)]

    def profiles(count: int) -> Any:
        return host.predictor().profiles([everything] * count)

    return [
        *(lambda count=count: profiles(count) for count in BATCHES),
        lambda: finished(rank(host.predictor(), lean, items, host.impressions)),
        lambda: finished(explain(host.predictor(), everything._replace(item="0"), None)),
        lambda: host.sources().read_more(),
        lambda: finished(recommend(host.predictor(), host.sources(), everything, WantedItems(1))),
        lambda: similar(host.predictor(), host.sources().near, lean, WantedItems(1)),
    ]


def serve(
    settings: Settings,
    bound: socket.socket,
    ready: Callable[[], None] = lambda: None,
    number: int = 0,
    states: States | None = None,
) -> None:
    """Runs one worker until SIGTERM or SIGINT; requests in progress are answered before it returns.

    `ready` is called once its event loop runs. `number` is its index among the workers that answer on the same port,
    and `states` are theirs in the rotation; None: it is the only one. Metrics of several workers add up their counters.
    """
    salt, serving = load_salt(settings.salt_path, create=False), settings.serving
    shared, rotation = states is not None, Rotation(states, number)
    host = Host(settings, salt, now_ms=wall_ms)
    # A client of the port may reach any worker.
    host.others_wait = lambda: not rotation.is_settled
    access = Access.of(settings)
    registry = CollectorRegistry()
    # It logs URLs, which contain user ids.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    split = Split(settings, salt, wall_ms) if settings.rollout.address else None
    app = App(host, registry, of_all_workers(registry) if shared else None, access.tokens, split)
    if shared:
        say_build(registry)
        # Counters continue from those of workers that ended.
        app.metrics.began.set(psutil.Process(os.getppid()).create_time())
    else:
        add_process(registry)
    own_hosts = access.tokens is None and is_loopback(serving.host)
    limits = ConnectionLimits(serving.timeout_s, CONNECTIONS, own_hosts)
    warming = Warming(host, Kernels(registry, _log, uses=[FEATURE_KERNELS]), rotation.prepare)
    if serving.advertise or not host.shares.is_all:
        app.router = Router(settings, salt, host, app.metrics, wall_ms)

    def grpc() -> GrpcServer:
        name = f"[{serving.host}]" if ":" in serving.host else serving.host
        address = GrpcAddress(f"{name}:{serving.grpc_port}", shared, CONNECTIONS)
        counts = RequestCounts(app.metrics, lambda: host.version)
        return GrpcServer(app.grpc_services(), counts, app.ready, access, address)

    def started() -> None:
        warming.start()
        if app.router is not None:
            app.router.start()
        ready()

    # Once, although a worker that is not prepared may accept connections for a while, and again later.
    count_start = functools.cache(app.metrics.worker_starts.inc)
    make_grpc = grpc if serving.grpc_port else None
    server = DrainingServer(app, limits, serving.drain_s, started, count_start, make_grpc, access, rotation)
    server.end_on_signals()
    try:
        server.run(sockets=[bound])
    finally:
        app.close()


def shared_worker(number: int, bound: socket.socket, ready: Event, states: States, argv: list[str]) -> None:
    """Runs one of several workers; it adds the counters of the others to its own."""
    end_with_parent()
    count_as(number)

    def work() -> None:
        settings = load(argv)
        log_lines.follow(settings.logs)
        serve(settings, bound, ready.set, number, states)

    log_lines.begin("worker")
    sys.exit(reported(work, _log))


def allow_connections(wanted: int) -> None:
    """Raises this process's limit of open files to what so many connections need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OWN_FILES:
        most = wanted + OWN_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + OWN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main(argv: list[str] | None = None) -> int:
    """`python -m deploy.serving.rest [flags]`; returns the exit code."""

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        settings = load(words)
        return settings, lambda: _run(settings, list(words))

    return run_process("worker", start, argv, _log)


def _run(settings: Settings, arguments: list[str]) -> int:
    serving = settings.serving
    allow_connections(CONNECTIONS)
    if are_wanted(settings):
        make_missing(settings.tokens_dir)
    bound = listen(serving.host, serving.port)
    if serving.grpc_port:
        # Only checks whether the port is free: grpc binds it.
        listen(serving.host, serving.grpc_port, "serving.grpc_port").close()
    if serving.processes > 1:
        counters = settings.serving_dir / WORKER_COUNTERS
        workers = Workers(bound, serving.processes, counters, shared_worker, arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, workers.stop)
        return workers.run()
    serve(settings, bound)
    return 0


if __name__ == "__main__":
    sys.exit(main())
