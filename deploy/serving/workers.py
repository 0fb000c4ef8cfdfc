"""Several workers on one port, and what becomes of one that dies: it is started again, and the others go on.

The socket is this process's, and all workers accept from it: a connection goes
to one that is there, and none is lost with one that ends. Counters lie in
files, one set a worker, which its successor takes up, so that each worker's
/metrics are the sum of all of them.

A worker that never accepted a connection has been told something impossible:
then all end. So they do when this process is killed.
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

from deploy.children.backoff import Backoff
from deploy.children.last_words import how

_log = logging.getLogger(__name__)

WAIT_S = 0.1
COUNTERS = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that tells prometheus_client where the counters lie."""

KINDS = ("counter", "histogram", "gauge_max", "gauge_min")
COUNTER_BYTES = 1 << 20
"""Of one kind and worker, as prometheus_client begins them."""


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
    """The workers of a host. `run` until `stop`.

    Args:
        bound: What all of them accept connections of.
        count: How many there are.
        counters: Directory of their counters; emptied.
        target: What a worker's process calls, by name: (number, socket, event, parent's arguments).
        arguments: Of the command line.
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
        """Ends all of them in order."""
        self._stopping = True
        for worker in self.workers:
            if worker.process is not None and worker.process.is_alive():
                worker.process.terminate()

    def run(self) -> int:
        """Returns the exit code once all have ended: 1 where one of them never came up."""
        failed = False
        while not self._stopping:
            # Each of them is looked at, also behind one that failed.
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
        """Starts a worker, or starts it again when it is time; false where it never came up."""
        now_s = self._clock_s()
        if worker.again_s is None:
            process = worker.process
            assert process is not None
            if process.is_alive():
                return True
            process.join()
            if not worker.ready.is_set():
                return self._stopping
            # One that was told to end did not die: its successor may come at once.
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
    """Makes the files of the counters of so many workers, empty, with all the room that they will take.

    Raises:
        OSError: There is no room. Later it would end a worker that writes there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        for kind in KINDS:
            with (folder / f"{kind}_{number}.db").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, COUNTER_BYTES)


def end_with_parent() -> None:
    """Makes this process end in order when its parent is gone, which could not end it: it would hold the port for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


def count_as(number: int) -> None:
    """Lets this process's counters go on from those of the workers of this number before it; it keeps its own exemplars."""
    kind = values.MultiProcessValue(process_identifier=lambda: number)
    kind.set_exemplar = lambda value, exemplar: setattr(value, "_exemplar", exemplar)
    kind.get_exemplar = lambda value: getattr(value, "_exemplar", None)
    values.ValueClass = kind
