"""The parts of a loop as processes of their own, to be killed and started again one by one."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local_kafka import Broker
from deploy.supervisor import last_line
from state.config.settings import Settings
from state.process import killpoints
from state.process.part import die_with
from tests.e2e.running import ROOT

MODULES: Mapping[str, str] = {
    "stream": "streaming.pipeline",
    "bootstrap": "streaming.bootstrap",
    "trainer": "trainer.loop",
    "compactor": "trainer.compactor",
    "applier": "deploy.serving.applier",
    "worker": "deploy.serving.rest",
    "command": "deploy.cli",
}
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def quiet_ports(count: int, chance: random.Random) -> list[int]:
    """Free ports that no outgoing connection takes while their owner is dead, as those of the ephemeral range are."""
    lowest = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    found: list[int] = []
    while len(found) < count:
        port = chance.randrange(10_000, lowest)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        part: Which one.
        code: Its exit status; -9 for SIGKILL.
        at: The kill point at which it died; empty for none.
        said: The last line of its log.
    """

    part: str
    code: int
    at: str
    said: str

    @property
    def killed(self) -> bool:
        """Whether kill -9 ended it."""
        return self.code == -signal.SIGKILL


class Part:
    """One process, now or never.

    Args:
        start: How it starts: `subprocess.Popen`, or `forked.Popen`, after its imports.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        log: Path,
        kill_at: str = "",
        words: Sequence[str] = (),
        *,
        start: type[subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        self.name, self.kill_at, self.log = name, kill_at, log
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SPRINGTIDE_")}
        environment |= settings.environment() | {"PYTHONUNBUFFERED": "1"}
        if kill_at:
            environment[killpoints.VARIABLE] = kill_at
        log.parent.mkdir(parents=True, exist_ok=True)
        self._begin = log.stat().st_size if log.exists() else 0
        self._shot = False
        self.started_s = time.monotonic()
        with log.open("ab") as output:
            self.process = start(
                [sys.executable, "-m", MODULES[name], *words],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with(os.getpid()),
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def said(self) -> str:
        """What this process, not its predecessors, has logged."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode("utf-8", "replace")

    def end(self) -> End | None:
        """How it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        struck = code == -signal.SIGKILL and not self._shot
        return End(self.name, code, self.kill_at if struck else "", last_line(self.log))

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it as kill -9 does."""
        self._shot = self.process.poll() is None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 60.0) -> int:
        """Asks it to end; returns its exit code."""
        self.process.terminate()
        return self.process.wait(timeout_s)


class Parts:
    """The running parts by name, and a broker that may be away. For one thread."""

    def __init__(self, settings: Settings, names: Sequence[str]) -> None:
        self.settings = settings
        self.names = tuple(names)
        self.running: dict[str, Part] = {}
        kafka = settings.kafka
        self.broker = Broker(settings.kafka_dir, kafka.port, heap_mb=320, retention_h=kafka.retention_h)
        self._back: threading.Thread | None = None

    def start(self, name: str, kill_at: str = "") -> Part:
        made = self.running[name] = Part(name, self.settings, self.settings.logs_dir / f"{name}.log", kill_at)
        return made

    def reap(self) -> list[End]:
        """The parts that have ended since the last call; they do not run any more."""
        ends = [end for part in self.running.values() if (end := part.end()) is not None]
        for end in ends:
            del self.running[end.part]
        return ends

    @property
    def kafka_away(self) -> bool:
        """Whether the broker was killed and does not listen yet."""
        return self._back is not None and self._back.is_alive()

    def kill_kafka(self, away_s: float) -> None:
        """Kills the broker; a thread starts it again after `away_s`."""
        self.broker.kill()

        def bring_back() -> None:
            threading.Event().wait(away_s)
            self.broker.start()

        self._back = threading.Thread(target=bring_back, name="broker")
        self._back.start()

    def await_kafka(self) -> None:
        """Returns when the broker is back."""
        if self._back is not None:
            self._back.join()

    def close(self) -> None:
        """Ends everything at once."""
        for part in self.running.values():
            part.signal(signal.SIGCONT)
            part.kill()
        self.running.clear()
        self.await_kafka()
        self.broker.stop()
