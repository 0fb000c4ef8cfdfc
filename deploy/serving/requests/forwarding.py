"""Forwards requests to other workers, whole or as parts of a batch, and reads whom a request is about."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from ssl import SSLContext
from typing import Any

import httpx
import msgspec

from deploy.serving.requests.http import JSON, Headers, Receive, Request, Response, header
from state.disk import documents

ROUTES = frozenset(("profile", "explain", "rank", "recommendations", "similar"))
"""The endpoints that answer about one user."""
MANY = "batch"
"""The endpoint that answers about several users."""
MOST_IDLE = 64
"""Maximum of idle connections; each query in flight uses one."""
_PASSED_ON = (b"authorization", b"content-type", b"accept")
_PASSED_BACK = ("content-type", "retry-after", "springtide-arm")

Answer = Callable[[Request], Awaitable[Response]]
"""Answers a request on this host."""


class Forwarder:
    """Sends requests to other workers over connections that it keeps. Used by one event loop.

    Args:
        verify: Whether to verify certificates, or the context to verify them with.
    """

    def __init__(
        self, timeout_s: float, verify: SSLContext | bool = True, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        limits = httpx.Limits(max_keepalive_connections=MOST_IDLE)
        self._http = httpx.AsyncClient(
            timeout=timeout_s, limits=limits, verify=verify, transport=transport, trust_env=False
        )

    async def send(
        self,
        address: str,
        request: Request,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Response:
        """Sends a request with the given body, and more headers, to the workers at `address`.

        Raises:
            httpx.HTTPError: They do not answer, within `timeout_s` if that is given.
        """
        query, path = request.query_string, request.scope["raw_path"].decode("latin-1")
        passed = {name.decode(): value for name in _PASSED_ON if (value := header(request.scope, name)) is not None}
        answer = await self._http.request(
            request.scope["method"],
            address + path + ("?" + query.decode("latin-1") if query else ""),
            content=body,
            headers={**passed, **(headers or {})},
            timeout=self._http.timeout if timeout_s is None else timeout_s,
        )
        back: Headers = [
            (name.encode(), value.encode()) for name in _PASSED_BACK if (value := answer.headers.get(name))
        ]
        return Response(answer.status_code, answer.content, JSON if back == JSON else back)


class _Asker(msgspec.Struct):
    user_id: str | int


class _Answered(msgspec.Struct):
    profiles: list[msgspec.Raw]


class QuestionBatch(msgspec.Struct, frozen=True):
    """A batch of queries, as the client sent it, in raw JSON but for the user ids.

    `name` is the field with the queries, `profiles` (objects with `user_id`) or `users` (ids); `rest` has the other
    fields.
    """

    name: str
    questions: Sequence[msgspec.Raw]
    users: Sequence[str]
    rest: Mapping[str, msgspec.Raw]

    @classmethod
    def read(cls, body: bytes) -> QuestionBatch | None:
        """Parses a request's body; returns None if it is not a valid batch, and then the endpoint reports the error.

        >>> QuestionBatch.read(b'{"profiles": [{"user_id": 7, "item": "i1"}]}').users, QuestionBatch.read(b"{}")
        (['7'], None)
        """
        try:
            members = documents.decode(body, dict[str, msgspec.Raw])
            (name,) = members.keys() & {"profiles", "users"}
            questions = documents.decode(members.pop(name), list[msgspec.Raw])
            if name == "users":
                users = [str(documents.decode(question, str | int)) for question in questions]
            else:
                users = [str(documents.decode(question, _Asker).user_id) for question in questions]
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            return None
        return cls(name, questions, users, members)

    def part(self, indices: Iterable[int]) -> bytes:
        """Encodes the body of a batch with only the queries at `indices`.

        >>> QuestionBatch.read(b'{"users": ["ann", 7, "bob"], "top": 3}').part([0, 1])
        b'{"top":3,"users":["ann",7]}'
        """
        return msgspec.json.encode({**self.rest, self.name: [self.questions[index] for index in indices]})


def rows_of(response: Response | None, count: int) -> list[bytes] | None:
    """Returns the rows of an answer as raw JSON; None if it is not an answer to a batch of `count` queries.

    >>> rows_of(Response(200, b'{"profiles":[{"a":1},{"a":2}]}'), 2), rows_of(Response(200, b"{}"), 2)
    ([b'{"a":1}', b'{"a":2}'], None)
    """
    if response is None or response.status != 200:
        return None
    try:
        rows = [bytes(row) for row in documents.decode(response.body, _Answered).profiles]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return rows if len(rows) == count else None


async def answered_here(request: Request, batch: QuestionBatch, indices: Sequence[int], answer: Answer) -> list[bytes]:
    """Returns the rows of a part of a batch that this host answers; raises what `answer` raises."""
    if not indices:
        return []
    rows = rows_of(await answer(request._replace(receive=whole(batch.part(indices)))), len(indices))
    assert rows is not None, "the endpoint answers with one row for each query"
    return rows


def user_in(body: bytes) -> str | None:
    """Returns the raw user id of a body; None without a valid one, and then the endpoint reports the error."""
    try:
        return str(documents.decode(body, _Asker).user_id)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def whole(body: bytes) -> Receive:
    """Returns the ASGI function that receives this body."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
