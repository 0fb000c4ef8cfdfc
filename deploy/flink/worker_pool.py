"""The pool that starts Python workers for TaskManagers of this machine: `python -m deploy.flink.worker_pool PORT`.

Beam's own pool listens on every network interface, and whoever reaches it makes
it run a worker of his; it looks for `python` in PATH, reads nothing of what a
worker says on its standard output, which blocks once 64 kB are said, and leaves
workers behind when it is killed. This one listens on loopback alone, starts its
own interpreter, keeps one log for all, and the kernel ends its workers with it.

TaskManagers number their workers by themselves, so that two of them on one
machine have workers of one id. A worker whose TaskManager is gone ends by itself.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.utils import thread_pool_executor

from deploy.children.ending import end
from deploy.flink.configuration import HOST
from state.process import log_lines
from state.process.private_files import keep_private

STOP_S = 10.0
# As Beam's own pool has it: the connection of a long job is never cut for too many pings.
OPTIONS = (("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0))


class WorkerWanted(NamedTuple):
    """A worker that a TaskManager waits for.

    Attributes:
        worker: Its id.
        control: The address that it is to connect to.
        done: Set once it was started, or could not be.
        problem: Takes why it could not be.
    """

    worker: str
    control: str
    done: threading.Event
    problem: list[str]


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Starts and stops workers, each a process of its own, as TaskManagers ask in any thread.

    A worker dies with the thread that started it, so that all are started by one that lives as long as the pool: `run`.
    """

    def __init__(self) -> None:
        self._wanted: queue.Queue[WorkerWanted] = queue.Queue()
        self._workers: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: object) -> Any:
        """Starts a worker; returns once it runs."""
        wanted = WorkerWanted(request.worker_id, request.control_endpoint.url, threading.Event(), [])
        self._wanted.put(wanted)
        wanted.done.wait()
        return beam_fn_api_pb2.StartWorkerResponse(error="".join(wanted.problem))

    def StopWorker(self, request: Any, context: object) -> Any:
        """Stops a worker; where several have its id none, for all but one have a TaskManager that lives."""
        running = self._running(request.worker_id)
        if len(running) == 1:
            end(running[0], STOP_S)
        return beam_fn_api_pb2.StopWorkerResponse()

    def run(self) -> None:
        """Starts what is asked for, for ever; for the main thread."""
        while True:
            wanted = self._wanted.get()
            try:
                self._start(wanted)
            except Exception:  # noqa: BLE001 - the TaskManager is told, and says it where its job fails
                wanted.problem.append(traceback.format_exc())
            wanted.done.set()

    def stop(self) -> None:
        """Ends all workers."""
        running = [one for worker in list(self._workers) for one in self._running(worker)]
        for process in running:
            process.terminate()
        for process in running:
            end(process, STOP_S)

    def _start(self, wanted: WorkerWanted) -> None:
        # The worker itself asks the kernel to end it with us: done between fork and exec it would take a fork that runs
        # what gRPC has arranged for forks, while gRPC's threads serve.
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.flink.worker", wanted.control, wanted.worker, str(os.getpid())],
            stdin=subprocess.DEVNULL,
        )
        running = self._running(wanted.worker)
        with self._lock:
            self._workers[wanted.worker] = [*running, process]

    def _running(self, worker: str) -> list[subprocess.Popen[bytes]]:
        """The workers of an id; those that ended are let go."""
        with self._lock:
            self._workers[worker] = [one for one in self._workers.get(worker, ()) if one.poll() is None]
            return list(self._workers[worker])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pool until SIGTERM; returns the exit code."""
    keep_private()
    log_lines.begin("workers")
    (port,) = sys.argv[1:] if argv is None else argv
    server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=OPTIONS)
    pool = WorkerPool()
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"{HOST}:{port}")
    server.start()

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    try:
        pool.run()
    finally:
        server.stop(None)
        pool.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
