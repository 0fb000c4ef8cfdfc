"""What API.md and the OpenAPI document say is what is answered."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from deploy.serving.requests import http as endpoints
from deploy.serving.requests import parameters as requests
from deploy.serving.rest import App
from springtide_client.answers import Profile
from state.process.network import free_port
from tests.deploy.serving.http_api.test_app import app as app
from tests.deploy.serving.http_api.test_app import ask
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import answers, until, worker

DOCUMENT = Path(__file__).parents[4] / "docs" / "reference" / "api.md"
MORE = "..."
"""A name that stands for more of the same."""


class Example(NamedTuple):
    """A request of the document.

    Attributes:
        words: Of its `curl`.
        status: That it is answered with.
        answer: The JSON below it; None where none is shown.
    """

    words: list[str]
    status: int
    answer: Any


def examples(text: str) -> Iterator[Example]:
    """The requests in fenced blocks, each with what stands between it and the next one."""
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for one in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, answer = one.partition("\n")
            command, _, status = line.partition(" # ")
            yield Example(shlex.split(command), int(status or 200), json.loads(answer) if answer.strip() else None)


def send(words: list[str], port: int) -> httpx.Response:
    """What `curl` would send."""
    method, body, url = "GET", None, ""
    rest = iter(words[1:])
    for word in rest:
        if word == "-d":
            method, body = "POST", next(rest)
        elif word == "-X":
            method = next(rest)
        elif word != "-s":
            url = word
    address = f"http://{url.replace('localhost:8501', f'127.0.0.1:{port}')}"
    return httpx.request(method, address, content=body, timeout=60.0, verify=False)


def differences(documented: Any, given: Any, at: str = "answer") -> list[str]:
    """Where an answer has other names or types than the document; flags and nulls are compared by value."""
    if isinstance(documented, dict) and isinstance(given, dict):
        named = documented.keys() - {MORE}
        odd = named - given.keys() if MORE in documented else named ^ given.keys()
        inner = (differences(documented[name], given[name], f"{at}.{name}") for name in named & given.keys())
        return [f"{at}: {sorted(odd)}"] * bool(odd) + [one for found in inner for one in found]
    if isinstance(documented, list) and isinstance(given, list):
        if len(documented) > len(given):
            return [f"{at}: {len(given)} entries"]
        pairs = enumerate(zip(documented, given, strict=False))
        return [one for place, (left, right) in pairs for one in differences(left, right, f"{at}[{place}]")]
    if isinstance(documented, bool) or documented is None:
        return [] if documented is given else [f"{at}: {given}"]
    numbers = (int, float) if isinstance(documented, float) else int
    wanted = str if isinstance(documented, str) else numbers
    return [] if isinstance(given, wanted) else [f"{at}: {given!r}"]


def test_every_request_of_the_document_is_answered_as_it_says(stores: Stores) -> None:
    port, found = free_port(), list(examples(DOCUMENT.read_text()))
    assert len(found) > 10
    with worker(stores, port):
        until(lambda: answers(port, "/readyz"))
        for example in found:
            response = send(example.words, port)
            assert response.status_code == example.status, example.words
            assert int(response.headers["content-length"]) == len(response.content)
            if example.answer is None:
                assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
                continue
            assert response.headers["content-type"] == "application/json"
            if example.status >= 400:
                assert response.json() == example.answer
            else:
                assert differences(example.answer, response.json()) == [], example.words


def test_the_document_names_every_route_field_and_limit() -> None:
    text = DOCUMENT.read_text()
    for route in (
        "/v1/profiles/{user_id}",
        "/v1/profiles:batch",
        "/v1/profiles/{user_id}/explain",
        "/v1/rank",
        "/v1/recommendations/{user_id}",
        "/v1/similar/{user_id}",
        "/v1/models/{model}",
        "/v1/segments",
        "/readyz",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/docs",
    ):
        assert f"`{route}" in text, route
    for field in Profile.__struct_fields__:
        assert re.search(rf"^\|.*`{field}[.`\[]", text, re.MULTILINE), field
    assert f"{requests.MOST_PROFILES:,} profiles" in text and endpoints.MOST_BODY_BYTES == 1 << 20


CASES = 6
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
        assert isinstance(result, Ok)
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
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
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
