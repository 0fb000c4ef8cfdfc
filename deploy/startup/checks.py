"""Checks before the loop starts: Python, disk and ports; each failure is one clear error.

This file imports nothing that needs a supported Python, so that an older Python reports an error and not a traceback.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from state.errors import PortTaken, SettingsError, StoreFull, UnusableDisk

PYTHONS = ((3, 11), (3, 12))
LEAST_FREE_BYTES = 256 * 2**20


class Port(NamedTuple):
    """A port that the loop will listen on, and the setting that chooses it."""

    setting: str
    host: str
    port: int


def require_python(version: Sequence[object]) -> None:
    """Checks that Python is one for which all pinned packages exist.

    Args:
        version: Major and minor number first, such as `sys.version_info`.

    Raises:
        SettingsError: The version is another one.

    >>> require_python((3, 11, 7))
    """
    if tuple(version[:2]) not in PYTHONS:
        own, *wanted = (".".join(map(str, numbers[:2])) for numbers in (version, *PYTHONS))
        do = f"install Python {' or '.join(wanted)} and run `make clean run`"
        raise SettingsError(f"Python {own} is not supported", do)


def require_directory(directory: Path) -> None:
    """Checks that the state directory exists or can be created, and can be written.

    Raises:
        UnusableDisk: The directory cannot be used; the message says why.
    """
    do = "choose another directory with --state or paths.state"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UnusableDisk(f"the state directory {directory} is a file", do) from None
    except OSError as problem:
        raise UnusableDisk(f"the state directory {directory} cannot be made ({problem.strerror})", do) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UnusableDisk(f"the state directory {directory} cannot be written", f"correct its access rights, or {do}")


def require_disk(directory: Path, least_bytes: int = LEAST_FREE_BYTES) -> int:
    """Returns the free bytes of the disk where `directory` is or will be.

    Raises:
        StoreFull: Fewer than `least_bytes` are free.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if _can_be_seen(path))
    free = shutil.disk_usage(existing).free
    if free < least_bytes:
        raise StoreFull(
            f"{directory}: {free / 2**30:.2f} GiB free and {least_bytes / 2**30:.2f} GiB needed",
            "free some space, or set paths.state to a larger disk",
        )
    return free


def _can_be_seen(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


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
