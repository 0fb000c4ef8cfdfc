"""A serving worker's process: `python -m deploy.serving.rest [flags]`, HTTP and gRPC on one event loop.

One thread of one process answers. If `serving.workers` is above 1, this process is the parent of
several workers on one port (`Workers`). A worker that dies is started again while the others
continue.

The parent owns the socket, and all workers accept from it. So a new connection goes to a worker
that runs, and none is lost when a worker ends. Counters are stored in files, one set per worker,
which its successor continues. Each worker's /metrics therefore shows the sum of all workers.

If a worker never accepts a connection, its settings cannot work, and all workers end. They also end
when the parent is killed.

Before a worker reports ready, it prepares its kernels and computes one answer of each kind. So the
first client waits no longer than the second.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, values

from deploy.children.ending import Backoff, how
from deploy.serving.answer import FIELDS, Query
from deploy.serving.edge.access import Access
from deploy.serving.edge.connections import ConnectionLimits
from deploy.serving.edge.listening import listen
from deploy.serving.edge.server import DrainingServer
from deploy.serving.edge.tokens import are_wanted, is_loopback, make_missing
from deploy.serving.explaining.explaining import explain
from deploy.serving.exposition import of_all_workers
from deploy.serving.grpc_api.server import GrpcServer
from deploy.serving.host import Host
from deploy.serving.http_api.app import App
from deploy.serving.http_api.endpoints import encode
from deploy.serving.program import BATCHES
from deploy.serving.recommending.ranking import NamedItem, rank
from deploy.serving.recommending.recommending import WantedItems, recommend
from deploy.serving.recommending.similar import NearWanted, similar
from deploy.serving.splitting.split import Split
from state.compiled.preparing import Kernels
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SpringtideError
from state.events.identity import load_salt
from state.layout import WORKER_COUNTERS
from state.metrics import add_process, say_build
from state.process import log_lines
from state.process.ending import reported
from state.process.garbage import keep_what_is_there
from state.process.part import Work, run_process
from state.process.wall_clock import wall_ms

WAIT_S = 0.1
COUNTERS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with prometheus_client's directory of counters."""

KINDS = ("counter", "histogram", "gauge_max", "gauge_min")
COUNTER_BYTES = 1 << 20
"""Initial size of a counter file, as prometheus_client creates it; one per kind and worker."""
USER = "springtide-warm-up"
"""User id of the warm-up answers; no user has it."""
ITEMS = BATCHES[-1] + 1
"""So many items need the program for many pairs."""
POLL_S = 0.1
OWN_FILES = 256
"""Open files of a worker in addition to its connections."""
_log = logging.getLogger(__name__)


