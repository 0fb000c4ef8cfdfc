"""Configuration and ports of the local Kafka broker."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

from state.errors import PortTaken

HOST = "127.0.0.1"
FIRST_PORT = 10_000
"""The lowest port that `free_ports` returns."""

_HERE = Path(__file__).parent


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


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """Returns a distinct port for each name, on which no process listens at this moment.

    The ports are outside the kernel's range for outgoing connections, one of which could take a port before its server
    listens.
    """
    ports = {}
    with ExitStack() as sockets:
        for name in names:
            probe = sockets.enter_context(socket.socket())
            while name not in ports:
                port = FIRST_PORT + secrets.randbelow(_first_outgoing_port() - FIRST_PORT)
                with suppress(OSError):  # somebody listens on it
                    probe.bind((HOST, port))
                    ports[name] = port
    return ports


@cache
def _first_outgoing_port() -> int:
    try:
        return max(20_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32_768


def free_port() -> int:
    """Returns a port on which no process listens at this moment."""
    return free_ports(["port"])["port"]


def require_free(port: int) -> None:
    """Checks that no process listens on a port.

    Raises:
        PortTaken: The port is in use; the message names the setting.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as problem:
            raise PortTaken(
                f"port {port} (setting kafka.port) cannot be used: {problem.strerror}",
                "stop the process that listens there, or set kafka.port to a free port",
            ) from problem


def listens(port: int) -> bool:
    """Returns whether a process listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0
