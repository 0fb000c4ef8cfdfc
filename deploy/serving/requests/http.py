"""HTTP requests, responses and endpoints, and the router; parses parameters and bodies into the types an endpoint declares."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from deploy.serving.requests.access import READ
from springtide_client.answers import Failure
from state.disk import documents
from state.errors import BadRequest, SpringtideError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
Parameters = TypeVar("Parameters", bound=msgspec.Struct)

MOST_BODY_BYTES = 1 << 20
METHODS = ("GET", "HEAD")
"""The methods of read-only endpoints."""
LAST = (b"connection", b"close")
"""Marks the last response of a connection."""
JSON: Headers = [(b"content-type", b"application/json")]
FAILED: Mapping[int, type] = dict.fromkeys((400, 408, 429, 431, 500), Failure)
"""Type of the JSON by HTTP status, for the errors of every endpoint."""
ASKED = {**FAILED, 503: Failure, 504: Failure}
"""Likewise for endpoints that a model version answers."""
SENT = {**ASKED, 413: Failure}
"""Likewise for endpoints with a request body."""
_NO_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2}).{0,2}")
_PLACEHOLDER = re.compile(r"\\{(\w+)\\}")
_PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_SHOWN = 200


class Request(NamedTuple):
    """An HTTP request; `path` has the decoded values of the placeholders in the endpoint's path, by name."""

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

    def parameters(self, kind: type[Parameters]) -> Parameters:
        """Parses the query parameters as `kind`, the type that the endpoint declares; raises BadRequest."""
        return parameters(self.query_string, kind)

    async def document(self) -> Any:
        """Parses the JSON body as one of the types that the endpoint declares.

        Raises:
            BadRequest: It matches none of them, or is too large.
        """
        return document(await self.body(), self.endpoint.body, self.endpoint.example)

    async def body(self) -> bytes:
        """Reads the whole body.

        Raises:
            BadRequest: The client disconnected before the body was complete, or it exceeds `most_body_bytes`.
        """
        body, more = b"", True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client disconnected before its request was complete")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_body_bytes:
                raise BadRequest(
                    f"the body exceeds {self.most_body_bytes} bytes", "ask for less in one request", http_status=413
                )
        return body


class Response(NamedTuple):
    """An HTTP response: status, whole body, and headers without content-length."""

    status: int
    body: bytes
    headers: Headers = JSON


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of the HTTP API.

    Attributes:
        methods: The HTTP methods; empty if `answer` checks methods and parameters itself.
        path: The path with placeholders, such as `/v1/profiles/{user_id}`. A placeholder matches any characters except
            a slash that is not percent-encoded.
        summary: A sentence that describes the response.
        parameters: The type of the query parameters; None if there are none, and then any parameter is refused.
        body: The types that the body may have; empty if no body is read.
        example: An example body, shown in the error about an invalid one.
        role: The role that a request needs, if requests need tokens.
        returns: The types that the response's JSON may have; empty if the response is not JSON.
        failures: The type of the JSON of each other status.
        placeholders: Additional JSON Schema in the OpenAPI document for the values of placeholders.
        shown_methods: The methods in the OpenAPI document; `methods` by default. The document omits an endpoint without
            any.
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
    shown_methods: tuple[str, ...] = ()
    soon: Callable[[Request], asyncio.Future[bytes]] | None = None
    pattern: re.Pattern[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        pattern = re.compile(_PLACEHOLDER.sub(r"(?P<\1>[^/]+)", re.escape(self.path)))
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "shown_methods", self.shown_methods or self.methods)