@dataclass
class Worker:
    """One of the workers.

    Attributes:
        number: Its own.
        ready: Set once it accepted connections, in its first life or a later one.
        process: Its newest process.
        since_s: When that began.
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

    Args:
        bound: The socket from which all workers accept.
        count: Number of workers.
        counters: Directory of their counters; emptied.
        target: What a worker's process calls, by name: (number, socket, event, parent's arguments).
        arguments: The command-line arguments.
        clock_s: A monotonic clock.
    """

    def __init__(
        self,
        bound: socket.socket,
        count: int,
        counters: Path,
        target: Callable[..., None],
        arguments: list[str],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bound, self._target, self._arguments, self._clock_s = bound, target, arguments, clock_s
        self._context = multiprocessing.get_context("spawn")
        self._stopping = False
        make_counters(counters, count)
        os.environ[COUNTERS] = str(counters.resolve())
        self.workers = [Worker(number, self._context.Event()) for number in range(count)]

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
            failed = False in {self._look_at(worker) for worker in self.workers}
            if failed:
                self.stop()
            alive = [one.process.sentinel for one in self.workers if one.process is not None and one.again_s is None]
            if not self._stopping:
                multiprocessing.connection.wait(alive, WAIT_S) if alive else time.sleep(WAIT_S)
        self.stop()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.join()
        return int(failed)

    def _look_at(self, worker: Worker) -> bool:
        """Starts a worker, or restarts it when that is due; false if it never became ready."""
        now_s = self._clock_s()
        if worker.again_s is None:
            process = worker.process
            assert process is not None
            if process.is_alive():
                return True
            process.join()
            if not worker.ready.is_set():
                return self._stopping
            # A worker that was asked to end did not crash: its successor may start at once.
            worker.deaths = Backoff() if process.exitcode == 0 else worker.deaths.after(now_s - worker.since_s)
            worker.again_s = now_s + worker.deaths.wait_s
            ended = how(process.exitcode or 0)
            _log.warning("serving worker %d ended (%s); %s", worker.number, ended, worker.deaths.told())
        if now_s >= worker.again_s:
            self._start(worker, now_s)
        return True

    def _start(self, worker: Worker, now_s: float) -> None:
        worker.process = self._context.Process(
            target=self._target, args=(worker.number, self._bound, worker.ready, self._arguments)
        )
        worker.process.start()
        worker.since_s, worker.again_s = now_s, None


def make_counters(folder: Path, count: int) -> None:
    """Creates empty counter files for this many workers, at their full size.

    Raises:
        OSError: There is no space. Later that would end a worker that writes there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        for kind in KINDS:
            with (folder / f"{kind}_{number}.db").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, COUNTER_BYTES)


def end_with_parent() -> None:
    """Makes this process end cleanly when its parent is gone; otherwise it would hold the port for ever."""
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


class Warming:
    """Prepares a worker: its kernels, then one answer of each kind.

    Args:
        host: What answers. Until the kernels are ready it answers `NotReady`; until it has computed the answers, it is
            not ready.
        kernels: Of this process.
    """

    def __init__(self, host: Host, kernels: Kernels) -> None:
        self._host, self._kernels = host, kernels
        host.kernels, host.warm = kernels, False
        self._task: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Prepares the worker before it accepts connections, if its host can answer already."""
        self._kernels.prepare()
        if self._is_cold():
            for _ in self._steps():
                pass

    def start(self) -> None:
        """Prepares what is left in the event loop, which answers meanwhile; the kernels are compiled in a thread."""
        if self._host.warm:
            return
        if not self._kernels.done:
            # A daemon: a stop does not wait for the compiler.
            threading.Thread(target=self._kernels.prepare, name="kernels", daemon=True).start()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._is_cold():
            await asyncio.sleep(POLL_S)
        for _ in self._steps():
            await asyncio.sleep(0)

    def _is_cold(self) -> bool:
        return self._kernels.done and self._host.missing() == {"program": Host.COLD}

    def _steps(self) -> Generator[None]:
        began_s = time.monotonic()
        for answer in one_of_each(self._host):
            try:
                answer()
            except SpringtideError as error:
                _log.info("an answer could not be prepared: %s", error)
            except Exception:  # noqa: BLE001 - clients may ask for others
                _log.exception("an answer could not be prepared")
            yield
        # Modules are 100,000 objects. A full collection that visits them stops all answers for 60 ms.
        keep_what_is_there()
        self._host.warm = True
        _log.info("ready: one answer of each kind prepared in %.1f s", time.monotonic() - began_s)


def one_of_each(host: Host) -> list[Callable[[], Any]]:
    """Computes an answer of each kind, about an unknown user; none is counted or kept."""
    everything, lean = Query(USER, fields=FIELDS), Query(USER, fields=frozenset(), top=0)
    items = [NamedItem(str(number)) for number in range(ITEMS)]

    def profiles(count: int) -> Any:
        return [encode(answer.document()) for answer in host.predictor().profiles([everything] * count)]

    return [
        *(lambda count=count: profiles(count) for count in BATCHES),
        lambda: encode(_last(rank(host.predictor(), lean, items, host.impressions))),
        lambda: encode(_last(explain(host.predictor(), everything._replace(item="0"), None))),
        lambda: host.sources().turn(),
        lambda: encode(_last(recommend(host.predictor(), host.sources(), everything, WantedItems(1)))),
        lambda: encode(similar(host.predictor(), host.sources().near, lean, NearWanted(1, False))),
    ]


def _last(steps: Generator[None, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def serve(
    settings: Settings,
    bound: socket.socket,
    ready: Callable[[], None] = lambda: None,
    beside: bool = False,
    again: bool = False,
) -> None:
    """One worker, until SIGTERM or SIGINT; requests under way are answered before it returns.

    Args:
        settings: Of the whole system.
        bound: What it accepts connections of.
        ready: Called once it does.
        beside: Whether other workers answer on the same port, whose counters its metrics add up.
        again: Whether it replaces one. Others answer meanwhile, so it accepts connections once it is prepared.
    """
    salt, serving = load_salt(settings.salt_path, create=False), settings.serving
    host = Host(settings, salt, now_ms=wall_ms)
    access = Access.of(settings)
    registry = CollectorRegistry()
    # It logs addresses, and an address names a user.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    split = Split(settings, salt, wall_ms) if settings.rollout.address else None
    app = App(host, registry, serving, of_all_workers(registry) if beside else None, access.tokens, split=split)
    if beside:
        say_build(registry)
        # Counters continue from those of workers that ended.
        app.metrics.began.set(psutil.Process(os.getppid()).create_time())
    else:
        add_process(registry)
    own_hosts = access.tokens is None and is_loopback(serving.host)
    limits = ConnectionLimits(serving.max_head_bytes, serving.timeout_s, serving.max_connections, own_hosts)
    grpc = (lambda: grpc_server(settings, app, access, beside)) if serving.grpc_port else None

    warming = Warming(host, Kernels(registry, _log))

    def accepts() -> None:
        warming.start()
        app.metrics.worker_starts.inc()
        ready()

    server = DrainingServer(app, limits, serving.drain_s, accepts, grpc, access)
    server.end_on_signals()
    if again:
        warming.prepare()
    try:
        server.run(sockets=[bound])
    finally:
        app.close()


def require_grpc_port(settings: Settings) -> None:
    """Checks whether the gRPC port can be bound, if there is to be one.

    Raises:
        PortTaken: Somebody listens there.
    """
    if settings.serving.grpc_port:
        listen(settings.serving.host, settings.serving.grpc_port, "serving.grpc_port").close()


def grpc_server(settings: Settings, app: App, access: Access, shared: bool) -> GrpcServer:
    """The gRPC server of a worker; made in its event loop."""
    host = f"[{settings.serving.host}]" if ":" in settings.serving.host else settings.serving.host
    address = f"{host}:{settings.serving.grpc_port}"
    most_calls = settings.serving.max_connections
    return GrpcServer(app.host, app.metrics, address, shared, app.limits, app.ready, access, most_calls)


def shared_worker(number: int, bound: socket.socket, ready: Event, argv: list[str]) -> None:
    """One of several workers; it adds the counters of the others to its own."""
    end_with_parent()
    count_as(number)

    def work() -> None:
        settings = load(argv)
        log_lines.follow(settings.logs)
        serve(settings, bound, ready.set, beside=True, again=ready.is_set())

    log_lines.begin("worker")
    sys.exit(reported(work, _log))


def serve_all(settings: Settings, argv: list[str], count: int) -> int:
    """Several workers on one port each for HTTP and gRPC. Returns the exit code.

    Raises:
        PortTaken: Somebody listens on one.
    """
    bound = listen(settings.serving.host, settings.serving.port)
    require_grpc_port(settings)
    workers = Workers(bound, count, settings.serving_dir / WORKER_COUNTERS, shared_worker, argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, workers.stop)
    return workers.run()


def allow_connections(wanted: int) -> None:
    """Raises this process's limit of open files to what so many connections need, as far as the system lets it."""
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
    allow_connections(serving.max_connections)
    if are_wanted(settings):
        for path in make_missing(settings.tokens_dir):
            _log.warning("made a token, which its clients need: %s", path)
    if serving.processes > 1:
        return serve_all(settings, arguments, serving.processes)
    bound = listen(serving.host, serving.port)
    require_grpc_port(settings)
    serve(settings, bound)
    return 0


if __name__ == "__main__":
    sys.exit(main())
