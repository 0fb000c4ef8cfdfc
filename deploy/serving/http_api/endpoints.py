"""The types of the HTTP API, requests, responses and endpoints, and the router from requests to endpoints."""

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
"""The methods of read-only endpoints."""
LAST = (b"connection", b"close")
"""A header that marks the last response of a connection."""
JSON: Headers = [(b"content-type", b"application/json")]
FAILED: Mapping[int, type] = dict.fromkeys((400, 408, 429, 431, 500), Failure)
"""The error responses that every endpoint can return: HTTP status to type of the JSON."""
ASKED = {**FAILED, 503: Failure, 504: Failure}
"""The error responses of endpoints that a model version answers."""
SENT = {**ASKED, 413: Failure}
"""The error responses of endpoints with a request body."""
_NO_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2}).{0,2}")
_PLACEHOLDER = re.compile(r"\\{(\w+)\\}")


class Request(NamedTuple):
    """An HTTP request.

    Attributes:
        scope: The ASGI scope.
        receive: The ASGI receive function.
        path: The decoded values of the placeholders in the endpoint's path, by name.
        endpoint: The endpoint.
        most_body_bytes: The maximum body size; a larger body is refused.
    """

    scope: Scope
    receive: Receive
    path: Mapping[str, str]
    endpoint: Endpoint
    most_body_bytes: int = MOST_BODY_BYTES

    @property
    def query_string(self) -> bytes:
        """The raw query string, without the question mark."""
        query_string: bytes = self.scope["query_string"]
        return query_string

    def parameters(self, kind: type[reading.Asked]) -> reading.Asked:
        """Parses the query parameters as `kind`, the type that the endpoint declares.

        Raises:
            BadRequest: They do not match the type.
        """
        return reading.parameters(self.query_string, kind)

    async def document(self) -> Any:
        """Parses the JSON body as one of the types that the endpoint declares.

        Raises:
            BadRequest: It matches none of them.
            TooLarge: The body is too large.
        """
        return reading.document(await self.body(), self.endpoint.body, self.endpoint.example)

    async def body(self) -> bytes:
        """Reads the whole body.

        Raises:
            BadRequest: The client disconnected before the body was complete.
            TooLarge: The body exceeds `most_body_bytes`.
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
    """An HTTP response.

    Attributes:
        status: The HTTP status.
        body: The whole body.
        headers: The headers, without content-length.
    """

    status: int
    body: bytes
    headers: Headers = JSON


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of the HTTP API.

    Attributes:
        name: The name in metrics.
        methods: The HTTP methods; empty if `answer` checks methods and parameters itself.
        path: The path with placeholders, such as `/v1/profiles/{user_id}`. A placeholder matches any characters except
            a slash that is not percent-encoded.
        answer: Answers a request.
        summary: A sentence that describes the response.
        parameters: The type of the query parameters; None if there are none, and then any parameter is refused.
        body: The types that the body may have; empty if no body is read.
        example: An example body, shown in the error about an invalid one.
        role: The role that a request needs, if requests need tokens.
        returns: The types that the response's JSON may have; empty if the response is not JSON.
        media_type: The media type of a response that is not JSON.
        failures: The type of the JSON of each other status.
        placeholders: Additional JSON Schema in the OpenAPI document for the values of placeholders.
        told_methods: The methods in the OpenAPI document if `methods` is empty; if both are empty, the endpoint is
            omitted.
        soon: Returns a future of the JSON of a response with status 200, as `answer` would, but without a task.
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
        """The methods in the OpenAPI document."""
        return self.methods or self.told_methods


class Routes:
    """Finds the endpoint of a request.

    Args:
        endpoints: The endpoints; if two match a path, the first one is used.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)
        self._fixed = {one.path: one for one in self._endpoints if "{" not in one.path}

    def find(self, scope: Scope) -> tuple[Endpoint, dict[str, str]]:
        """Returns the endpoint of a request and the values of its placeholders.

        Raises:
            UnknownPath: No endpoint has this path.
            WrongMethod: The endpoint does not offer the method.
            BadRequest: The path's percent-encoding is invalid, a placeholder's value is not UTF-8, or there are
                parameters but none are declared.
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
    """Returns a request header by its lowercase name; None if it is missing.

    >>> header({"headers": [(b"accept", b"*/*")]}, b"accept")
    '*/*'
    """
    return next((value.decode("latin-1") for one, value in scope["headers"] if one == name), None)


def encode(document: object) -> bytes:
    """Encodes a document as JSON; it may contain NumPy arrays and dataclasses."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(error: SpringtideError) -> Response:
    """Builds an error response: what happened, what to do, and the position in the request if one is known."""
    said = {"error": error.what, "do": error.do}
    if isinstance(error, BadRequest) and error.where:
        said["where"] = error.where
    return Response(error.http_status, encode(said), [*JSON, *error.http_headers])


async def answer(send: Send, response: Response) -> None:
    """Sends a whole response."""
    headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
