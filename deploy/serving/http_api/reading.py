"""Parses a request into the type that its endpoint declares, or refuses it with the position of the error.

A type is a `msgspec.Struct` that forbids unknown fields; the OpenAPI document is
built from the same types. A position is a JSON pointer into the body, or the name
of a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import unquote_to_bytes

import msgspec

from state.errors import BadRequest

Asked = TypeVar("Asked", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_SHOWN = 200


def parameters(query_string: bytes, kind: type[Asked]) -> Asked:
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
    fields = {field.encode_name: is_dict(field.type) for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for name, value in pairs(query_string):
        group, dot, rest = name.partition(".")
        if (name not in fields and not (dot and rest and fields.get(group))) or fields.get(name):
            raise unknown_parameter(name, fields)
        if not value:
            continue
        if dot:
            found.setdefault(group, {})[rest] = value
        else:
            found[name] = value
    try:
        return msgspec.convert(found, kind, strict=False)
    except msgspec.ValidationError as error:
        what, where = said(error)
        name = where.strip("/").replace("/", ".")
        raise BadRequest(f"parameter {name}: {what}", "correct the parameter", name) from None


def no_parameters(query_string: bytes) -> None:
    """Refuses a query string with parameters.

    Raises:
        BadRequest: There is a parameter.
    """
    for name, _ in pairs(query_string):
        raise unknown_parameter(name, ())


def unknown_parameter(name: str, known: Iterable[str]) -> BadRequest:
    """Returns the error about an unknown parameter; it lists the known ones."""
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
            yield text(name, shown), text(value, shown)


def text(given: bytes, where: str) -> str:
    """Decodes UTF-8.

    Raises:
        BadRequest: The bytes are not UTF-8.
    """
    try:
        return given.decode()
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
            names = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()
            kind = next((one for one in kinds if required(one) <= names), kind)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        what, where = said(error)
        raise BadRequest(f"{where or 'the body'}: {what}", f"send {example}", where) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {str(error)[:_SHOWN]}", f"send {example}") from None


def required(kind: type[msgspec.Struct]) -> set[str]:
    """Returns the names of the required fields."""
    return {field.encode_name for field in msgspec.structs.fields(kind) if field.required}


def said(error: msgspec.ValidationError) -> tuple[str, str]:
    """Splits an error into its message, in lower case, and its position as a JSON pointer; `*` replaces a caller's key.

    >>> said(msgspec.ValidationError("Expected `str`, got `int` - at `$.profiles[3].context[...]`"))
    ('expected `str`, got `int`', '/profiles/3/context/*')
    """
    message = str(error)
    found = _PLACE.search(message)
    steps = _STEP.findall(found[1]) if found else []
    what = (message[: found.start()] if found else message)[:_SHOWN]
    return what[:1].lower() + what[1:], "".join(f"/{(name or place).replace('...', '*')}" for name, place in steps)


def is_dict(kind: Any) -> bool:
    """Whether a type is a dict or an optional dict."""
    return get_origin(kind) is dict or any(get_origin(one) is dict for one in get_args(kind))
