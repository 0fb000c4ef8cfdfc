"""Builds the OpenAPI 3.1 document of the HTTP API from the table of endpoints and their types."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from deploy.serving.edge.tokens import OPEN
from deploy.serving.http_api.endpoints import Endpoint
from deploy.serving.http_api.reading import is_dict
from springtide_client.answers import Failure

PATH = "/openapi.json"
HEAD = "HEAD"
MEANING = {
    200: "The answer.",
    400: "The request cannot be answered as it is; `where` is the place.",
    401: "The request has no token, or one that is not known.",
    403: "The token is of a role that may not ask this.",
    404: "There is no such model, version, label or segment.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    429: "More is asked than can be answered in time; `retry-after` says in how many seconds to come again.",
    431: "Request line and headers are too long.",
    500: "The worker failed; its log says why.",
    501: "The model says nothing of this.",
    503: "Answers cannot be given yet.",
    504: "The answer did not come in time.",
}
_REF = "#/components/schemas/{name}"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TOKEN = "token"
_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "Where `serving.tokens` says that requests need one; `/metrics` needs one of the role `operate`.",
}
_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}

Schemas = Mapping[Any, dict[str, Any]]


def document(endpoints: Sequence[Endpoint], release: str) -> dict[str, Any]:
    """Builds the document as a JSON-compatible dict; endpoints without a method to show are omitted.

    Args:
        endpoints: All endpoints.
        release: The version of the API.
    """
    shown = [one for one in endpoints if one.shown_methods]
    kinds = list(dict.fromkeys(kind for one in shown for kind in _kinds(one)))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    of_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in shown:
        for method in one.shown_methods:
            paths.setdefault(one.path, {})[method.lower()] = _operation(one, method, of_kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Springtide",
            "version": release,
            "summary": "User profiles that learn from every click.",
            "description": "`deploy/serving/http_api/API.md` says more, with examples. Integers are written without a fraction.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {_TOKEN: _BEARER}},
    }


def _kinds(endpoint: Endpoint) -> Iterator[Any]:
    """Yields the types of an endpoint's bodies, responses and errors."""
    yield from endpoint.body
    yield from endpoint.returns
    yield from _failures(endpoint).values()


def _failures(endpoint: Endpoint) -> Mapping[int, Any]:
    """Returns the type of the JSON for each status except 200."""
    return endpoint.failures if endpoint.role == OPEN else {**endpoint.failures, 401: Failure, 403: Failure}


def _operation(endpoint: Endpoint, method: str, schemas: Schemas) -> dict[str, Any]:
    name = operation_name(endpoint)
    made: dict[str, Any] = {
        "operationId": name if method != HEAD else f"{name}_head",
        "summary": endpoint.summary,
        "parameters": [*_placeholders(endpoint), *_parameters(endpoint)],
        "responses": {
            str(status): _response(endpoint, status, method, schemas) for status in (200, *sorted(_failures(endpoint)))
        },
    }
    if endpoint.role != OPEN:
        made["security"] = [{}, {_TOKEN: []}]
    if endpoint.body:
        made["requestBody"] = {"required": True, "content": _json(endpoint.body, schemas)}
    return made


def _json(kinds: Sequence[Any], schemas: Schemas) -> dict[str, Any]:
    """Returns the content object for JSON of one of these types."""
    named = [schemas[kind] for kind in kinds]
    return {"application/json": {"schema": named[0] if len(named) == 1 else {"oneOf": named}}}


def operation_name(endpoint: Endpoint) -> str:
    """Returns the operation id of an endpoint, unique in the document; several endpoints may share a metrics name.

    >>> from types import SimpleNamespace
    >>> operation_name(SimpleNamespace(name="model", path="/v1/models/{model}/labels/{label}"))
    'model_label'
    >>> operation_name(SimpleNamespace(name="profile", path="/v1/profiles/{user_id}"))
    'profile'
    """
    return "_".join([endpoint.name, *_PLACEHOLDER.findall(endpoint.path)[1:]])


def _placeholders(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    """Yields the path parameters; a value is any text of at least one character."""
    for name in _PLACEHOLDER.findall(endpoint.path):
        schema = {"type": "string", "minLength": 1, **endpoint.placeholders.get(name, {})}
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    """Yields the query parameters; a dict field becomes one parameter whose names begin with its own and a dot."""
    for field in () if endpoint.parameters is None else msgspec.structs.fields(endpoint.parameters):
        schema = _without_null(msgspec.json.schema(field.type))
        made = {
            "name": field.encode_name,
            "in": "query",
            "required": field.required,
            "allowEmptyValue": not is_dict(field.type),
        }
        if description := schema.pop("description", ""):
            made["description"] = description
        if is_dict(field.type):
            names = {"pattern": f"^{field.encode_name}\\.."}
            made |= {"style": "form", "explode": True}
            schema["propertyNames"] = names
        elif field.default not in (msgspec.NODEFAULT, None):
            schema["default"] = field.default
        yield {**made, "schema": schema}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Removes the null type from the schema of an optional parameter.

    >>> _without_null({"anyOf": [{"type": "string"}, {"type": "null"}]})
    {'type': 'string'}
    """
    kinds = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    return {**kinds[0]} if len(kinds) == 1 else {**schema}


def _response(endpoint: Endpoint, status: int, method: str, schemas: Schemas) -> dict[str, Any]:
    made: dict[str, Any] = {"description": MEANING[status]}
    if status == 429:
        made["headers"] = _RETRY_AFTER
    if method == HEAD:
        return made
    kinds = endpoint.returns if status == 200 else (_failures(endpoint)[status],)
    if not kinds:
        return made | {"content": {endpoint.media_type: {"schema": {"type": "string"}}}}
    return made | {"content": _json(kinds, schemas)}
