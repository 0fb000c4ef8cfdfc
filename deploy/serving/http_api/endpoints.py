"""An endpoint of the HTTP interface: its path, its methods, and what answers; and which one a request is for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson

from state.errors import BadRequest, UnknownPath, WrongMethod

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Headers = Sequence[tuple[bytes, bytes]]

MOST_BODY_BYTES = 1 << 20
JSON: Headers = [(b"content-type", b"application/json")]
_PLACEHOLDER = re.compile(r"\\{(\w+)\\}")


class Request(NamedTuple):
    """What a request asks.

    Attributes:
        scope: Of ASGI.
        receive: Likewise.
        path: By name what stands in the placeholders of the endpoint's path, decoded.
    """

    scope: Scope
    receive: Receive
    path: Mapping[str, str]

    @property
    def query_string(self) -> bytes:
        """What stands behind the question mark, as it was sent."""
        query_string: bytes = self.scope["query_string"]
        return query_string

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            BadRequest: It is too large.
        """
        body, more = b"", True
        while more:
            message = await self.receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BODY_BYTES:
                raise BadRequest(f"the body exceeds {MOST_BODY_BYTES} bytes", "send fewer profiles in one request")
        return body


class Response(NamedTuple):
    """What a request is answered with.

    Attributes:
        status: Of HTTP.
        body: The whole of it.
        headers: Without the body's length.
    """

    status: int
    body: bytes
    headers: Headers = JSON


@dataclass(frozen=True)
class Endpoint:
    """What is offered at one path.

    Attributes:
        name: As metrics name it.
        methods: Of HTTP; none stands for any.
        path: With placeholders, such as `/v1/profiles/{user_id}`: each holds any characters but a slash that is not
            percent-encoded.
        answer: Answers a request.
    """

    name: str
    methods: tuple[str, ...]
    path: str
    answer: Callable[[Request], Awaitable[Response]]
    pattern: re.Pattern[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        pattern = re.compile(_PLACEHOLDER.sub(r"(?P<\1>[^/]+)", re.escape(self.path)))
        object.__setattr__(self, "pattern", pattern)


class Routes:
    """Finds the endpoint of a request.

    Args:
        endpoints: Where two match a path, the first one is taken.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)
        self._fixed = {one.path: one for one in self._endpoints if "{" not in one.path}

    def find(self, scope: Scope) -> tuple[Endpoint, dict[str, str]]:
        """The endpoint of a request, and what stands in its placeholders.

        Raises:
            UnknownPath: There is none at this path.
            WrongMethod: There is one, for other methods.
        """
        raw: str = scope["raw_path"].decode("latin-1")
        endpoint, placeholders = self._fixed.get(raw), dict[str, str]()
        if endpoint is None:
            for endpoint in self._endpoints:
                if found := endpoint.pattern.fullmatch(raw):
                    placeholders = {name: unquote(value) for name, value in found.groupdict().items()}
                    break
            else:
                offered = ", ".join(one.path for one in self._endpoints)
                raise UnknownPath(f"there is no {scope['path'][:200]}", f"ask one of {offered}")
        if endpoint.methods and scope["method"] not in endpoint.methods:
            raise WrongMethod(
                f"{scope['method']} {endpoint.path} is not offered", f"use {' or '.join(endpoint.methods)}"
            )
        return endpoint, placeholders


def encode(document: object) -> bytes:
    """JSON; numpy arrays and dataclasses included."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(status: int, what: str, do: str) -> Response:
    """An error: what happened, and what to do."""
    return Response(status, encode({"error": what, "do": do}))
