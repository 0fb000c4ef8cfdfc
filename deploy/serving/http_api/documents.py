"""Serves the HTTP API's OpenAPI document, and the same document as an HTML page.

    GET /openapi.json /docs

The page is one file without scripts. It loads nothing from elsewhere and needs no internet.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib import metadata
from typing import Any

from deploy.serving.edge.tokens import OPEN
from deploy.serving.http_api import openapi
from deploy.serving.http_api.endpoints import FAILED, METHODS, Endpoint, Headers, Request, Response, encode

HTML = "text/html; charset=utf-8"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8884; padding-top: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
h2 code { font-size: 1.05em; }
b.method { display: inline-block; min-width: 3.2rem; color: #07705d; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8883; }
td:first-child { white-space: nowrap; }
@media (prefers-color-scheme: dark) { b.method { color: #5fd0b8; } }
"""
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page's Content-Security-Policy: its own style and nothing else."""
_CODE = re.compile(r"`([^`]+)`")
_PAGE: Headers = [
    (b"content-type", HTML.encode()),
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
]


def page(document: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        document: Of `openapi.document`.
    """
    about = document["info"]
    return "".join(
        (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(about['title'])}</title>",
            f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>',
            f"<h1>{escape(about['title'])} {escape(about['version'])}</h1>",
            f"<p>{_text(about['summary'])} {_text(about['description'])} ",
            'This page is made from <a href="openapi.json">openapi.json</a>.</p>',
            *_contents(document),
            *_operations(document),
            "<h2>Types</h2>",
            *_types(document["components"]["schemas"]),
            "</html>",
        )
    )


def _each(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Path, method and operation, without HEAD."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method != "head":
                yield path, method.upper(), operation


def _contents(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<table>"
    for path, method, operation in _each(document):
        link = f'<a href="#{escape(operation["operationId"])}"><code>{escape(path)}</code></a>'
        yield f"<tr><td><b class=method>{method}</b> {link}<td>{_text(operation['summary'])}"
    yield "</table>"


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, method, operation in _each(document):
        yield f'<h2 id="{escape(operation["operationId"])}"><b class=method>{method}</b> <code>{escape(path)}</code></h2>'
        yield f"<p>{_text(operation['summary'])}</p>"
        if operation["parameters"]:
            yield "<table><tr><th>parameter<th>in<th>type<th>"
            for one in operation["parameters"]:
                yield _row(_name(one), one["in"], _type(one["schema"]), _text(one.get("description", "")))
            yield "</table>"
        if "requestBody" in operation:
            yield f"<p>Body: {_content(operation['requestBody'])}</p>"
        yield "<table><tr><th>status<th>answer<th>"
        for status, response in operation["responses"].items():
            yield _row(f"<code>{status}</code>", _content(response), _text(response["description"]))
        yield "</table>"


def _types(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f'<h3 id="type-{escape(name)}"><code>{escape(name)}</code></h3><p>{_text(schema.get("description", ""))}</p>'
        yield "<table>"
        for field, of_field in schema.get("properties", {}).items():
            needed = "" if field in schema.get("required", ()) else " (may be absent)"
            yield _row(f"<code>{escape(field)}</code>{needed}", _type(of_field), _text(_description(of_field)))
        yield "</table>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}' for cell in cells)}"


def _name(parameter: Mapping[str, Any]) -> str:
    """A parameter's name; one of many is written with a word for the rest of it."""
    many = ".NAME" if parameter["schema"].get("type") == "object" else ""
    return f"<code>{escape(parameter['name'] + many)}</code>"


def _content(of: Mapping[str, Any]) -> str:
    """Media types with what they hold."""
    return ", ".join(
        _type(one["schema"]) if media == "application/json" else escape(media)
        for media, one in of.get("content", {}).items()
    )


def _description(schema: Mapping[str, Any]) -> str:
    """The description in a schema; for an optional type, the description of its value."""
    said = [schema.get("description", ""), *(one.get("description", "") for one in schema.get("anyOf", ()))]
    return next(filter(None, said), "")


def _type(schema: Mapping[str, Any]) -> str:
    """A type in few words, with links to the types that have a name.

    >>> _type({"type": "array", "items": {"$ref": "#/components/schemas/Interest"}})
    'list of <a href="#type-Interest">Interest</a>'
    >>> _type({"type": "integer", "minimum": 1, "maximum": 9, "default": 3})
    'integer, 1 to 9, by default 3'
    """
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#type-{name}">{name}</a>'
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return " or ".join(_type(one) for one in schema[many])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(one))}</code>" for one in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        said = f"list of {_type(schema.get('items') or {})}"
    elif kind == "object":
        values = schema.get("additionalProperties")
        said = f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    else:
        said = escape(str(kind))
    bounds = [str(schema[one]) for one in ("minimum", "maximum", "minItems", "maxItems") if one in schema]
    if bounds:
        said += f", {' to '.join(bounds)}" + " of them" * ("maxItems" in schema)
    return said + (f", by default {escape(json.dumps(schema['default']))}" if "default" in schema else "")


def _text(words: str) -> str:
    """Words with code in backquotes.

    >>> _text("`at` is <no> time")
    '<code>at</code> is &lt;no&gt; time'
    """
    return _CODE.sub(r"<code>\1</code>", escape(words, quote=False))


class Documents:
    """The endpoints that speak of the interface.

    Args:
        others: All other endpoints.
    """

    def __init__(self, others: Sequence[Endpoint]) -> None:
        self._others = others
        self._made: tuple[bytes, bytes] | None = None

    def endpoints(self) -> list[Endpoint]:
        """What is offered."""
        return [
            Endpoint(
                "openapi",
                METHODS,
                openapi.PATH,
                self._document,
                "This document.",
                returns=(dict[str, Any],),
                failures=FAILED,
                role=OPEN,
            ),
            Endpoint(
                "docs",
                METHODS,
                "/docs",
                self._page,
                "This document as a page to read.",
                media_type=HTML,
                failures=FAILED,
                role=OPEN,
            ),
        ]

    async def _document(self, _: Request) -> Response:
        return Response(200, self._both()[0])

    async def _page(self, _: Request) -> Response:
        return Response(200, self._both()[1], _PAGE)

    def _both(self) -> tuple[bytes, bytes]:
        """Made when they are first asked for."""
        if self._made is None:
            said = openapi.document([*self._others, *self.endpoints()], release())
            self._made = encode(said), page(said).encode()
        return self._made


def release() -> str:
    """The release of this program."""
    try:
        return metadata.version("springtide")
    except metadata.PackageNotFoundError:
        return "0"
