"""One real Kafka for all test processes: the first that asks has it started, and the process that leads them keeps it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, NamedTuple

from deploy.local_kafka import Broker
from state.process.network import free_port


class Running(NamedTuple):
    """Where the broker is."""

    bootstrap_servers: str
    port: int
    directory: Path
    log_path: Path


def broker_like(running: Running, directory: Path, **options: Any) -> Broker:
    """A broker of a test's own, not started; its storage is formatted as that of a running one, which saves a Java process."""
    data, first = directory / "data", Path("__cluster_metadata-0", "00000000000000000000-0000000000.checkpoint")
    (data / first).parent.mkdir(parents=True)
    for name in ("meta.properties", first):
        shutil.copy(running.directory / "data" / name, data / name)
    return Broker(directory, free_port(), heap_mb=256, **options)


class OneKafka:
    """A broker that is started when first asked for, in this process or by `ask` in another.

    Attributes:
        address: What `ask` takes; of this machine only.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="springtide-tests-kafka-"))
        self._listener = Listener(str(self._directory / "asked"), "AF_UNIX")
        self._broker: Broker | None = None
        self._starting = threading.Lock()
        self.address = str(self._listener.address)
        threading.Thread(target=self._answer, name="one-kafka", daemon=True).start()

    def running(self) -> Running:
        with self._starting:
            if self._broker is None:
                # Tests write records of 1970 too: a retention of a week would delete them within the minute.
                self._broker = Broker(self._directory, free_port(), heap_mb=384, retention_h=876_000).start()
        broker = self._broker
        return Running(broker.bootstrap_servers, broker.port, broker.directory, broker.log_path)

    def stop(self) -> None:
        """Ends the broker and removes all it wrote."""
        if self._broker is not None:
            self._broker.kill()
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _answer(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # closed by `stop`
                return
            with connection:
                try:
                    connection.send(self.running())
                except Exception as problem:  # noqa: BLE001 - raised again in the process that asked
                    connection.send(problem)


def ask(address: str) -> Running:
    """The broker of the process that leads, running."""
    with Client(address, "AF_UNIX") as connection:
        answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Running)
    return answer
