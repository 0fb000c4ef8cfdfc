"""Binds a socket to the port of a setting."""

from __future__ import annotations

import errno
import socket

from state.errors import PortTaken


def listen(host: str, port: int, setting: str = "serving.port") -> socket.socket:
    """Binds a socket to a port; `setting` names the setting to change if the port is in use.

    Raises:
        PortTaken: The port is in use.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(f"port {port} of {host} is in use", f"stop its owner or set {setting}") from None
    return bound
