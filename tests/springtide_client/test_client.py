"""The client of applications, in both its forms: what it returns is what the real application answers, and it is patient as told."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from deploy.serving.rest import App
from springtide_client import (
    AsyncClient,
    Cap,
    Client,
    ClientError,
    Item,
    Overloaded,
    Refused,
    Retries,
    ServerFailed,
    TimedOut,
    UnexpectedAnswer,
    Unreachable,
    User,
)
from state.process.ports import free_port
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.conftest import stores as stores
from tests.deploy.serving.http_api.test_app import app as app
from tests.deploy.serving.http_api.test_app import ask
from tests.deploy.serving.http_api.test_segments import keep, with_segments
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import answers, until, worker

Fault = httpx.Response | Exception
URL = "http://worker"
README = Path(__file__).parents[2] / "README.md"


class Network(httpx.AsyncBaseTransport):
    """Carries requests to the application, after some faults.

    Args:
        app: The application.
        faults: What happens to the first requests instead.
    """

    def __init__(self, app: App, *faults: Fault) -> None:
        self._to_app = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        self._faults = list(faults)
        self.carried = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.carried += 1
        if self._faults:
            fault = self._faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault
        return await self._to_app.handle_async_request(request)


@dataclass(frozen=True)
class Recorded(Retries):
    """Records the waits, and does not wait."""

    waited: list[float] = field(default_factory=list)

    def wait_s(self, tried: int, retry_after_s: float | None, left_s: float = math.inf) -> float | None:
        wait_s = super().wait_s(tried, retry_after_s, left_s)
        if wait_s is not None:
            self.waited.append(wait_s)
        return wait_s and 0.0


class Calls:
    """A client of either form, called without an event loop.

    Args:
        kind: `Client` or `AsyncClient`.
        transport: Carries the requests; None for the real network.
        url: The address.
        retries: Fields of `Retries`.

    Attributes:
        waited: The waits in seconds.
    """

    def __init__(
        self, kind: type, transport: Network | None, url: str = URL, timeout_s: float = 10.0, **retries: Any
    ) -> None:
        recorded = Recorded(**retries)
        self.waited = recorded.waited
        http = httpx.AsyncClient(transport=transport)
        self._made = kind(url, timeout_s=timeout_s, retries=recorded, http=http)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            found = getattr(self._made, name)(*words, **more)
            return asyncio.run(found) if inspect.isawaitable(found) else found

        return call


def doubled(waited: list[float], count: int) -> bool:
    """Whether there were so many waits, of 0.1 s at first and twice as long each time, less at most a half."""
    return len(waited) == count and all(2**n / 20 <= wait_s <= 2**n / 10 for n, wait_s in enumerate(waited))


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> type:
    made: type = request.param
    return made


@pytest.fixture
def calls(app: App, kind: type) -> Iterator[Calls]:
    made = Calls(kind, Network(app))
    yield made
    made.close()


def test_a_profile_is_what_the_server_answers(app: App, calls: Calls) -> None:
    found = calls.profile(
        "ann", item="i1", fields=["vector", "features", "attributes"], top=2, context={"device": "tv"}
    )
    path = "/v1/profiles/ann?item=i1&fields=vector,features,attributes&top=2&context.device=tv"
    assert msgspec.to_builtins(found) == ask(app, "GET", path).json()
    assert found.engagement.item == "i1" and len(found.interests) == 2 and found.version.number == 1
    assert calls.profile("ann", fields=["sources"]).version.sources and calls.profile("ann").vector is None
    assert calls.profile("nobody", at=1500).at_ms == 1500 and calls.profile("nobody").cold_start


def test_many_profiles_come_in_their_order(calls: Calls) -> None:
    found = calls.profiles(["bob", User("ann", item="i1", at="1970-01-01T00:00:02Z", context={"device": "tv"})], top=1)
    assert [one.user_id for one in found] == ["bob", "ann"] and found[1].at_ms == 2000
    assert found[0].engagement is None and found[1].engagement.item == "i1" and len(found[0].interests) == 1


def test_items_are_ranked_and_recommended(app: App, calls: Calls) -> None:
    ranked = calls.rank("ann", ["i1", Item("new-1", category="shoes"), "i9"])
    body = {"user_id": "ann", "items": ["i1", {"item": "new-1", "category": "shoes"}, "i9"]}
    theirs = ask(app, "POST", "/v1/rank", json=body).json()
    assert msgspec.to_builtins(ranked)["items"] == theirs["items"] and {one.item for one in ranked.items} >= {"new-1"}
    bidding = calls.rank(
        "ann", [Item("i1", bid=2.0, cap=Cap(1, 3600)), Item("new-1", "shoes", 0.5), Item("i9", bid=1.0)]
    )
    assert [one.item for one in bidding.items] == ["i9", "new-1"] and not ranked.left_out
    assert all(one.expected_value == one.probability * one.bid for one in bidding.items)
    assert [(one.item, one.reason, one.seen) for one in bidding.left_out] == [("i1", "cap", 1)]
    found = calls.recommend("ann", n=3)
    assert 0 < len(found.items) <= 3 and {one.reason for one in found.items} <= {
        "again",
        "category",
        "similar",
        "popular",
    }
    assert len(calls.recommend("ann", category="shoes", exclude_seen=True).items) < len(calls.recommend("ann").items)
    near = calls.similar("ann", n=3)
    assert (near.user_id, near.version.number) == ("ann", 1) and {one.item for one in near.items} <= {"i1"}
    assert calls.similar("ann", exclude_seen=True).items == []


def test_an_answer_is_explained(app: App, calls: Calls) -> None:
    found = calls.explain("ann", label="hats", top=1)
    theirs = ask(app, "GET", "/v1/profiles/ann/explain?label=hats&top=1").json()
    assert found.label == "hats" and len(found.reasons) == 1 and found.reasons[0].words == theirs["reasons"][0]["words"]
    assert abs(found.probability - found.cold_start_probability - found.reasons[0].share - found.rest) < 1e-3
    with pytest.raises(Refused, match="one category or one item"):
        calls.explain("ann")


@pytest.mark.parametrize("of_version", [{}, {"version": 1}, {"label": "stable"}])
def test_a_model_is_asked_for_its_versions_its_signatures_and_predictions(
    calls: Calls, of_version: dict[str, Any]
) -> None:
    assert calls.model_status(**of_version).model_version_status[0].version == "1"
    metadata = calls.model_metadata(**of_version)
    assert metadata.model_spec.name == "profile"
    assert set(metadata.metadata["signature_def"]["signature_def"]) == {"serving_default", "raw"}
    ann, bob = calls.predict([{"user_id": "ann", "item": "i1"}, {"user_id": "bob"}], **of_version)
    assert ann["engagement"] == pytest.approx(
        calls.profile("ann", item="i1", at=ann["at"]).engagement.probability, abs=1e-5
    )
    assert bob["engagement"] is None
    with pytest.raises(Refused, match="no label 'x'"):
        calls.model_status(label="x")
    with pytest.raises(ClientError, match="both"):
        calls.predict([], version=1, label="stable")


def test_segments_and_their_members_are_listed(stores: Stores, kind: type) -> None:
    keep(stores, "ann", "bob", "cem")
    with closing(with_segments(stores)) as app:
        calls = Calls(kind, Network(app), most=0)
        assert [(one.name, one.size) for one in calls.segments()] == [("busy", 3), ("idle", 0)]
        first = calls.segment("busy", n=2)
        second = calls.segment("busy", start=first.next)
        assert len({one.pseudonym for one in first.members + second.members}) == 3 and second.next is None
        assert [calls.in_segment("busy", user).is_member for user in ("ann", "dan")] == [True, False]
        with pytest.raises(ServerFailed, match="no lookalikes of busy"):
            calls.lookalikes("busy", n=5)
        with pytest.raises(Refused, match="no segment 'nobody'"):
            calls.segment("nobody")
        calls.close()


OPERATION = {"/healthz", "/metrics", "/openapi.json", "/docs"}
"""What monitoring asks, and people."""


def test_the_client_has_a_call_for_every_route(app: App) -> None:
    asked = set[tuple[str, str]]()

    class Recorder(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            asked.add((request.method, request.url.path))
            return httpx.Response(404, json={"error": "recorded"})

    versions: list[dict[str, Any]] = [{}, {"version": 7}, {"label": "stable"}]
    with Client(URL, http=httpx.AsyncClient(transport=Recorder())) as client:
        for call, *words in (
            *((one, "ann") for one in (client.profile, client.recommend, client.similar, client.explain)),
            *((one,) for one in (client.segments, client.hosts, client.ready)),
            *((one, "busy") for one in (client.segment, client.lookalikes)),
            (client.profiles, ["ann"]),
            (client.rank, "ann", ["i1"]),
            (client.in_segment, "busy", "ann"),
            *(
                (one,)
                for of in versions
                for one in (partial(client.model_status, **of), partial(client.model_metadata, **of))
            ),
            *((partial(client.predict, **of), [{}]) for of in versions),
        ):
            with pytest.raises(Refused, match="recorded"):
                call(*words)
    paths = ask(app, "GET", "/openapi.json").json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods if method != "head"}

    def is_asked(method: str, path: str) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "[^/:]+", re.escape(path))
        return any(verb == method and re.fullmatch(pattern, one) for verb, one in asked)

    assert {path for method, path in routes if not is_asked(method, path)} == OPERATION


def test_a_user_may_be_called_anything(calls: Calls) -> None:
    for user in ("a/b c", "Łódź?", "..", "%2F", "#"):
        assert calls.profile(user).user_id == user and calls.recommend(user).user_id == user
    with pytest.raises(ClientError, match="empty"):
        calls.profile("")


def test_a_refusal_says_what_where_and_what_to_do(calls: Calls) -> None:
    with pytest.raises(Refused) as found:
        calls.profiles([User("ann", at="soon")])
    assert found.value.status == 400 and found.value.where == "/profiles/0/at"
    assert "soon" in found.value.what and "ISO 8601" in found.value.do and calls.waited == []


def test_what_is_not_ready_is_asked_again_and_then_said(app: App, stores: Stores, kind: type) -> None:
    stores.settings.serving_dir.rename(stores.settings.serving_dir.with_name("away"))
    calls = Calls(kind, network := Network(app), most=2)
    with pytest.raises(ServerFailed, match="applier") as found:
        calls.profile("ann")
    assert found.value.status == 503 and doubled(calls.waited, 2) and network.carried == 3
    ready = calls.ready()
    assert not ready.ready and not ready.version and "version" in ready.error and network.carried == 4


def test_a_worker_says_when_to_come_again(app: App, kind: type) -> None:
    def busy(seconds: int) -> httpx.Response:
        return httpx.Response(429, headers={"retry-after": str(seconds)}, json={"error": "busy", "do": "come again"})

    calls = Calls(kind, Network(app, busy(2), busy(1)))
    assert calls.profile("ann").known and calls.waited == [2.0, 1.0]
    calls = Calls(kind, Network(app, busy(60)))
    with pytest.raises(Overloaded) as found:
        calls.profile("ann")
    assert found.value.retry_after_s == 60 and calls.waited == []


def test_a_connection_that_ends_is_begun_again(app: App, kind: type) -> None:
    calls = Calls(kind, Network(app, httpx.RemoteProtocolError("closed"), httpx.ConnectError("refused")))
    assert calls.profile("ann").known and doubled(calls.waited, 2)


def test_nobody_there_is_unreachable(kind: type) -> None:
    calls = Calls(kind, None, f"http://127.0.0.1:{free_port()}", most=1)
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
        calls.profile("ann")
    assert doubled(calls.waited, 1)


def test_silence_ends_with_the_time_that_was_given(kind: type) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        calls = Calls(kind, None, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(TimedOut):
            calls.profile("ann")
    assert calls.waited == []


@contextmanager
def dripping(head: bytes, rest: bytes) -> Iterator[str]:
    """The address of a server that answers a request with `head`, and then with a byte of `rest` each 0.1 s."""

    def answer(client: socket.socket) -> None:
        # The client ends the connection first.
        with client, suppress(OSError):
            client.recv(1 << 16)
            client.sendall(head)
            for byte in rest:
                client.sendall(bytes([byte]))
                time.sleep(0.1)

    def accept(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, args=(server,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("in_head", [True, False])
def test_a_server_that_drips_does_not_hold_a_call_beyond_its_time(kind: type, in_head: bool) -> None:
    """Neither in the head of the answer nor in its body: the time is for the whole call, not for a byte."""
    head, body = b"HTTP/1.1 200 OK\r\ncontent-length: 600\r\n", b'{"ready": true}'.ljust(600)
    parts = (head[:10], head[10:] + b"x: y\r\n" * 90) if in_head else (head + b"\r\n", body)
    with dripping(*parts) as url:
        calls, began_s = Calls(kind, None, url, timeout_s=0.5), time.monotonic()
        with pytest.raises(TimedOut):
            calls.ready()
        with pytest.raises(TimedOut):
            calls.profile("ann")
    # Each answer takes a minute.
    assert time.monotonic() - began_s < 20.0 and calls.waited == []


def test_tries_end_with_the_time_of_the_call(app: App, kind: type) -> None:
    busy = httpx.Response(503, json={"error": "busy", "do": "come again"})
    calls = Calls(kind, network := Network(app, busy), timeout_s=1.0, first_wait_s=2.0)
    with pytest.raises(ServerFailed):
        calls.profile("ann")
    assert calls.waited == [] and network.carried == 1
    calls = Calls(kind, Network(app, *[busy] * 1_000_000), timeout_s=0.3, most=1_000_000, longest_wait_s=0.001)
    with pytest.raises((ServerFailed, TimedOut)):
        calls.profile("ann")
    assert len(calls.waited) > 1


@pytest.mark.parametrize(("status", "error"), [(429, Overloaded), (502, ServerFailed), (503, ServerFailed)])
def test_an_error_of_a_proxy_has_its_status(app: App, kind: type, status: int, error: type[Refused]) -> None:
    page = httpx.Response(status, text="<html>no backend</html>", headers={"retry-after": "60"})
    calls = Calls(kind, Network(app, page, page))
    for call in (lambda: calls.profile("ann"), calls.ready):
        with pytest.raises(error) as found:
            call()
        assert (found.value.status, found.value.retry_after_s) == (status, 60.0) and "ann" not in str(found.value)


def test_what_is_no_unicode_is_an_error_of_the_client(calls: Calls) -> None:
    for call in (
        lambda: calls.profile("a\ud800"),
        lambda: calls.profile("ann", item="a\ud800"),
        lambda: calls.rank("a\ud800", ["i1"]),
    ):
        with pytest.raises(ClientError, match="Unicode"):
            call()


@pytest.mark.parametrize("status", [200, 404])
def test_another_server_is_recognised(app: App, kind: type, status: int) -> None:
    calls = Calls(kind, Network(app, httpx.Response(status, text="<html>welcome</html>")))
    with pytest.raises(UnexpectedAnswer) as found:
        calls.profile("ann")
    assert "ann" not in str(found.value)


def test_both_clients_offer_the_same() -> None:
    """Each call with its arguments and its documentation; `close` ends the thread."""

    def calls(kind: type) -> dict[str, Any]:
        return {
            name: (list(inspect.signature(one).parameters), inspect.getdoc(one))
            for name, one in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient) and len(calls(Client)) == 16
    before = threading.active_count()
    with Client(URL):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_the_program_of_the_readme_runs(stores: Stores, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    port = free_port()
    with worker(stores, port):
        until(lambda: answers(port, "/readyz"))
        exec(compile(program.replace("localhost:8501", f"127.0.0.1:{port}"), str(README), "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