class Routes:
    """Finds the endpoint of a request; if two match a path, the first one is used."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)
        self._fixed = {endpoint.path: endpoint for endpoint in self._endpoints if "{" not in endpoint.path}

    def find(self, scope: Scope) -> tuple[Endpoint, dict[str, str]]:
        """Returns the endpoint of a request and the values of its placeholders.

        Raises:
            BadRequest: No endpoint has this path and method, the path's percent-encoding is invalid, a placeholder's
                value is not UTF-8, or there are parameters but none are declared.
        """
        raw: str = scope["raw_path"].decode("latin-1")
        if wrong := _NO_ESCAPE.search(raw):
            raise BadRequest(f"{wrong[0]!r} in the path is no percent-encoding", "write a percent sign as %25")
        endpoint, placeholders = self._fixed.get(raw), dict[str, str]()
        if endpoint is None:
            for endpoint in self._endpoints:
                if match := endpoint.pattern.fullmatch(raw):
                    placeholders = {
                        name: _text(unquote_to_bytes(value.encode("latin-1")), name)
                        for name, value in match.groupdict().items()
                    }
                    break
            else:
                offered = ", ".join(endpoint.path for endpoint in self._endpoints)
                raise BadRequest(f"there is no {scope['path'][:200]}", f"ask one of {offered}", http_status=404)
        if not endpoint.methods:
            return endpoint, placeholders
        if scope["method"] not in endpoint.methods:
            use = f"use {' or '.join(endpoint.methods)}"
            refusal = BadRequest(f"{scope['method']} {endpoint.path} is not offered", use, http_status=405)
            refusal.http_headers = ((b"allow", ", ".join(endpoint.methods).encode()),)
            raise refusal
        if endpoint.parameters is None and scope["query_string"]:
            for name, _ in pairs(scope["query_string"]):
                raise _unknown_parameter(name, ())
        return endpoint, placeholders


def parameters(query_string: bytes, kind: type[Parameters]) -> Parameters:
    """Parses the parameters of a query string. A dict field collects all parameters named `FIELD.NAME`.

    >>> class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    ...     n: int = 20
    ...     context: dict[str, str] = {}
    >>> parameters(b"n=3&context.device=tv", Wanted)
    Wanted(n=3, context={'device': 'tv'})

    Raises:
        BadRequest: A parameter is unknown, has the wrong type, or is not UTF-8.
    """
    if not query_string:
        return kind()
    fields = _fields(kind)
    values: dict[str, Any] = {}
    for name, value in pairs(query_string):
        group, dot, field_name = name.partition(".")
        if (name not in fields and not (dot and field_name and fields.get(group))) or fields.get(name):
            raise _unknown_parameter(name, fields)
        if not value:
            continue
        if dot:
            values.setdefault(group, {})[field_name] = value
        else:
            values[name] = value
    try:
        return documents.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        problem, where = what_and_where(error)
        name = where.strip("/").replace("/", ".")
        raise BadRequest(f"parameter {name}: {problem}", "correct the parameter", name) from None


@cache
def _fields(kind: type[Parameters]) -> dict[str, bool]:
    """The parameters of a path by name, and whether each is a dict. To find out takes a twentieth of an answer."""
    return {field.encode_name: is_dict(field.type) for field in msgspec.structs.fields(kind)}


def _unknown_parameter(name: str, known: Iterable[str]) -> BadRequest:
    listed = ", ".join(known)
    do = f"the parameters of this path are {listed}" if listed else "this path takes no parameters"
    return BadRequest(f"there is no parameter {name[:_SHOWN]!r}", do, name[:_SHOWN])


def pairs(query_string: bytes) -> Iterable[tuple[str, str]]:
    """Yields the names and values of a query string; pairs without a name are skipped.

    >>> list(pairs(b"a=1&b=%C3%A9+x&c"))
    [('a', '1'), ('b', 'é x'), ('c', '')]

    Raises:
        BadRequest: A name or value is not UTF-8.
    """
    for pair in query_string.split(b"&"):
        name, _, value = (unquote_to_bytes(part) for part in pair.replace(b"+", b" ").partition(b"="))
        if name:
            shown = name.decode(errors="replace")[:_SHOWN]
            yield _text(name, shown), _text(value, shown)


def _text(encoded: bytes, where: str) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{where} is no UTF-8", "percent-encode its UTF-8", where) from None


def document(body: bytes, kinds: Sequence[type[msgspec.Struct]], example: str) -> Any:
    """Parses a JSON body as the first of the types whose required fields are all present.

    >>> class Many(msgspec.Struct, forbid_unknown_fields=True):
    ...     users: list[str]
    >>> document(b'{"users": ["ann"]}', [Many], "")
    Many(users=['ann'])

    Raises:
        BadRequest: The body is not JSON, or does not match the type.
    """
    try:
        kind = kinds[0]
        if len(kinds) > 1:
            names = documents.decode(body, dict[str, msgspec.Raw]).keys()
            kind = next((kind for kind in kinds if _required(kind) <= names), kind)
        return documents.decode(body, kind)
    except msgspec.ValidationError as error:
        problem, where = what_and_where(error)
        raise BadRequest(f"{where or 'the body'}: {problem}", f"send {example}", where) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {str(error)[:_SHOWN]}", f"send {example}") from None


def _required(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind) if field.required}


def what_and_where(error: msgspec.ValidationError) -> tuple[str, str]:
    """Splits an error into its message, in lower case, and its position as a JSON pointer; `*` replaces a caller's key.

    >>> what_and_where(msgspec.ValidationError("Expected `str`, got `int` - at `$.profiles[3].context[...]`"))
    ('expected `str`, got `int`', '/profiles/3/context/*')
    """
    message = str(error)
    match = _PLACE.search(message)
    steps = _STEP.findall(match[1]) if match else []
    problem = (message[: match.start()] if match else message)[:_SHOWN]
    return problem[:1].lower() + problem[1:], "".join(
        f"/{(name or index).replace('...', '*')}" for name, index in steps
    )


def is_dict(kind: Any) -> bool:
    """Whether a type is a dict or an optional dict."""
    return get_origin(kind) is dict or any(get_origin(part) is dict for part in get_args(kind))


def header(scope: Scope, name: bytes) -> str | None:
    """Returns a request header by its lowercase name; None if it is missing.

    >>> header({"headers": [(b"accept", b"*/*")]}, b"accept")
    '*/*'
    """
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _array(values: Any) -> msgspec.Raw:
    return msgspec.Raw(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))


encode = msgspec.json.Encoder(enc_hook=_array).encode
"""Encodes a document as JSON; it may contain structs, dataclasses and NumPy arrays."""


def failure(error: SpringtideError) -> Response:
    """Builds the response of an error."""
    document = {"error": error.what, "do": error.do}
    if isinstance(error, BadRequest) and error.where:
        document["where"] = error.where
    return Response(error.http_status, encode(document), [*JSON, *error.http_headers])


def error_in(response: Response) -> SpringtideError:
    """Returns the error that another host's response reports."""
    try:
        failure = documents.decode(response.body, Failure)
    except msgspec.MsgspecError:
        failure = Failure(f"another host answered with status {response.status}", "check its log")
    error = BadRequest(failure.error, failure.do, failure.where, response.status)
    error.http_headers = tuple(entry for entry in response.headers if entry[0] == b"retry-after")
    return error


async def answer(send: Send, response: Response) -> None:
    """Sends a whole response."""
    headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
