"""An endpoint of the HTTP interface: its path, its methods, and what answers; and which one a request is for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from deploy.serving.edge.tokens import READ
from deploy.serving.http_api import reading
from springtide_client.answers import Failure
from state.errors import BadRequest, SpringtideError, TooLarge, UnknownPath, WrongMethod

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

MOST_BODY_BYTES = 1 << 20
METHODS = ("GET", "HEAD")
"""Of what is only read."""
LAST = (b"connection", b"close")
"""A header: this answer is the connection's last."""
JSON: Headers = [(b"content-type", b"application/json")]
FAILED: Mapping[int, type] = dict.fromkeys((400, 408, 429, 431, 500), Failure)
"""What anything can be answered with instead, by the status of HTTP, and the form of it."""
ASKED = {**FAILED, 503: Failure, 504: Failure}
"""Likewise where a version answers."""
SENT = {**ASKED, 413: Failure}
"""Likewise where the question is a body."""
_NO_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2}).{0,2}")
_PLACEHOLDER = re.compile(r"\\{(\w+)\\}")


class Request(NamedTuple):
    """What a request asks.

    Attributes:
        scope: Of ASGI.
        receive: Likewise.
        path: By name what stands in the placeholders of the endpoint's path, decoded.
        endpoint: The endpoint.
        most_body_bytes: A larger body is refused.
    """

    scope: Scope
    receive: Receive
    path: Mapping[str, str]
    endpoint: Endpoint
    most_body_bytes: int = MOST_BODY_BYTES

    @property
    def query_string(self) -> bytes:
        """What stands behind the question mark, as it was sent."""
        query_string: bytes = self.scope["query_string"]
        return query_string

    def parameters(self, kind: type[reading.Asked]) -> reading.Asked:
        """The parameters, as the type that the endpoint declares.

        Raises:
            BadRequest: They are not of this type.
        """
        return reading.parameters(self.query_string, kind)

    async def document(self) -> Any:
        """The JSON of the body, as one of the types that the endpoint declares.

        Raises:
            BadRequest: It is of none.
            TooLarge: As `body`.
        """
        return reading.document(await self.body(), self.endpoint.body, self.endpoint.example)

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            TooLarge: It is.
        """
        body, more = b"", True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client went away before its request was whole")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_body_bytes:
                raise TooLarge(f"the body exceeds {self.most_body_bytes} bytes", "ask for less in one request")
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
        methods: Of HTTP; none where `answer` itself sees to methods and parameters.
        path: With placeholders, such as `/v1/profiles/{user_id}`: each holds any characters but a slash that is not
            percent-encoded.
        answer: Answers a request.
        summary: What is answered, in a sentence.
        parameters: The type of the query's parameters; None where there are none, and then any is refused.
        body: The types that the body may have; none where none is read.
        example: Of a body, for who sent another one.
        role: Who may ask, where requests need tokens.
        returns: The types that the answer's JSON may have; none where it is no JSON.
        media_type: Of an answer that is no JSON.
        failures: The type of the JSON of each other status.
        placeholders: What more the document says of the values of placeholders, as JSON Schema.
        told_methods: Those of the document where `methods` has none; none: the endpoint is not in it.
        soon: Gives the JSON to come of an answer with status 200, as `answer` would, but without a task.
    """

    name: str
    methods: tuple[str, ...]
    path: str
    answer: Callable[[Request], Awaitable[Response]]
    summary: str = ""
    parameters: type[msgspec.Struct] | None = None
    body: tuple[type[msgspec.Struct], ...] = ()
    example: str = ""
    role: str = READ
    returns: tuple[Any, ...] = ()
    media_type: str = "application/json"
    failures: Mapping[int, type] = field(default_factory=lambda: ASKED)
    placeholders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    told_methods: tuple[str, ...] = ()
    soon: Callable[[Request], asyncio.Future[bytes]] | None = None
    pattern: re.Pattern[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        pattern = re.compile(_PLACEHOLDER.sub(r"(?P<\1>[^/]+)", re.escape(self.path)))
        object.__setattr__(self, "pattern", pattern)

    @property
    def shown_methods(self) -> tuple[str, ...]:
        """The methods of the document."""
        return self.methods or self.told_methods


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
            BadRequest: The path is not rightly percent-encoded, what stands in a placeholder is no UTF-8, or there are
                parameters and none are declared.
        """
        raw: str = scope["raw_path"].decode("latin-1")
        if wrong := _NO_ESCAPE.search(raw):
            raise BadRequest(f"{wrong[0]!r} in the path is no percent-encoding", "write a percent sign as %25")
        endpoint, placeholders = self._fixed.get(raw), dict[str, str]()
        if endpoint is None:
            for endpoint in self._endpoints:
                if found := endpoint.pattern.fullmatch(raw):
                    placeholders = {
                        name: reading.text(unquote_to_bytes(value.encode("latin-1")), name)
                        for name, value in found.groupdict().items()
                    }
                    break
            else:
                offered = ", ".join(one.path for one in self._endpoints)
                raise UnknownPath(f"there is no {scope['path'][:200]}", f"ask one of {offered}")
        if not endpoint.methods:
            return endpoint, placeholders
        if scope["method"] not in endpoint.methods:
            refusal = WrongMethod(
                f"{scope['method']} {endpoint.path} is not offered", f"use {' or '.join(endpoint.methods)}"
            )
            refusal.http_headers = ((b"allow", ", ".join(endpoint.methods).encode()),)
            raise refusal
        if endpoint.parameters is None and scope["query_string"]:
            reading.no_parameters(scope["query_string"])
        return endpoint, placeholders


def header(scope: Scope, name: bytes) -> str | None:
    """A header of a request, by its name in small letters.

    >>> header({"headers": [(b"accept", b"*/*")]}, b"accept")
    '*/*'
    """
    return next((value.decode("latin-1") for one, value in scope["headers"] if one == name), None)


def encode(document: object) -> bytes:
    """JSON; numpy arrays and dataclasses included."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(error: SpringtideError) -> Response:
    """An error: what happened, what to do, and where in the request, if it is there."""
    said = {"error": error.what, "do": error.do}
    if isinstance(error, BadRequest) and error.where:
        said["where"] = error.where
    return Response(error.http_status, encode(said), [*JSON, *error.http_headers])


async def answer(send: Send, response: Response) -> None:
    """Sends a whole response."""
    headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
