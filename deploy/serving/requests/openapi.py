"""The OpenAPI 3.1 document of the HTTP API, built from the endpoints and their types, and a page that shows it."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib import metadata
from typing import Any

import msgspec

from deploy.serving.requests.access import OPEN
from deploy.serving.requests.http import FAILED, METHODS, Endpoint, Headers, Request, Response, encode, is_dict
from springtide_client.answers import Failure

HTML = "text/html; charset=utf-8"
MEANING = {
    200: "The answer.",
    400: "The request cannot be answered as it is; `where` names the position.",
    401: "The request has no token, or an unknown one.",
    403: "The token's role does not allow this request.",
    404: "There is no such model, version, label or segment.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    429: "The host is overloaded; retry after `retry-after` seconds.",
    431: "Request line and headers are too long.",
    500: "The worker failed; its log has the cause.",
    501: "The model does not offer this.",
    503: "Answers cannot be given yet.",
    504: "The answer did not come in time.",
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TOKEN = "token"
_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "If `serving.tokens` requires one; `/metrics` needs one of the role `operate`.",
}
_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8884; padding-top: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8883; }
td:first-child { white-space: nowrap; }
"""
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Headers = [
    (b"content-type", HTML.encode()),
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
]
_CODE = re.compile(r"`([^`]+)`")

Schemas = Mapping[Any, dict[str, Any]]


def document_endpoints(others: Sequence[Endpoint]) -> list[Endpoint]:
    """Returns the endpoints of the document and the page, which are built when first requested."""
    built: list[bytes] = []

    def both() -> list[bytes]:
        if not built:
            try:
                release = metadata.version("springtide")
            except metadata.PackageNotFoundError:
                release = "0"
            content = document([*others, *endpoints], release)
            built.extend((encode(content), page(content).encode()))
        return built

    async def as_json(_: Request) -> Response:
        return Response(200, both()[0])

    async def as_page(_: Request) -> Response:
        return Response(200, both()[1], _PAGE)

    endpoints = [
        Endpoint(
            "openapi",
            METHODS,
            "/openapi.json",
            as_json,
            "This document.",
            returns=(dict[str, Any],),
            failures=FAILED,
            role=OPEN,
        ),
        Endpoint(
            "docs",
            METHODS,
            "/docs",
            as_page,
            "This document as a page to read.",
            media_type=HTML,
            failures=FAILED,
            role=OPEN,
        ),
    ]
    return endpoints


def document(endpoints: Sequence[Endpoint], release: str) -> dict[str, Any]:
    """Builds the document as a JSON-compatible dict; endpoints without a method to show are omitted."""
    shown = [endpoint for endpoint in endpoints if endpoint.shown_methods]
    kinds = list(dict.fromkeys(kind for endpoint in shown for kind in _kinds(endpoint)))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    of_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in shown:
        for method in endpoint.shown_methods:
            paths.setdefault(endpoint.path, {})[method.lower()] = _operation(endpoint, method, of_kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Springtide",
            "version": release,
            "summary": "User profiles that learn from every click.",
            "description": "`docs/reference/api.md` has more, with examples. Integers are written without a fraction.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {_TOKEN: _BEARER}},
    }


def _kinds(endpoint: Endpoint) -> Iterator[Any]:
    yield from (*endpoint.body, *endpoint.returns, *_failures(endpoint).values())


def _failures(endpoint: Endpoint) -> Mapping[int, Any]:
    """Returns the type of the JSON for each status except 200."""
    return endpoint.failures if endpoint.role == OPEN else {**endpoint.failures, 401: Failure, 403: Failure}


def _operation(endpoint: Endpoint, method: str, schemas: Schemas) -> dict[str, Any]:
    placeholders = _PLACEHOLDER.findall(endpoint.path)
    # Unique in the document, although several endpoints may share a name in metrics.
    name = "_".join([endpoint.name, *placeholders[1:]])
    operation: dict[str, Any] = {
        "operationId": name if method != "HEAD" else f"{name}_head",
        "summary": endpoint.summary,
        "parameters": [
            *(
                {
                    "name": placeholder,
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1, **endpoint.placeholders.get(placeholder, {})},
                }
                for placeholder in placeholders
            ),
            *_parameters(endpoint),
        ],
        "responses": {
            str(status): _response(endpoint, status, method, schemas) for status in (200, *sorted(_failures(endpoint)))
        },
    }
    if endpoint.role != OPEN:
        operation["security"] = [{}, {_TOKEN: []}]
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": _json(endpoint.body, schemas)}
    return operation


def _json(kinds: Sequence[Any], schemas: Schemas) -> dict[str, Any]:
    """Returns the content object for JSON of one of these types."""
    named = [schemas[kind] for kind in kinds]
    return {"application/json": {"schema": named[0] if len(named) == 1 else {"oneOf": named}}}


