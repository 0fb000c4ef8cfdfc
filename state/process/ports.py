"""Ports of this machine: free ones, and whether a process listens on one."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

HOST = "127.0.0.1"
FIRST_PORT = 10_000
"""The lowest port that `free_ports` returns."""


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


def listens(port: int) -> bool:
    """Returns whether a process listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0
