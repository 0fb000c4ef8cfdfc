"""HTTP: profiles, batches and the limits and errors of all endpoints."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from deploy.serving.answers.host import Host
from deploy.serving.requests.access import Tokens
from deploy.serving.requests.parameters import MOST_PROFILES, time_ms
from deploy.serving.rest import App
from state.errors import BadRequest
from state.events.identity import public_id
from state.layout import PROGRAMS
from tests.deploy.serving.stocked import NOW_MS, SALT, SOURCE, Stores, digest_of


def app_of(
    stores: Stores, now_ms: Callable[[], int] = lambda: NOW_MS, tokens: Tokens | None = None, **sections: Any
) -> App:
    """The application on the stores, whose writers are closed: one process may open a store only once."""
    stores.close()
    return App(Host(replace(stores.settings, **sections), SALT, now_ms), CollectorRegistry(), tokens=tokens)


def ask(app: App, method: str, path: str, **more: Any) -> httpx.Response:
    """One request through ASGI."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


def ask_bytes(app: App, path: bytes, query: bytes) -> tuple[int, Any]:
    """A GET of what httpx would not send as it is."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "raw_path": path, "path": "", "query_string": query, "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture
def app(stores: Stores) -> Iterator[App]:
    made = app_of(stores)
    yield made
    made.close()


def test_a_profile_is_answered_in_the_documented_form(app: App) -> None:
    """Every field, in its type and order; without `fields` only what most callers need."""
    lean = ask(app, "GET", "/v1/profiles/ann").json()
    assert list(lean) == ["user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "interests"]
    assert list(lean["version"]) == ["number", "epoch", "age_s", "mask_generation"]
    response = ask(app, "GET", "/v1/profiles/ann?item=i1&fields=features,vector,attributes,sources")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == [
        "user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "interests", "engagement", "vector", "features",
        "attributes",
    ]  # fmt: skip
    assert answer["user_id"] == "ann" and answer["known"] is True and answer["cold_start"] is False
    assert answer["version"] == {
        "number": 1,
        "epoch": 1,
        "age_s": 2.0,
        "mask_generation": 0,
        "sources": {str(SOURCE): 1001},
    }
    assert answer["at"] == "2027-01-15T07:59:55.400Z" and answer["clock"] == "event"
    assert {one["label"] for one in answer["interests"]} == {"shoes", "hats", f"{public_id('tea'):016x}"}
    assert all(len(one["id"]) == 16 for one in answer["interests"])
    assert sum(one["probability"] for one in answer["interests"]) == pytest.approx(1.0, abs=1e-5)
    assert answer["engagement"]["item"] == "i1" and 0 < answer["engagement"]["probability"] < 1
    assert len(answer["vector"]) == 12 and len(answer["features"]) == 128


@pytest.mark.parametrize("path", [b"/v1/profiles/%zz", b"/v1/profiles/100%", b"/health%7"])
def test_a_path_is_rightly_percent_encoded(app: App, path: bytes) -> None:
    status, document = ask_bytes(app, path, b"")
    assert status == 400 and "%25" in document["do"]


def test_a_batch_is_answered_in_order(app: App) -> None:
    """Both forms of the body; each profile is what it would be alone, but for the last bit of a sum in a batch."""
    asked: dict[str, Any] = {"users": ["bob", "ann"], "fields": ["vector", "features"]}
    both = ask(app, "POST", "/v1/profiles:batch", json=asked).json()["profiles"]
    assert [one["user_id"] for one in both] == ["bob", "ann"]
    alone = ask(app, "GET", "/v1/profiles/ann?fields=vector,features").json()
    together, single = both[1].pop("interests"), alone.pop("interests")
    assert [one["label"] for one in together] == [one["label"] for one in single]
    assert [one["probability"] for one in together] == pytest.approx([one["probability"] for one in single], rel=1e-5)
    assert both[1].pop("vector") == pytest.approx(alone.pop("vector"), rel=1e-5, abs=1e-6)
    assert both[1] == alone
    asked = {"profiles": [{"user_id": 7, "item": "i1", "at": "1500", "context": {"device": "tv"}}]}
    (one,) = ask(app, "POST", "/v1/profiles:batch", json=asked).json()["profiles"]
    assert (one["user_id"], one["at_ms"], one["cold_start"]) == ("7", 1500, True)


def test_the_best_interests_are_those_of_the_whole_answer(app: App) -> None:
    every = ask(app, "GET", "/v1/profiles/ann?top=10000").json()["interests"]
    best = ask(app, "GET", "/v1/profiles/ann?top=2").json()["interests"]
    assert len(every) == 3 and best == every[:2]


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "what"),
    [
        ("GET", "/nothing", {}, 404, "/nothing"),
        ("GET", "/v1/profiles/", {}, 404, "/v1/profiles/"),
        ("GET", "/v1/profiles/ann?at=-5", {}, 400, "-5"),
        ("GET", "/v1/profiles/ann?fields=vector,vektor", {}, 400, "vektor"),
        ("GET", "/v1/profiles/ann?top=0", {}, 400, "parameter top"),
        (
            "POST",
            "/v1/profiles:batch",
            {"json": {"users": ["a"], "fields": ["vektor"]}},
            400,
            "/fields/0: invalid enum value",
        ),
        ("GET", "/v1/profiles/ann?at=99999999999999999", {}, 400, "no time"),
        ("DELETE", "/v1/profiles/ann", {}, 405, "DELETE"),
        ("POST", "/v1/profiles:batch", {"content": b"{"}, 400, "no JSON"),
        ("POST", "/v1/profiles:batch", {"content": b"\xff\xfe"}, 400, "no JSON"),
        ("POST", "/v1/profiles:batch", {"content": b'{"users": ["\xff"]}'}, 400, "no JSON"),
        ("POST", "/v1/profiles:batch", {"content": b'{"users": ["\\ud800"]}'}, 400, "no JSON"),
        ("POST", "/v1/profiles:batch", {"content": b'{"users":' + b"[" * 100_000}, 400, "no JSON"),
        ("POST", "/v1/profiles:batch", {"json": []}, 400, "expected `object`"),
        ("POST", "/v1/profiles:batch", {"json": {}}, 400, "missing required field `profiles`"),
        ("POST", "/v1/profiles:batch", {"content": b" " * (1 << 20) + b"{}"}, 413, "1048576 bytes"),
        ("PUT", "/healthz", {}, 405, "PUT"),
    ],
)
def test_an_error_says_what_and_what_to_do(
    app: App, method: str, path: str, more: dict[str, Any], status: int, what: str
) -> None:
    response = ask(app, method, path, **more)
    assert response.status_code == status
    body = response.json()
    assert set(body) - {"where"} == {"error", "do"} and what in body["error"] and body["do"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"users": [None]}, "/users/0"),
        ({"users": ["a"] * (MOST_PROFILES + 1)}, "/users"),
        ({"profiles": [{"user_id": "a", "itm": "b"}]}, "/profiles/0"),
        ({"profiles": [{"user_id": "a", "context": []}, {}]}, "/profiles/0/context"),
        ({"profiles": [{"user_id": "a", "context": {"device": []}}]}, "/profiles/0/context/*"),
        ({"profiles": [{"user_id": "a"}, {"user_id": "a", "at": []}]}, "/profiles/1/at"),
        ({"profiles": [{"user_id": "a", "at": "soon"}]}, "/profiles/0/at"),
        ({"profiles": [{"user_id": "a", "item": 1.5}]}, "/profiles/0/item"),
        ({"profiles": [{"user_id": True}]}, "/profiles/0/user_id"),
    ],
)
def test_what_is_wrong_in_a_body_has_its_place(app: App, body: Any, where: str) -> None:
    response = ask(app, "POST", "/v1/profiles:batch", json=body)
    assert (response.status_code, response.json()["where"]) == (400, where)


@pytest.mark.parametrize(
    ("query", "where"),
    [
        (b"at=soon", "at"),
        (b"itm=i1", "itm"),
        (b"item=%FF", "item"),
        (b"context=tv", "context"),
        (b"context.=tv", "context."),
        (b"item.x=1", "item.x"),
    ],
)
def test_what_is_wrong_in_a_parameter_has_its_name(app: App, query: bytes, where: str) -> None:
    status, said = ask_bytes(app, b"/v1/profiles/ann", query)
    assert (status, said["where"]) == (400, where)
    if where == "itm":
        assert "item, category, at, context, fields, top" in said["do"]


def test_every_endpoint_refuses_a_parameter_that_it_does_not_know(app: App) -> None:
    for endpoint in app.endpoints:
        if not endpoint.methods:  # as TensorFlow Serving does
            continue
        path = endpoint.path.replace("{", "").replace("}", "")
        response = ask(app, endpoint.methods[0], f"{path}?nosuch=1", content=b"{}")
        assert response.status_code == 400, endpoint.name
        if endpoint.methods[0] == "GET":
            assert response.json()["where"] == "nosuch", endpoint.name


def test_a_query_is_utf_8_percent_encoded_or_not(app: App) -> None:
    for query in (b"item=caf\xc3\xa9", b"item=caf%C3%A9"):
        assert ask_bytes(app, b"/v1/profiles/ann", query)[1]["engagement"]["item"] == "café"
    assert ask_bytes(app, b"/v1/profiles/%FF", b"")[1]["where"] == "user_id"


def test_a_body_has_at_most_a_mebibyte(app: App) -> None:
    body = b'{"users": ["ann"]}'
    for size, status in ((1 << 20, 200), ((1 << 20) + 1, 413)):
        assert ask(app, "POST", "/v1/profiles:batch", content=body.ljust(size)).status_code == status


def test_another_method_is_told_which_are_offered(app: App) -> None:
    assert ask(app, "PUT", "/healthz").headers["allow"] == "GET, HEAD"


def test_readiness_names_what_is_missing(stores: Stores) -> None:
    app = app_of(stores)
    assert ask(app, "GET", "/readyz").json() == {"ready": True, "version": True, "program": True, "histories": True}
    app.close()
    program = stores.settings.serving_dir / PROGRAMS / f"{digest_of(stores.lowered)}.tflite"
    program.unlink()
    response = ask(app, "GET", "/readyz")
    assert response.status_code == 503
    assert (response.json()["version"], response.json()["program"], response.json()["histories"]) == (True, False, True)
    assert "the applier copies it" in response.json()["error"]
    answer = ask(app, "GET", "/v1/profiles/ann")
    assert answer.status_code == 503 and "program" in answer.json()["error"]
    assert ask(app, "GET", "/healthz").status_code == 200
    app.close()


def test_before_the_applier_nothing_is_ready(tmp_path: Path, stores: Stores) -> None:
    """A worker may start first; it says what it waits for, and answers once that is there."""
    paths = replace(stores.settings.paths, state=str(tmp_path / "elsewhere"))
    app = app_of(stores, paths=paths)
    response = ask(app, "GET", "/v1/profiles/ann")
    assert response.status_code == 503 and "start the applier" in response.json()["do"]
    assert ask(app, "GET", "/readyz").json()["version"] is False
    (tmp_path / "elsewhere").mkdir()
    stores.settings.serving_dir.rename(tmp_path / "elsewhere" / stores.settings.serving_dir.name)
    assert ask(app, "GET", "/v1/profiles/ann").status_code == 200
    app.close()


MAKE_ANEW = """
import sys
from pathlib import Path
import numpy as np
from state.history.store import HistoryStore
from state.history.appends import Appends
from state.events.identity import Salt, user_id
from tests.deploy.serving.stocked import MAP, SALT_KEY, clicks
store = HistoryStore(Path(sys.argv[1]), map_bytes=MAP)
store.commit(Appends.of(np.array([user_id(Salt(SALT_KEY), "cat")], np.uint64), clicks([("hats", "i1", 60_000)])))
store.close()
"""


@pytest.mark.parametrize("later_ms", [2_000, -2_000])
def test_stores_begun_anew_are_opened_again(stores: Stores, later_ms: int) -> None:
    """After a power cut the applier makes other files; a worker that runs on takes them up, whatever the clock does."""
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0])
    assert ask(app, "GET", "/v1/profiles/cat").json()["cold_start"]
    path = stores.settings.serving_dir / "histories"
    path.rename(path.with_name("old"))
    subprocess.run([sys.executable, "-c", MAKE_ANEW, str(path)], check=True)
    now[0] += later_ms
    assert ask(app, "GET", "/v1/profiles/cat").json()["known"]
    app.close()


def test_requests_are_counted_without_ids(stores: Stores) -> None:
    app = app_of(stores)
    for path in ("/v1/profiles/ann", "/v1/profiles/nobody", "/v1/profiles/ann?at=x", "/secret"):
        ask(app, "GET", path)
    text = ask(app, "GET", "/metrics").text
    assert 'springtide_requests_total{code="200",route="profile"} 2.0' in text
    assert 'springtide_requests_total{code="400",route="profile"} 1.0' in text
    assert 'springtide_requests_total{code="404",route="unknown"} 1.0' in text
    assert "springtide_cold_starts_total 1.0" in text
    assert "ann" not in text.replace("channel", "") and "secret" not in text
    assert 'springtide_request_seconds_count{route="profile"} 3.0' in text
    app.close()


def test_who_accepts_openmetrics_gets_it_with_the_version_that_answered(stores: Stores) -> None:
    app = app_of(stores)
    version = ask(app, "GET", "/v1/profiles/ann").json()["version"]["number"]
    asked = ask(app, "GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {one.name: one for one in text_string_to_metric_families(asked.text)}
    named = [one for one in families["springtide_request_seconds"].samples if one.exemplar]
    assert [one.exemplar.labels for one in named] == [{"version": str(version)}]
    assert ask(app, "GET", "/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    app.close()


@pytest.mark.parametrize("text", ["1500", "1970-01-01T00:00:01.5", "1970-01-01T01:00:01.5+01:00", 1500])
def test_times_are_read_in_both_forms(text: str | int) -> None:
    assert time_ms(text) == 1500


@pytest.mark.parametrize(
    "text", ["", "yesterday", "nan", "1e3", "2026-13-01", "-1", "300000000000000", "１５００", "9" * 5000, 10**400]
)
def test_what_is_no_time_is_refused(text: str | int) -> None:
    with pytest.raises(BadRequest, match="no time"):
        time_ms(text)
