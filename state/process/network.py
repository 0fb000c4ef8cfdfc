"""The network as a process uses it: free ports of this machine, ports that are in use, and one HTTP request."""

from __future__ import annotations

import errno
import secrets
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from state.errors import PortTaken

HOST = "127.0.0.1"
FIRST_PORT = 10_000
"""The lowest port that `free_ports` returns."""
APART = 20
"""How far apart the ports of one call are: some settings name a port of which the next ones are used too."""


def free_ports(names: Iterable[str]) -> dict[str, int]:
    """Returns a port for each name, on which no process listens at this moment; they are at least `APART` apart.

    The ports are outside the kernel's range for outgoing connections, one of which could take a port before its server
    listens.
    """
    ports = dict[str, int]()
    for name in names:
        while name not in ports:
            port = FIRST_PORT + secrets.randbelow(_first_outgoing_port() - FIRST_PORT)
            if all(abs(port - other) >= APART for other in ports.values()):
                with suppress(OSError), socket.socket() as probe:  # an error: somebody listens on it
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


def listens(port: int, host: str = HOST, timeout_s: float = 1.0) -> bool:
    """Returns whether a process listens on a port, by default of this machine."""
    with suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False


class Port(NamedTuple):
    """A port that the loop will listen on, and the setting that chooses it."""

    setting: str
    host: str
    port: int


def require_ports(ports: Sequence[Port]) -> None:
    """Checks that no port is in use or named by two settings.

    Raises:
        PortTaken: Names the port, the setting to change and, if known, the process that uses the port.
    """
    owners: dict[int, str] = {}
    for setting, host, port in ports:
        if port == 0:
            raise PortTaken(
                f"{setting} is 0, and the parts find each other by fixed ports", f"set {setting} to a free port"
            )
        if port in owners:
            raise PortTaken(
                f"port {port} is named by {owners[port]} and by {setting}", "set one of them to another port"
            )
        owners[port] = setting
        _require_port(setting, host, port)


def _require_port(setting: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the servers do: a port in TIME_WAIT can be used.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            if problem.errno == errno.EADDRINUSE:
                why, do = f"is in use{_owner(port)}", "stop its owner"
            else:
                why, do = f"cannot be used on {host} ({problem.strerror})", "correct the address"
            raise PortTaken(f"port {port} {why}", f"{do}, or set {setting} to a free port") from None


def _owner(port: int) -> str:
    """Names the process that listens on `port`; empty if the system does not report it."""
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""


def ask(
    request: str | urllib.request.Request, timeout_s: float, context: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """Status and body of a GET, or of the given request; status 0 and the reason if there is no response in time."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode("utf-8", "replace")
    # HTTPException: the process died while it sent the response.
    except (OSError, ValueError, HTTPException) as problem:
        return 0, str(getattr(problem, "reason", problem))
