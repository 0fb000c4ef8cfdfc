"""Hosts with parts of the users: each answers as a host with all users would, by itself or through the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.answers.host import Host
from deploy.serving.requests.access import Access
from deploy.serving.requests.grpc_server import GrpcAddress, GrpcServer, message
from deploy.serving.requests.routing import AVOIDED_S, Router
from deploy.serving.requests.worker_metrics import RequestCounts
from deploy.serving.rest import App
from state.config.settings import Settings
from state.errors import CorruptStore
from state.events.identity import Salt, public_id, user_id
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.history.sweeping import Sweeper
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.registry.hosts import LIVE_S
from state.rows.store import RowStore
from state.user_shares import SHARES, UserShares
from tests.deploy.serving.stocked import MAP, NOW_MS, SALT_KEY, Lowered, clicks, digest_of, manifest, small, tensors

USERS = [f"user-{number}" for number in range(40)]
AT = {"at": str(NOW_MS)}
SALT = Salt(SALT_KEY)


Answer = TypeVar("Answer")


def share(user: str) -> int:
    return user_id(SALT, user) % SHARES


def of_shares(shares: str) -> list[str]:
    return [user for user in USERS if user_id(SALT, user) in UserShares.parse(shares)]


def make_host(folder: Path, registry: Path, lowered: Lowered, name: str, shares: str) -> Settings:
    """Writes the same version and clicks as to each other host; the stores keep those of the host's users."""
    settings = small(Settings())
    settings = replace(
        settings,
        paths=replace(settings.paths, state=str(folder), registry=str(registry)),
        serving=replace(settings.serving, shares=shares, advertise=f"http://{name}"),
    )
    serving, held = settings.serving_dir, settings.serving.user_shares
    rows, histories = (
        RowStore(serving / ROWS, MAP, shares=held),
        HistoryStore(serving / HISTORIES, map_bytes=MAP, shares=held),
    )
    (serving / PROGRAMS).mkdir()
    (serving / PROGRAMS / f"{digest_of(lowered)}.tflite").write_bytes(lowered.content)
    names = {"user": USERS[::2], "category": ["shoes", "hats", "books"], "item": ["i1", "i2"]}
    rows.apply(manifest(1, digest_of(lowered)), tensors(lowered, 1, names, ["shoes", "hats"]), NOW_MS, follow=True)
    labels = [("hats", "i1"), ("shoes", "i2"), ("books", "i3")]
    events = clicks([(*labels[number % 3], 1000 * number + 5000) for number in range(len(USERS))])
    extra = {"clock": b'{"event_ms": %d, "accepted_ms": %d}' % (NOW_MS, NOW_MS), "caught_up": b"1"}
    extra |= {
        f"item:{public_id(item):016x}": public_id(label).to_bytes(8, "big") + item.encode() for label, item in labels
    }
    extra |= {f"name:{public_id(label):016x}": label.encode() for label, _ in labels}
    users = np.array([user_id(SALT, user) for user in USERS], np.uint64)
    histories.commit(Appends.of(users, events), (), extra)
    for store in (rows, histories):
        store.close()
    return settings


