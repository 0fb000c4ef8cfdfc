"""The OpenAPI document is true: what it allows is answered in its forms, what it does not allow is refused, and all is in it."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from deploy.serving.rest import App
from tests.deploy.serving.http_api.test_app import app as app
from tests.deploy.serving.http_api.test_app import ask

CASES = 12
"""Requests of each operation and kind; the same ones in each run."""
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


def document_of(app: App) -> dict[str, Any]:
    found: dict[str, Any] = ask(app, "GET", "/openapi.json").json()
    return found


def _asks_for_names(path: str) -> bool:
    """Whether what is asked must fit what a version or the settings have, which no schema knows: numbers, labels, segments."""
    return "/models/" in path or "/segments/" in path or path.endswith("/explain")


def asked(document: dict[str, Any], mode: GenerationMode, most: int, ask_one: Any) -> None:
    """Calls `ask_one` with cases of each operation of the document."""
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        operation = result.ok()
        said = document["paths"][operation.path][operation.method]
        if mode.is_negative and not said["parameters"] and "requestBody" not in said:
            continue
        cases = operation.as_strategy(generation_mode=mode)
        few = settings(
            max_examples=most,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        few(given(case=cases)(ask_one))()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
def test_what_is_asked_is_answered_as_the_document_says(app: App, mode: GenerationMode) -> None:
    """Statuses, content types, headers and forms of answers; what is allowed is refused only for what no schema knows: a time, a place, bids of some items alone, a cap beyond histories."""
    found = set()

    async def send(requests: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:  # type: ignore[arg-type]
            given = {name: value for name, value in requests.items() if value is not None and name != "cookies"}
            if "data" in given:
                given["content"] = given.pop("data")
            return await client.request(**given)

    with asyncio.Runner() as runner:

        def ask_one(case: Any) -> None:
            response = runner.run(send(case.as_transport_kwargs(base_url="http://worker")))
            found.add((case.operation.label, response.status_code))
            assert response.status_code < 500, response.text
            # A parameter without a value is one that is not given, which a schema of values cannot say.
            empty = any(value == "" for value in httpx.URL(str(response.request.url)).params.values())
            case.validate_response(response, checks=CHECKS[:-1] if empty else CHECKS)
            if mode.is_positive and response.status_code == 400 and not _asks_for_names(case.path):
                said = response.json()
                of_place = re.fullmatch(
                    r"at|/at|/profiles/\d+/at|/items/\d+(/cap/(count|within_s))?", said.get("where", "")
                )
                # Of numbers JSON Schema does not tell 1 from 1.0; the document's description does.
                assert of_place or "got `float`" in said["error"], response.text

        asked(document_of(app), mode, CASES, ask_one)
    if mode.is_positive:
        operations = {label for label, _ in found}
        answered = {label for label, status in found if status == 200}
        # Made-up versions, labels and inputs are not known.
        assert {label for label in operations - answered if not _asks_for_names(label)} == set()


def test_a_document_that_is_not_true_is_found_out(app: App) -> None:
    """The test above can fail: an answer lacks a field that is promised, and a status is not said."""
    document = document_of(app)
    schema = schemathesis.openapi.from_dict(document)
    document["components"]["schemas"]["Alive"]["required"].append("since")
    del document["paths"]["/readyz"]["get"]["responses"]["200"]
    for path, wrong in (("/healthz", "since"), ("/readyz", "status code"), ("/docs", "")):
        case = schema[path]["GET"].Case()
        response = ask(app, "GET", path)
        response.request = httpx.Request("GET", f"http://worker{path}")
        if not wrong:
            case.validate_response(response, checks=CHECKS)
            continue
        with pytest.raises(BaseExceptionGroup) as found:
            case.validate_response(response, checks=CHECKS)
        assert wrong in str(found.value.exceptions[0]).lower()


def test_the_document_has_every_endpoint_and_no_other(app: App) -> None:
    """But for what is there only to be refused; each operation has a name of its own, and says what is answered."""
    document = document_of(app)
    assert document["openapi"].startswith("3.1")
    offered = {one.path: {each.lower() for each in one.shown_methods} for one in app.endpoints if one.shown_methods}
    assert {path: set(operations) for path, operations in document["paths"].items()} == offered
    assert {one.name for one in app.endpoints if not one.shown_methods} == {"classify", "regress"}
    operations = [one for each in document["paths"].values() for one in each.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one["summary"] for one in operations)


def references(within: Any) -> Iterator[str]:
    if isinstance(within, dict):
        yield from ([within["$ref"]] if "$ref" in within else [])
        for one in within.values():
            yield from references(one)
    elif isinstance(within, list):
        for one in within:
            yield from references(one)


def test_each_reference_of_the_document_leads_somewhere(app: App) -> None:
    document = document_of(app)
    schemas = document["components"]["schemas"]
    assert {one.removeprefix("#/components/schemas/") for one in references(document)} == set(schemas)
    assert all(re.fullmatch(r"\w+", name) for name in schemas)


def test_the_page_says_the_same_and_needs_nothing_from_elsewhere(app: App) -> None:
    """Each path, parameter, status and type; no script, and no address but that of the document."""
    response = ask(app, "GET", "/docs")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    text, document = response.text, document_of(app)
    style = re.findall("<style>(.*?)</style>", text, re.DOTALL)[0]
    allowed = f"style-src 'sha256-{b64encode(sha256(style.encode()).digest()).decode()}'"
    assert {"default-src 'none'", allowed} <= set(response.headers["content-security-policy"].split("; "))
    assert not re.search(r"https?://|//cdn|<script|src=|@import|url\(", text)
    assert set(re.findall(r'href="([^#"][^"]*)"', text)) == {"openapi.json"}
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
    for path, operations in document["paths"].items():
        assert f"<code>{path}</code>" in text
        for name in [one["name"] for each in operations.values() for one in each["parameters"]]:
            assert re.search(rf"<code>{name}(\.NAME)?</code>", text), name
    assert all(f'id="type-{name}"' in text for name in document["components"]["schemas"])
