"""Configuration of the local Kafka broker."""

from __future__ import annotations

import socket
from pathlib import Path

from state.errors import PortTaken

HOST = "127.0.0.1"
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
