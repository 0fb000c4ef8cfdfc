"""A serving worker's process: `python -m deploy.serving.rest [flags]`, HTTP by uvicorn and gRPC on one event loop.

One process, one thread answers; with `serving.workers` above 1 several
processes share the ports, and their parent ends with any of them.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import threading
import time

from prometheus_client import CollectorRegistry

from deploy.serving.edge.connections import ConnectionLimits
from deploy.serving.edge.server import DrainingServer
from deploy.serving.grpc_api.server import GrpcServer
from deploy.serving.host import Host
from deploy.serving.http_api.app import App
from state.config.loading import load
from state.config.settings import Settings
from state.errors import PortTaken, SpringtideError, of_disk
from state.events.identity import load_salt
from state.process.private_files import keep_private

OWN_FILES = 256
"""Open files of a worker that are no connections."""


def listen(host: str, port: int, shared: bool, setting: str = "serving.port") -> socket.socket:
    """A bound socket; `shared` lets other workers bind the same port, which `setting` chose.

    Raises:
        PortTaken: Somebody listens there.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(f"port {port} of {host} is in use", f"stop its owner or set {setting}") from None
    return bound


def serve(settings: Settings, shared: bool = False) -> None:
    """One worker, until SIGTERM or SIGINT; requests under way are answered before it returns.

    Raises:
        PortTaken: A port is in use.
    """
    salt = load_salt(settings.salt_path, create=False)
    bound = listen(settings.serving.host, settings.serving.port, shared)
    require_grpc_port(settings, shared)
    host = Host(settings, salt, now_ms=lambda: time.time_ns() // 1_000_000)
    app, serving = App(host, CollectorRegistry(), settings.serving), settings.serving
    limits = ConnectionLimits(serving.max_head_bytes, serving.timeout_s, serving.max_connections)
    grpc = (lambda: grpc_server(settings, app, shared)) if serving.grpc_port else None
    server = DrainingServer(app, limits, serving.drain_s, grpc)
    server.end_on_signals()
    try:
        server.run(sockets=[bound])
    finally:
        app.close()


def require_grpc_port(settings: Settings, shared: bool) -> None:
    """Looks whether the port of gRPC can be had, where there is to be one.

    Raises:
        PortTaken: Somebody listens there.
    """
    if settings.serving.grpc_port:
        listen(settings.serving.host, settings.serving.grpc_port, shared, "serving.grpc_port").close()


def grpc_server(settings: Settings, app: App, shared: bool) -> GrpcServer:
    """The gRPC server of a worker; made in its event loop."""
    host = f"[{settings.serving.host}]" if ":" in settings.serving.host else settings.serving.host
    address = f"{host}:{settings.serving.grpc_port}"
    return GrpcServer(app.host, app.metrics, address, shared, app.limits, app.ready)


def allow_connections(wanted: int) -> None:
    """Raises this process's limit of open files to what so many connections need, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OWN_FILES:
        most = wanted + OWN_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + OWN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _shared_worker(argv: list[str]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    # A parent that was killed cannot end its workers, which would hold the port for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(load(argv), shared=True)


def serve_all(settings: Settings, argv: list[str]) -> int:
    """Several workers on one port each for HTTP and gRPC; when one dies, all end. Returns the exit code."""
    listen(settings.serving.host, settings.serving.port, shared=False).close()
    require_grpc_port(settings, shared=False)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_shared_worker, args=(argv,)) for _ in range(settings.serving.workers)]
    for worker in workers:
        worker.start()
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    orderly = stopping
    stop()
    for worker in workers:
        worker.join()
    return 0 if orderly else 1


def main(argv: list[str] | None = None) -> int:
    """`python -m deploy.serving.rest [flags]`; returns the exit code."""
    keep_private()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings = load(arguments)
        allow_connections(settings.serving.max_connections)
        if settings.serving.workers > 1:
            return serve_all(settings, arguments)
        serve(settings)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        print(f"serving worker: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
