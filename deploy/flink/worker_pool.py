"""Starts Python workers for the TaskManagers of this machine: `python -m deploy.flink.worker_pool PORT`.

Unlike Beam's own pool it listens on loopback only, starts its own interpreter, and has one log for all workers. Workers
(`python -m deploy.flink.worker_pool worker CONTROL_ENDPOINT WORKER_ID`) end with the pool: each reads its standard
input, which closes when the pool ends.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.utils import thread_pool_executor

from deploy.supervisor import end
from state.process import log_lines
from state.process.private_files import keep_private

HOST = "127.0.0.1"
STOP_S = 10.0
WORKER = "worker"
# As in Beam's own pool, so that gRPC never closes the connection of a long job for too many pings.
OPTIONS = (("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0))


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Starts and stops workers, each in its own process; TaskManagers call it from any thread."""

    def __init__(self) -> None:
        self._workers: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: object) -> Any:
        """Starts a worker."""
        module = "deploy.flink.worker_pool"
        command = [sys.executable, "-m", module, WORKER, request.control_endpoint.url, request.worker_id]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
        except OSError as problem:
            return beam_fn_api_pb2.StartWorkerResponse(error=f"a Python worker was not started: {problem}")
        with self._lock:
            self._workers[request.worker_id] = [*self._running(request.worker_id), process]
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: object) -> Any:
        """Stops a worker. If several have its id, it stops none; a worker ends by itself with its TaskManager."""
        with self._lock:
            running = self._running(request.worker_id)
        if len(running) == 1:
            end(running[0], STOP_S)
        return beam_fn_api_pb2.StopWorkerResponse()

    def stop(self) -> None:
        """Ends all workers."""
        with self._lock:
            running = [process for worker in self._workers for process in self._running(worker)]
        for process in running:
            process.terminate()
        for process in running:
            end(process, STOP_S)

    def _running(self, worker: str) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._workers.get(worker, ()) if process.poll() is None]


def _run_pool(port: str) -> None:
    log_lines.begin("workers")
    server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=OPTIONS)
    pool, stopped = WorkerPool(), threading.Event()
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    server.add_insecure_port(f"{HOST}:{port}")
    server.start()
    stopped.wait()
    server.stop(None)
    pool.stop()


def _run_worker(control: str, worker: str) -> None:
    from apache_beam.runners.worker.sdk_worker import SdkHarness

    threading.Thread(target=_end_with_pool, daemon=True).start()
    log_lines.begin("worker")
    # The job's own steps report their errors.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit

    # SystemExit closes what the steps of a job left open, as after a closed connection.
    signal.signal(signal.SIGTERM, stop)
    # No state cache, as in Beam's own pool: steps cache what they read where that is safe.
    try:
        SdkHarness(control, worker_id=worker, state_cache_size=0, data_buffer_time_limit_ms=-1).run()
    except grpc.RpcError as closed:
        # Every job ends with this error, and so does every TaskManager that dies.
        logging.getLogger(__name__).info("the connection to %s is closed (%s)", control, closed.code().name)


def _end_with_pool() -> None:
    # Not `sys.stdin`: its lock would be held when Python exits.
    while os.read(0, 1):
        pass
    os._exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pool, or one of its workers; returns the exit code."""
    keep_private()
    words = sys.argv[1:] if argv is None else argv
    if words[0] == WORKER:
        _run_worker(*words[1:])
    else:
        _run_pool(*words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