def _parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    """Yields the query parameters; a dict field becomes one parameter whose names begin with its own and a dot."""
    for field in () if endpoint.parameters is None else msgspec.structs.fields(endpoint.parameters):
        schema = _without_null(msgspec.json.schema(field.type))
        parameter = {
            "name": field.encode_name,
            "in": "query",
            "required": field.required,
            "allowEmptyValue": not is_dict(field.type),
        }
        if description := schema.pop("description", ""):
            parameter["description"] = description
        if is_dict(field.type):
            parameter |= {"style": "form", "explode": True}
            schema["propertyNames"] = {"pattern": f"^{field.encode_name}\\.."}
        elif field.default not in (msgspec.NODEFAULT, None):
            schema["default"] = field.default
        yield {**parameter, "schema": schema}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Removes the null type from the schema of an optional parameter.

    >>> _without_null({"anyOf": [{"type": "string"}, {"type": "null"}]})
    {'type': 'string'}
    """
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    return {**kinds[0]} if len(kinds) == 1 else {**schema}


def _response(endpoint: Endpoint, status: int, method: str, schemas: Schemas) -> dict[str, Any]:
    response: dict[str, Any] = {"description": MEANING[status]}
    if status == 429:
        response["headers"] = _RETRY_AFTER
    if method == "HEAD":
        return response
    kinds = endpoint.returns if status == 200 else (_failures(endpoint)[status],)
    if not kinds:
        return response | {"content": {endpoint.media_type: {"schema": {"type": "string"}}}}
    return response | {"content": _json(kinds, schemas)}


def page(document: Mapping[str, Any]) -> str:
    """Builds the HTML page of a document."""
    info = document["info"]
    operations = [
        (path, method, operation)
        for path, of_path in document["paths"].items()
        for method, operation in of_path.items()
        if method != "head"
    ]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>",
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>',
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{_text(info['summary'])} {_text(info['description'])} ",
        'This page is made from <a href="openapi.json">openapi.json</a>.</p>',
        _table(
            (
                method.upper(),
                f'<a href="#{operation["operationId"]}"><code>{escape(path)}</code></a>',
                _text(operation["summary"]),
            )
            for path, method, operation in operations
        ),
    ]
    for path, method, operation in operations:
        parts += [
            f'<h2 id="{operation["operationId"]}">{method.upper()} <code>{escape(path)}</code></h2>',
            f"<p>{_text(operation['summary'])}</p>",
            _table(
                (_name(parameter), parameter["in"], _type(parameter["schema"]), _text(parameter.get("description", "")))
                for parameter in operation["parameters"]
            ),
        ]
        if "requestBody" in operation:
            parts.append(f"<p>Body: {_content(operation['requestBody'])}</p>")
        parts.append(
            _table(
                (status, _content(response), _text(response["description"]))
                for status, response in operation["responses"].items()
            )
        )
    parts.append("<h2>Types</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += [
            f'<h3 id="type-{name}"><code>{name}</code></h3><p>{_text(schema.get("description", ""))}</p>',
            _table(
                (
                    f"<code>{escape(field)}</code>" + " (may be absent)" * (field not in schema.get("required", ())),
                    _type(of_field),
                    _text(_description(of_field)),
                )
                for field, of_field in schema.get("properties", {}).items()
            ),
        ]
    return "".join((*parts, "</html>"))


def _table(rows: Iterator[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    return f"<table>{cells}</table>" if cells else ""


def _name(parameter: Mapping[str, Any]) -> str:
    """Returns a parameter's name; the names of a group end with a word for the rest."""
    group = ".NAME" if parameter["schema"].get("type") == "object" else ""
    return f"<code>{escape(parameter['name'] + group)}</code>"


def _content(described: Mapping[str, Any]) -> str:
    return ", ".join(
        _type(content["schema"]) if media == "application/json" else escape(media)
        for media, content in described.get("content", {}).items()
    )


def _description(schema: Mapping[str, Any]) -> str:
    """Returns the description in a schema; for an optional type, the description of its value."""
    return next((part["description"] for part in (schema, *schema.get("anyOf", ())) if "description" in part), "")


def _type(schema: Mapping[str, Any]) -> str:
    """Describes a type in few words, with links to the types that have a name.

    >>> _type({"type": "array", "items": {"$ref": "#/components/schemas/Interest"}})
    'list of <a href="#type-Interest">Interest</a>'
    >>> _type({"type": "integer", "minimum": 1, "maximum": 9, "default": 3})
    'integer, 1 to 9, by default 3'
    """
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#type-{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(part) for part in schema[union])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    kind, values = schema.get("type", "anything"), schema.get("additionalProperties")
    text = escape(str(kind))
    if kind == "array":
        text = f"list of {_type(schema.get('items') or {})}"
    elif kind == "object" and isinstance(values, dict) and values:
        text = f"object of {_type(values)}"
    bounds = [str(schema[bound]) for bound in ("minimum", "maximum", "minItems", "maxItems") if bound in schema]
    if bounds:
        text += f", {' to '.join(bounds)}" + " of them" * ("maxItems" in schema)
    return text + (f", by default {escape(json.dumps(schema['default']))}" if "default" in schema else "")


def _text(words: str) -> str:
    """Marks up words with code in backquotes.

    >>> _text("`at` is <no> time")
    '<code>at</code> is &lt;no&gt; time'
    """
    return _CODE.sub(r"<code>\1</code>", escape(words, quote=False))
