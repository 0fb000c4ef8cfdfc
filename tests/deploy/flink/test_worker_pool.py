"""The pool as a process of its own, as one's own cluster starts it: workers come and go as TaskManagers ask, and end with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc

from deploy.flink.worker_pool import HOST, WORKER
from deploy.supervisor import end, has_ended
from state.process.network import free_port, listens
from state.process.part import die_with
from tests.e2e.running import ROOT, until


@dataclass
class Pool:
    """A running pool, and where its workers are to connect to: a port that takes connections and says nothing."""

    process: subprocess.Popen[bytes]
    port: int
    control: str
    log: Path

    def start(self, worker: str) -> str:
        """Asks for a worker as a TaskManager does; returns why there is none."""
        asked = beam_fn_api_pb2.StartWorkerRequest(worker_id=worker)
        asked.control_endpoint.url = self.control
        with grpc.insecure_channel(f"{HOST}:{self.port}") as channel:
            stub = beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)
            return str(stub.StartWorker(asked, timeout=60).error)

    def stop(self, worker: str) -> None:
        """Asks for its end."""
        with grpc.insecure_channel(f"{HOST}:{self.port}") as channel:
            stub = beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)
            stub.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id=worker), timeout=60)

    def workers(self) -> dict[str, psutil.Process]:
        """Those that run, by id."""
        children = [one for one in psutil.Process(self.process.pid).children() if not has_ended(one)]
        lines = {one: one.cmdline() for one in children}
        return {line[-1]: one for one, line in lines.items() if WORKER in line}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool that was started alone: nothing in its environment speaks of gRPC."""
    port, log = free_port(), tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    with socket.socket() as control, log.open("wb") as output:
        control.bind((HOST, 0))
        control.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.flink.worker_pool", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid()),
        )
        try:
            until(lambda: listens(port), lambda: f"the pool does not listen:\n{log.read_text()}")
            yield Pool(process, port, f"{HOST}:{control.getsockname()[1]}", log)
        finally:
            process.kill()
            process.wait()


def test_many_task_managers_ask_at_once_and_each_worker_runs_until_it_is_to_stop(pool: Pool) -> None:
    ids = [f"{number}-1" for number in range(6)]
    with ThreadPoolExecutor(len(ids)) as task_managers:
        assert list(task_managers.map(pool.start, ids)) == [""] * len(ids)
    assert sorted(pool.workers()) == ids, pool.log.read_text()
    pool.stop(ids[0])
    assert sorted(pool.workers()) == ids[1:]
    # Two of one id belong to two TaskManagers: nobody knows whose is to stop.
    assert pool.start(ids[1]) == ""
    pool.stop(ids[1])
    assert sorted(pool.workers()) == ids[1:]
    running = list(pool.workers().values())
    end(pool.process, 60.0)
    assert pool.process.returncode == 0, pool.log.read_text()
    assert all(map(has_ended, running))


def test_workers_end_with_a_pool_that_is_killed(pool: Pool) -> None:
    for worker in ("1-1", "1-2"):
        assert pool.start(worker) == ""
    running = list(pool.workers().values())
    assert len(running) == 2, pool.log.read_text()
    os.kill(pool.process.pid, signal.SIGKILL)
    until(lambda: all(map(has_ended, running)), "workers live on without their pool")
