"""The synchronous client, for programs without an event loop.

`Deadline` bounds a whole call. httpx limits each single read and write, so a server that sends one byte at a time
never reaches such a limit. Here every read and write gets only the time that is left of the call. `AsyncClient`
needs none of this, because a task can be cancelled.
"""

from __future__ import annotations

import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpcore
import httpx

from springtide_client import questions
from springtide_client.answers import Explanation, Profile, Ranking, Readiness, Recommendations, SimilarItems
from springtide_client.errors import Unreachable
from springtide_client.questions import READY, Item, Question, User
from springtide_client.retrying import AGAIN, Retries, retry_after_s

_WRITTEN_BYTES = 1 << 16
"""Most bytes of one write; the remaining time is read before each."""

T = TypeVar("T")
TIMEOUT_S = 10.0


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
        """Makes each connection that this client opens keep the deadline; only httpx's own transports support this.

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


class Client:
    """Sends requests to one address; threads may share it. Use it in a `with`, or `close` it.

    Args:
        url: Of a worker, or of a load balancer in front of several, such as `http://localhost:8501`.
        timeout_s: Until an answer, all tries and the waits between them included. Only the look-up of the
            address's name is not limited by it.
        retries: How requests that are refused for now are retried.
        token: Sent with each request as `authorization: Bearer`, if the server requires one.
        headers: Added to each request, for example for a proxy.
        verify: Whether the certificate of an `https` address must be valid, or the context that decides it.
        transport: Sends the requests; by default httpx's own.
        sleep: Waits so many seconds.
        chance: A number from 0 to 1.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries = Retries(),  # noqa: B008 - immutable
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._url, self._retries, self._sleep, self._chance = url.rstrip("/"), retries, sleep, chance
        self._timeout_s, self._deadline = timeout_s, Deadline()
        own = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            headers={**own, **(headers or {})}, timeout=timeout_s, transport=transport, verify=verify
        )
        self._deadline.hold(self._http)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._http.close()

    def profile(
        self,
        user_id: str,
        *,
        item: str | None = None,
        category: str | None = None,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
        fields: Sequence[str] = (),
        top: int | None = None,
    ) -> Profile:
        """One user's profile.

        Args:
            user_id: The raw id.
            item: An item; the answer then has the probability that the user engages with it.
            category: The item's category; by default the one that it was last seen in.
            at: The time to answer for: milliseconds since 1970, or ISO 8601; by default now.
            context: Values of context fields.
            fields: Optional parts of the answer: of `features`, `vector`, `attributes`, `sources`.
            top: The most interests of the answer; by default 10.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.profile(user_id, item, category, at, context, fields, top))

    def profiles(
        self, users: Sequence[str | User], *, fields: Sequence[str] = (), top: int | None = None
    ) -> list[Profile]:
        """Profiles of up to 1,000 users in their order, all of one version; arguments and errors as of `profile`."""
        return self._ask(questions.profiles(users, fields, top)).profiles

    def rank(
        self,
        user_id: str,
        items: Sequence[str | Item],
        *,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Up to 1,000 items, the most probable for this user first; arguments and errors as of `profile`.

        With bids the item of the highest expected value comes first; items at their cap are only in `left_out`.
        """
        return self._ask(questions.rank(user_id, items, at, context))

    def recommend(
        self,
        user_id: str,
        *,
        n: int | None = None,
        category: str | None = None,
        exclude_seen: bool = False,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Recommendations:
        """Items for this user, each with its reason.

        Args:
            user_id: The raw id.
            n: The most items, up to 100; by default 20.
            category: Only items of this category.
            exclude_seen: Whether items that the user clicked are left out.
            at: As of `profile`.
            context: Likewise.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.recommend(user_id, n, category, exclude_seen, at, context))

    def similar(
        self,
        user_id: str,
        *,
        n: int | None = None,
        exclude_seen: bool = False,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> SimilarItems:
        """The items that are nearest to this user; arguments as of `recommend`.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.similar(user_id, n, exclude_seen, at, context))

    def explain(
        self,
        user_id: str,
        *,
        label: str | None = None,
        item: str | None = None,
        category: str | None = None,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
        top: int | None = None,
    ) -> Explanation:
        """Why an interest (`label`) or an engagement (`item`) is as probable as it is.

        Args:
            user_id: The raw id.
            label: A category, as a profile shows it; or
            item: An item.
            category: As of `profile`.
            at: Likewise.
            context: Likewise.
            top: The most reasons; by default 10.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.explain(user_id, label, item, category, at, context, top))

    def ready(self) -> Readiness:
        """Whether the worker can answer, and what it lacks; there are no retries.

        Raises:
            ClientError: The worker does not answer.
        """
        self._deadline.at_s = time.monotonic() + self._timeout_s
        return questions.read(READY, self._send(READY))

    def _ask(self, question: Question[T]) -> T:
        self._deadline.at_s = time.monotonic() + self._timeout_s
        tried = 0
        while True:
            tried += 1
            try:
                response = self._send(question)
            except Unreachable:
                wait_s = self._wait_s(tried, None)
                if wait_s is None:
                    raise
            else:
                wait_s = self._wait_s(tried, retry_after_s(response.headers.get("retry-after")))
                if response.status_code not in AGAIN or wait_s is None:
                    return questions.read(question, response)
            self._sleep(wait_s)

    def _wait_s(self, tried: int, pause_s: float | None) -> float | None:
        return self._retries.wait_s(tried, pause_s, self._chance(), self._deadline.at_s - time.monotonic())

    def _send(self, question: Question[T]) -> httpx.Response:
        """Sends one request; the only method that uses the network."""
        try:
            return self._http.request(
                question.method,
                self._url + question.path,
                params=question.parameters or None,
                json=question.body,
                timeout=self._deadline.left_s(),
            )
        except (httpx.TransportError, httpcore.TimeoutException, UnicodeEncodeError) as error:
            raise questions.failed(error, self._url) from error
