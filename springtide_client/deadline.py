"""The deadline of a synchronous call: its connection reads and writes only until then.

httpx limits each single read and write. A server that sends one byte at a time
is within such a limit for ever. Here every read and write gets the time that is
left of the call. `AsyncClient` needs none of this: a task can be cancelled.
"""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

_WRITTEN_BYTES = 1 << 16
"""Written at once; the time that is left is looked up before each."""


class Deadline(threading.local):
    """When the call of this thread ends, by `time.monotonic`.

    Attributes:
        at_s: As given by the call.
    """

    at_s = math.inf

    def left_s(self) -> float:
        """The seconds that are left, more than 0.

        Raises:
            httpcore.ReadTimeout: None are left.
        """
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("the deadline of the call is over")
        return left_s

    def hold(self, client: httpx.Client) -> None:
        """Makes each connection that this client opens keep the deadline; transports that are not httpx's own do not.

        httpx offers no way to give a network backend to the transports that it
        makes for an address and for the proxies of the environment.
        """
        for transport in (client._transport, *client._mounts.values()):
            if isinstance(transport, httpx.HTTPTransport):
                transport._pool._network_backend = _Backend(self)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline, self._inner = deadline, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        options = list(socket_options or ())
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        try:
            addresses = dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        for address in addresses:
            try:
                stream = self._inner.connect_tcp(address, port, self._deadline.left_s(), local_address, options)
                return _Stream(stream, self._deadline)
            except httpcore.ConnectError as error:
                failure = error
        raise failure


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for first in range(0, len(buffer), _WRITTEN_BYTES):
            self._inner.write(buffer[first : first + _WRITTEN_BYTES], self._deadline.left_s())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(
            self._inner.start_tls(ssl_context, server_hostname, self._deadline.left_s()),
            self._deadline,
        )

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
