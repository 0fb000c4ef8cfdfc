"""The document of the REST interface: each request in it is sent to a real worker, and is answered as it says."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from deploy.kafka.configuration import free_port
from deploy.serving.answers.query import Answer
from deploy.serving.requests import http as endpoints
from deploy.serving.requests import parameters as requests
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
    return httpx.request(
        method, f"http://{url.replace('localhost:8501', f'127.0.0.1:{port}')}", content=body, timeout=60.0
    )


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
    """Names and types of answers, whole errors, and the content types."""
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


@pytest.mark.parametrize(
    ("given", "odd"),
    [
        ({"a": 1, "b": [{"c": "x"}]}, 0),
        ({"a": 1, "b": [{"c": "y"}, {"c": "z"}]}, 0),
        ({"a": "1", "b": [{"c": "x"}]}, 1),
        ({"a": 1, "b": []}, 1),
        ({"a": 1, "b": [{"d": "x"}]}, 1),
        ({"a": 1, "b": [{"c": "x"}], "e": 0}, 1),
    ],
)
def test_another_form_is_a_difference(given: Any, odd: int) -> None:
    """The comparison can fail."""
    assert len(differences({"a": 1, "b": [{"c": "x"}]}, given)) == odd


def test_the_document_names_every_route_field_and_limit() -> None:
    """What the code offers is what is written."""
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
    for field in dataclasses.fields(Answer):
        assert re.search(rf"^\|.*`{field.name}[.`\[]", text, re.MULTILINE), field.name
    assert f"{requests.MOST_PROFILES:,} profiles" in text and endpoints.MOST_BODY_BYTES == 1 << 20
