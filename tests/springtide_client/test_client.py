"""The client of applications: it returns what the real application answers, retries as set, and keeps its time limit."""

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
from state.process.network import free_port
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
    """Carries requests to the application; `faults` happen to the first requests instead."""

    def __init__(self, app: App, *faults: Fault) -> None:
        self._to_app = httpx.ASGITransport(app=app)
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


Connect = Callable[..., tuple[Client, list[float]]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients, each with the list of its waits in seconds."""
    made: list[Client] = []

    def one(
        transport: Network | None, url: str = URL, timeout_s: float = 10.0, **retries: Any
    ) -> tuple[Client, list[float]]:
        recorded = Recorded(**retries)
        http = httpx.AsyncClient(transport=transport)
        made.append(Client(url, timeout_s=timeout_s, retries=recorded, http=http))
        return made[-1], recorded.waited

    yield one
    for client in made:
        client.close()


@pytest.fixture
def client(app: App, connect: Connect) -> Client:
    return connect(Network(app))[0]


def doubled(waited: list[float], count: int) -> bool:
    """Whether there were so many waits, of 0.1 s at first and twice as long each time, less at most a half."""
    return len(waited) == count and all(2**n / 20 <= wait_s <= 2**n / 10 for n, wait_s in enumerate(waited))


def test_a_profile_is_what_the_server_answers(app: App, client: Client) -> None:
    found = client.profile(
        "ann", item="i1", fields=["vector", "features", "attributes"], top=2, context={"device": "tv"}
    )
    path = "/v1/profiles/ann?item=i1&fields=vector,features,attributes&top=2&context.device=tv"
    assert msgspec.to_builtins(found) == ask(app, "GET", path).json()
    assert client.profile("ann", fields=["sources"]).version.sources and client.profile("ann").vector is None
    bob, ann = client.profiles(["bob", User("ann", "i1", at="1970-01-01T00:00:02Z", context={"device": "tv"})], top=1)
    assert (bob.user_id, ann.user_id, ann.at_ms) == ("bob", "ann", 2000)
    assert bob.engagement is None and ann.engagement is not None and len(bob.interests) == 1


def test_every_argument_is_one_of_the_api(client: Client) -> None:
    """The server refuses a parameter or a field that it does not know."""
    when: dict[str, Any] = {"at": 1_800_000_000_000, "context": {"device": "tv"}}
    items = [Item("i1", bid=2.0, cap=Cap(1, 3600)), Item("new-1", "shoes", 0.5), Item("i9", bid=1.0)]
    ranked = client.rank("ann", items, **when)
    assert [item.item for item in ranked.items] == ["i9", "new-1"] and ranked.left_out[0].item == "i1"
    assert not client.rank("ann", ["i1", "i2"]).left_out
    assert client.recommend("ann", n=1, category="hats", **when).at_ms == when["at"]
    assert len(client.recommend("ann", exclude=["clicked", "shown"]).items) < len(client.recommend("ann").items)
    assert client.similar("ann", n=3, exclude=["clicked"], **when).items == []
    found = client.explain("ann", item="i1", category="hats", top=1, **when)
    assert found.item == "i1" and len(found.reasons) == 1
    assert client.explain("ann", label="hats").label == "hats"


@pytest.mark.parametrize("of_version", [{}, {"version": 1}, {"label": "stable"}])
def test_a_model_is_asked_for_its_versions_its_signatures_and_predictions(
    client: Client, of_version: dict[str, Any]
) -> None:
    assert client.model_status(**of_version).model_version_status[0].version == "1"
    signatures = client.model_metadata(**of_version).metadata["signature_def"]["signature_def"]
    assert set(signatures) == {"serving_default", "raw"}
    ann, bob = client.predict([{"user_id": "ann", "item": "i1"}, {"user_id": "bob"}], **of_version)
    assert 0.0 < ann["engagement"] < 1.0 and bob["engagement"] is None
    with pytest.raises(Refused, match="no label 'x'"):
        client.model_status(label="x")
    with pytest.raises(ClientError, match="both"):
        client.predict([], version=1, label="stable")


def test_segments_and_their_members_are_listed(stores: Stores, connect: Connect) -> None:
    keep(stores, "ann", "bob", "cem")
    with closing(with_segments(stores)) as app:
        client, _ = connect(Network(app), most=0)
        assert [(segment.name, segment.size) for segment in client.segments()] == [("busy", 3), ("idle", 0)]
        first = client.segment("busy", n=2)
        second = client.segment("busy", start=first.next)
        assert len({member.pseudonym for member in first.members + second.members}) == 3 and second.next is None
        assert [client.in_segment("busy", user).is_member for user in ("ann", "dan")] == [True, False]
        with pytest.raises(ServerFailed, match="no lookalikes of busy"):
            client.lookalikes("busy", n=5)


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
        calls: tuple[tuple[Any, ...], ...] = (
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
        )
        for call, *words in calls:
            with pytest.raises(Refused, match="recorded"):
                call(*words)
    paths = ask(app, "GET", "/openapi.json").json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods if method != "head"}

    def is_asked(method: str, path: str) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "[^/:]+", re.escape(path))
        return any(verb == method and re.fullmatch(pattern, one) for verb, one in asked)

    assert {path for method, path in routes if not is_asked(method, path)} == OPERATION


def test_a_user_may_be_called_anything(client: Client) -> None:
    for user in ("a/b c", "Łódź?", "..", "%2F", "#"):
        assert client.profile(user).user_id == user and client.recommend(user).user_id == user
    with pytest.raises(ClientError, match="empty"):
        client.profile("")
    for call in (lambda: client.profile("a\ud800"), lambda: client.rank("a\ud800", ["i1"])):
        with pytest.raises(ClientError, match="Unicode"):
            call()


def test_a_refusal_says_what_where_and_what_to_do(app: App, connect: Connect) -> None:
    client, waited = connect(Network(app))
    with pytest.raises(Refused) as found:
        client.profiles([User("ann", at="soon")])
    assert found.value.status == 400 and found.value.where == "/profiles/0/at"
    assert "soon" in found.value.what and "ISO 8601" in found.value.do and waited == []


def test_what_is_not_ready_is_asked_again_and_then_said(app: App, stores: Stores, connect: Connect) -> None:
    stores.settings.serving_dir.rename(stores.settings.serving_dir.with_name("away"))
    client, waited = connect(network := Network(app), most=2)
    with pytest.raises(ServerFailed, match="applier") as found:
        client.profile("ann")
    assert found.value.status == 503 and doubled(waited, 2) and network.carried == 3
    ready = client.ready()
    assert not ready.ready and not ready.version and "version" in ready.error and network.carried == 4


def test_a_worker_says_when_to_come_again(app: App, connect: Connect) -> None:
    def busy(seconds: int) -> httpx.Response:
        return httpx.Response(429, headers={"retry-after": str(seconds)}, json={"error": "busy", "do": "come again"})

    client, waited = connect(Network(app, busy(2), busy(1)))
    assert client.profile("ann").known and waited == [2.0, 1.0]
    client, waited = connect(Network(app, busy(60)))
    with pytest.raises(Overloaded) as found:
        client.profile("ann")
    assert found.value.retry_after_s == 60 and waited == []


def test_a_connection_that_ends_is_begun_again(app: App, connect: Connect) -> None:
    client, waited = connect(Network(app, httpx.RemoteProtocolError("closed"), httpx.ConnectError("refused")))
    assert client.profile("ann").known and doubled(waited, 2)
    client, waited = connect(None, f"http://127.0.0.1:{free_port()}", most=1)
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
        client.profile("ann")
    assert doubled(waited, 1)


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


def test_silence_ends_with_the_time_that_was_given(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client, waited = connect(None, f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(TimedOut):
            client.profile("ann")
    assert waited == []


HEAD, BODY = b"HTTP/1.1 200 OK\r\ncontent-length: 600\r\n", b'{"ready": true}'.ljust(600)


@pytest.mark.parametrize(("head", "rest"), [(HEAD[:10], HEAD[10:] + b"x: y\r\n" * 90), (HEAD + b"\r\n", BODY)])
def test_a_server_that_drips_does_not_hold_a_call_beyond_its_time(connect: Connect, head: bytes, rest: bytes) -> None:
    """Neither in the head of the answer nor in its body: the time is for the whole call, not for a byte."""
    with dripping(head, rest) as url:
        (client, waited), began_s = connect(None, url, timeout_s=0.5), time.monotonic()
        for call in (client.ready, lambda: client.profile("ann")):
            with pytest.raises(TimedOut):
                call()
    # Each answer takes a minute.
    assert time.monotonic() - began_s < 20.0 and waited == []


def test_tries_end_with_the_time_of_the_call(app: App, connect: Connect) -> None:
    busy = httpx.Response(503, json={"error": "busy", "do": "come again"})
    client, waited = connect(network := Network(app, busy), timeout_s=1.0, first_wait_s=2.0)
    with pytest.raises(ServerFailed):
        client.profile("ann")
    assert waited == [] and network.carried == 1
    client, waited = connect(Network(app, *[busy] * 1_000_000), timeout_s=0.3, most=1_000_000, longest_wait_s=0.001)
    with pytest.raises((ServerFailed, TimedOut)):
        client.profile("ann")
    assert len(waited) > 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, UnexpectedAnswer),
        (404, UnexpectedAnswer),
        (429, Overloaded),
        (502, ServerFailed),
        (503, ServerFailed),
    ],
)
def test_another_server_is_recognised_and_an_error_of_a_proxy_has_its_status(
    app: App, connect: Connect, status: int, error: type[ClientError]
) -> None:
    page = httpx.Response(status, text="<html>no backend</html>", headers={"retry-after": "60"})
    client, _ = connect(Network(app, page, page))
    for call in (lambda: client.profile("ann"), client.ready):
        with pytest.raises(error) as found:
            call()
        assert "ann" not in str(found.value)
        if isinstance(found.value, Refused):
            assert (found.value.status, found.value.retry_after_s) == (status, 60.0)


def test_both_clients_offer_the_same(app: App) -> None:
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

    async def known() -> bool:
        async with AsyncClient(URL, http=httpx.AsyncClient(transport=Network(app))) as client:
            return (await client.profile("ann")).known

    assert asyncio.run(known())


def test_the_program_of_the_readme_runs(stores: Stores, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    port = free_port()
    with worker(stores, port):
        until(lambda: answers(port, "/readyz"))
        exec(compile(program.replace("localhost:8501", f"127.0.0.1:{port}"), str(README), "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
