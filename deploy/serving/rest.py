"""A serving worker's process: `python -m deploy.serving.rest [flags]`, HTTP and gRPC on one event loop.

One process, one thread answers; with `serving.workers` above 1 this process is
the parent of several (`workers.py`).
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Event

import psutil
from prometheus_client import CollectorRegistry

from deploy.serving.edge.access import Access
from deploy.serving.edge.connections import ConnectionLimits
from deploy.serving.edge.listening import listen
from deploy.serving.edge.server import DrainingServer
from deploy.serving.edge.tokens import are_wanted, is_loopback, make_missing
from deploy.serving.exposition import of_all_workers
from deploy.serving.grpc_api.server import GrpcServer
from deploy.serving.host import Host
from deploy.serving.http_api.app import App
from deploy.serving.splitting.split import Split
from deploy.serving.warming import Warming
from deploy.serving.workers import Workers, count_as, end_with_parent
from state.compiled.preparing import Kernels
from state.config.loading import load
from state.config.settings import Settings
from state.events.identity import load_salt
from state.layout import WORKER_COUNTERS
from state.metrics import add_process, say_build
from state.process import log_lines
from state.process.ending import reported
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

_log = logging.getLogger(__name__)

OWN_FILES = 256
"""Open files of a worker that are no connections."""


def serve(
    settings: Settings,
    bound: socket.socket,
    ready: Callable[[], None] = lambda: None,
    beside: bool = False,
) -> None:
    """One worker, until SIGTERM or SIGINT; requests under way are answered before it returns.

    Args:
        settings: Of the whole system.
        bound: What it accepts connections of.
        ready: Called once it does.
        beside: Whether other workers answer on the same port, whose counters its metrics add up.
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
        # Counters go on from those of workers that ended.
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
    try:
        server.run(sockets=[bound])
    finally:
        app.close()


def require_grpc_port(settings: Settings) -> None:
    """Looks whether the port of gRPC can be had, where there is to be one.

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
    """A worker beside others, whose counters it adds to its own."""
    end_with_parent()
    count_as(number)

    def work() -> None:
        settings = load(argv)
        log_lines.follow(settings.logs)
        serve(settings, bound, ready.set, beside=True)

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
    keep_private()
    log_lines.begin("worker")
    return reported(lambda: _run(sys.argv[1:] if argv is None else argv), _log)


def _run(arguments: list[str]) -> int:
    settings = load(arguments)
    log_lines.follow(settings.logs)
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