@dataclass
class Network(httpx.AsyncBaseTransport):
    """Delivers requests to the applications by host name; a host that is `away` refuses connections."""

    apps: dict[str, App] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    now_ms: int = NOW_MS

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = request.url.host
        self.asked.append(name)
        self.tokens.append(request.headers.get("authorization"))
        if name in self.away:
            raise httpx.ConnectError("refused", request=request)
        return await httpx.ASGITransport(app=self.apps[name]).handle_async_request(request)

    def run(self, *steps: Callable[[httpx.AsyncClient], Awaitable[Answer]]) -> list[Answer]:
        """Polls the table on each host, and sends requests."""

        async def go() -> list[Answer]:
            for _ in range(2):
                for name, app in self.apps.items():
                    if app.router is not None and name not in self.away:
                        await app.router.poll()
            async with httpx.AsyncClient(transport=self) as client:
                return [await step(client) for step in steps]

        return asyncio.run(go())

    def ask(self, name: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """One request to a host."""
        method = "GET" if body is None else "POST"
        (found,) = self.run(lambda client: client.request(method, f"http://{name}{path}", json=body, headers=headers))
        return found


@pytest.fixture
def network(tmp_path: Path, lowered: Lowered) -> Iterator[Network]:
    """A host with all users that is in no table, and four hosts with halves of them."""
    lowered.model.set_weights(lowered.weights)
    made = Network()
    for name, shares in (("whole", ""), ("a", "0-31"), ("b", "32-63"), ("c", "0-31"), ("d", "32-63")):
        settings = make_host(tmp_path / name, tmp_path / "registry", lowered, name, shares)
        host, registry = Host(settings, SALT, now_ms=lambda: NOW_MS), CollectorRegistry()
        app = made.apps[name] = App(host, registry)
        if shares:
            app.router = Router(settings, SALT, host, app.metrics, lambda: made.now_ms, made)
    yield made
    for app in made.apps.values():
        app.close()


def forwarded(network: Network, name: str, result: str) -> float:
    return float(network.apps[name].metrics.forwarded.labels(result)._value.get())


QUESTIONS: Mapping[str, Callable[[str], tuple[str, Any]]] = {
    "profile": lambda user: (f"/v1/profiles/{user}?item=i1&fields=features,vector,sources&at={NOW_MS}", None),
    "explain": lambda user: (f"/v1/profiles/{user}/explain?item=i1&at={NOW_MS}", None),
    "rank": lambda user: ("/v1/rank", {"user_id": user, "items": ["i1", "i2"], **AT}),
    "recommendations": lambda user: (f"/v1/recommendations/{user}?at={NOW_MS}", None),
    "similar": lambda user: (f"/v1/similar/{user}?at={NOW_MS}", None),
}


def warm_indexes(network: Network) -> None:
    """Indexes of items follow the stores in steps, from the first query on."""
    for name, app in network.apps.items():
        network.ask(name, QUESTIONS["similar"]((of_shares("32-63") if name in "bd" else of_shares("0-31"))[0])[0])
        while app.host.sources().read_more():
            pass


@pytest.mark.parametrize("question", QUESTIONS)
def test_any_host_answers_any_user_like_a_host_with_all_users(network: Network, question: str) -> None:
    warm_indexes(network)
    before = forwarded(network, "a", "answered") + forwarded(network, "b", "answered")
    asked = [QUESTIONS[question](user) for user in USERS[:8]]
    for path, body in asked:
        whole, *others = (network.ask(name, path, body) for name in ("whole", "a", "b"))
        assert whole.status_code == 200
        assert [(one.status_code, one.content) for one in others] == [(200, whole.content)] * 2
    assert forwarded(network, "a", "answered") + forwarded(network, "b", "answered") == before + len(asked)


def test_a_batch_is_answered_by_all_hosts_in_its_order(network: Network) -> None:
    body = {"profiles": [{"user_id": user, **AT} for user in USERS]}
    whole = network.ask("whole", "/v1/profiles:batch", body)
    assert [one["user_id"] for one in whole.json()["profiles"]] == USERS
    network.asked.clear()
    answer = network.ask("a", "/v1/profiles:batch", body)
    assert answer.content == whole.content
    assert len(network.asked) == 2, "one request by the client, and one to a host of the other half"
    wrong = {"profiles": [*body["profiles"], {"user_id": "u", "at": "never"}]}
    refused = network.ask("a", "/v1/profiles:batch", wrong)
    assert (refused.status_code, refused.json()["where"]) == (400, f"/profiles/{len(USERS)}/at")


def test_a_host_that_is_away_is_replaced_by_the_other_one_of_the_share_and_tried_last_for_a_while(
    network: Network,
) -> None:
    network.run()
    network.away.add("b")
    users = of_shares("32-63")
    for user in users:
        assert network.ask("a", f"/v1/profiles/{user}").status_code == 200
    assert network.asked.count("b") == 1
    network.now_ms += int(1000 * AVOIDED_S) + 1
    batch = network.ask("a", "/v1/profiles:batch", {"users": USERS})
    assert [one["user_id"] for one in batch.json()["profiles"]] == USERS


def test_users_whose_share_has_no_host_are_refused_and_the_others_answered(network: Network) -> None:
    network.run()
    network.away |= {"b", "d"}
    mine, theirs = of_shares("0-31")[0], of_shares("32-63")[0]
    assert network.ask("a", f"/v1/profiles/{mine}").status_code == 200
    refused = network.ask("a", f"/v1/profiles/{theirs}")
    assert refused.status_code == 503 and f"share {share(theirs)} " in refused.json()["error"]
    assert network.ask("a", "/v1/profiles:batch", {"users": [mine, theirs]}).status_code == 503
    network.now_ms += int(1000 * LIVE_S)
    assert network.ask("a", f"/v1/profiles/{theirs}").json()["error"].startswith("no live host holds share")
    assert forwarded(network, "a", "failed") == 3


def test_a_host_is_in_the_table_while_it_is_ready_and_not_draining(network: Network) -> None:
    def listed() -> list[str]:
        return sorted(one["address"] for one in network.ask("a", "/v1/hosts").json()["hosts"])

    assert listed() == [f"http://{name}" for name in "abcd"]
    network.apps["b"].draining = True
    assert listed() == [f"http://{name}" for name in "acd"]
    assert network.ask("b", f"/v1/profiles/{of_shares('32-63')[0]}").status_code == 200, "it still answers"
    assert network.ask("whole", "/v1/hosts").json() == {"hosts": []}


def test_a_request_is_forwarded_once_and_never_answered_without_the_users_data(network: Network) -> None:
    theirs = of_shares("32-63")[0]
    refused = network.ask("a", f"/v1/profiles/{theirs}", **{"springtide-forwarded": "c"})
    assert refused.status_code == 503 and "http://b" in refused.json()["do"] + refused.json()["error"]
    predicted = network.ask("a", "/v1/models/profile:predict", {"instances": [{"user_id": theirs}]})
    assert predicted.status_code == 503 and "http://b" in predicted.json()["error"]


CALLS: Mapping[str, Callable[[str], tuple[str, Mapping[str, Any]]]] = {
    "GetProfile": lambda user: ("Profile", {"question": {"user_id": user, "item": "i1", "at_ms": NOW_MS}, "top": 2, "fields": ["features", "vector", "sources"]}),
    "BatchGetProfiles": lambda _: ("BatchGetProfilesResponse", {"questions": [{"user_id": user, "at_ms": NOW_MS} for user in USERS]}),
    "Explain": lambda user: ("Explanation", {"question": {"user_id": user, "item": "i1", "at_ms": NOW_MS}}),
    "Rank": lambda user: ("RankResponse", {"user_id": user, "items": [{"item": "i1", "bid": 2.0}, {"item": "i2", "bid": 1.0}], "at_ms": NOW_MS}),
    "Recommend": lambda user: ("RecommendResponse", {"user_id": user, "exclude": ["shown", "clicked"], "at_ms": NOW_MS}),
    "Similar": lambda user: ("SimilarResponse", {"user_id": user, "n": 1, "at_ms": NOW_MS}),
}  # fmt: skip


def ask_grpc(network: Network, name: str, *calls: tuple[str, str, Mapping[str, Any]]) -> list[Any]:
    """Calls of the service of profiles at a host: answers and errors. Each is a method, its response and its request."""
    app = network.apps[name]

    async def ask(_: httpx.AsyncClient) -> list[Any]:
        counts = RequestCounts(app.metrics, lambda: None)
        server = GrpcServer(app.grpc_services(), counts, app.ready, Access(), GrpcAddress("127.0.0.1:0", False, 10))
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                return await asyncio.gather(
                    *(
                        channel.unary_unary(
                            f"/springtide.v1.Profiles/{method}",
                            request_serializer=type(request).SerializeToString,
                            response_deserializer=message(f"springtide.v1.{response}").FromString,
                        )(request, metadata=[("authorization", "Bearer of the client")])
                        for method, response, fields in calls
                        for request in [message(f"springtide.v1.{method}Request")(**fields)]
                    ),
                    return_exceptions=True,
                )
        finally:
            await server.stop(0)

    (found,) = network.run(ask)
    return found


@pytest.mark.parametrize("method", CALLS)
def test_any_host_answers_any_user_over_grpc_like_a_host_with_all_users(network: Network, method: str) -> None:
    warm_indexes(network)
    calls = [(method, *CALLS[method](user)) for user in USERS[:8]]
    whole, *others = (ask_grpc(network, name, *calls) for name in ("whole", "a", "b"))
    assert [type(one).__name__ for one in whole] == [calls[0][1]] * len(calls)
    for answers in others:
        assert answers == whole
    assert forwarded(network, "a", "answered") + forwarded(network, "b", "answered") >= len(calls)


def test_what_another_host_refuses_is_refused_over_grpc_with_its_reason(network: Network) -> None:
    theirs = of_shares("32-63")[0]
    bad = ("Similar", "SimilarResponse", {"user_id": theirs, "n": 1000})
    (refused,) = ask_grpc(network, "a", bad)
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT and "parameter n: " in refused.details()
    assert network.tokens == ["Bearer of the client"]
    network.run()
    network.away |= {"b", "d"}
    (refused,) = ask_grpc(network, "a", ("Similar", "SimilarResponse", {"user_id": theirs}))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE and f"share {share(theirs)} " in refused.details()


def test_a_response_has_the_shares_of_its_users_if_the_request_asks_for_them(network: Network) -> None:
    users: Sequence[str] = USERS[:5]
    wanted = ",".join(str(share(user)) for user in users)
    answer = network.ask("a", "/v1/profiles:batch", {"users": users}, **{"springtide-share": "1"})
    assert answer.headers["springtide-share"] == wanted
    assert "springtide-share" not in network.ask("a", "/v1/profiles:batch", {"users": users}).headers


def test_a_host_with_other_shares_rebuilds_its_stores_or_drops_the_users_of_others(
    tmp_path: Path, lowered: Lowered
) -> None:
    settings = make_host(tmp_path, tmp_path / "registry", lowered, "a", "0-31")
    rows, histories = settings.serving_dir / ROWS, settings.serving_dir / HISTORIES
    for wider in (UserShares.parse("0-47"), UserShares.parse("")):
        with pytest.raises(CorruptStore, match="holds the users of the shares 0-31"):
            RowStore(rows, MAP, shares=wider)
        with pytest.raises(CorruptStore, match="holds the users of the shares 0-31"):
            HistoryStore(histories, map_bytes=MAP, shares=wider)
    narrow = UserShares.parse("0-15")
    with pytest.raises(CorruptStore):
        RowStore(rows, MAP, shares=narrow)
    store = HistoryStore(histories, map_bytes=MAP, shares=narrow)
    sweeper = Sweeper(store, reach_ms=1 << 40, max_users=1000, elapsed=lambda: 0.0)
    sweeper.sweep(NOW_MS)
    kept = [user for user in USERS if len(store.read(user_id(SALT, user)))]
    assert kept == of_shares("0-15") and store.users() == len(kept) < len(of_shares("0-31"))
    store.close()


def test_an_entry_that_is_not_renewed_leaves_the_table(network: Network) -> None:
    network.run()
    network.away |= set("bcd")
    network.now_ms += int(1000 * LIVE_S)
    assert network.ask("a", "/v1/hosts").json() == {"hosts": [{"address": "http://a", "shares": "0-31"}]}
    assert network.apps["a"].metrics.unheld_shares._value.get() == 32
