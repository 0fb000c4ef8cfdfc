"""Supervises a host's workers on one port: starts them, and restarts one that dies while the others continue.

All workers accept from the parent's socket, so no connection is lost when a worker ends. Each worker's counters are
stored in files, which its successor continues, and each worker's /metrics shows the sum of all workers.

If a worker never accepts a connection, its settings cannot work, and all workers end. They also end when the parent
is killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path

from prometheus_client import values

from deploy.children.ending import Backoff, how

WAIT_S = 0.1
COUNTERS = "PROMETHEUS_MULTIPROC_DIR"
KINDS = ("counter", "histogram", "gauge_max", "gauge_min")
COUNTER_BYTES = 1 << 20
"""Initial size of a counter file, as prometheus_client creates it; one per kind and worker."""
_log = logging.getLogger(__name__)


@dataclass
class Worker:
    """One of the workers.

    Attributes:
        ready: Set once it accepted connections, in its first life or a later one.
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
    (number, socket, event, parent's arguments).
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
            _log.warning("serving worker %d ended (%s); %s", worker.number, ended, worker.deaths.as_text())
        if now_s >= worker.again_s:
            arguments = (worker.number, self._bound, worker.ready, self._arguments)
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
