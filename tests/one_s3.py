"""An S3 store on this machine: moto's server in a process of its own, which the environment names to every S3 client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from state.process.network import free_port

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0


class S3Server:
    """A server that holds its objects in memory, in its block; it can be stopped and started again, empty, on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._before: dict[str, str | None] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; returns once it answers."""
        command = [sys.executable, "-m", "tests.moto_server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_s = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, f"moto's server ended with {self._process.returncode}"
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                    return
            except OSError:
                assert time.monotonic() < until_s, "moto's server does not answer"
                time.sleep(0.05)

    def stop(self) -> None:
        """Kills it, and with it all that it holds."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Nothing is answered any more, as behind a link that is cut; what it holds stays."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """It answers again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        assert self._process is not None
        return float(sum(psutil.Process(self._process.pid).cpu_times()[:2]))

    def bucket(self, name: str) -> str:
        """Makes a bucket; returns its URL."""
        made = httpx.put(f"{self.environment['AWS_ENDPOINT_URL']}/{name}", timeout=30.0)
        assert made.status_code in (200, 409), made.text
        return f"s3://{name}"

    def __enter__(self) -> S3Server:
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
