"""A client that sends requests to the hosts that hold their users, and goes back to its own address where that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from springtide_client import AsyncClient
from springtide_client.answers import ServingHost
from springtide_client.client import AVOIDED_S, TABLE_S, Routes
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.stocked import NOW_MS
from tests.deploy.serving.test_routing import USERS, Network, of_shares
from tests.deploy.serving.test_routing import network as network


def run(network: Network, steps: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    """Uses a routing client of host `a`; `network.asked` has the hosts of its requests, and of those that hosts forwarded."""
    network.run()
    network.asked.clear()

    async def go() -> Any:
        for app in network.apps.values():
            if app.router is not None:
                await app.router.poll()
        async with AsyncClient("http://a", route=True, http=httpx.AsyncClient(transport=network)) as client:
            return await steps(client)

    return asyncio.run(go())


def test_a_user_is_asked_about_at_a_host_of_the_share_from_the_second_time_on(network: Network) -> None:
    theirs = of_shares("32-63")[0]

    async def steps(client: AsyncClient) -> list[str]:
        await client.profile(theirs)
        network.asked.clear()
        answers = [await client.profile(theirs), await client.recommend(theirs), await client.rank(theirs, ["i1"])]
        return [one.user_id for one in answers]

    assert run(network, steps) == [theirs] * 3
    assert len(network.asked) == 3 and set(network.asked) <= {"b", "d"}, "each without a hop"


def test_a_batch_is_divided_by_the_client_and_in_order(network: Network) -> None:
    async def steps(client: AsyncClient) -> list[list[str]]:
        found = []
        for _ in range(2):
            network.asked.clear()
            found.append([one.user_id for one in await client.profiles(USERS)])
        return found

    assert run(network, steps) == [USERS, USERS]
    halves = [{"a", "c"}, {"b", "d"}]
    assert len(network.asked) == 2 and [len(half & set(network.asked)) for half in halves] == [1, 1]


def test_a_host_that_is_away_is_avoided_and_the_own_address_forwards(network: Network) -> None:
    theirs = of_shares("32-63")[0]

    async def steps(client: AsyncClient) -> None:
        await client.profile(theirs)
        network.asked.clear()
        network.away.add("b")
        for _ in range(12):
            assert (await client.profile(theirs)).user_id == theirs

    run(network, steps)
    assert network.asked.count("b") <= 2, "once by the client, once by a host that forwarded"


def test_hosts_without_shares_are_asked_as_by_any_client(network: Network) -> None:
    async def steps(client: AsyncClient) -> None:
        async with AsyncClient("http://whole", route=True, http=httpx.AsyncClient(transport=network)) as other:
            for _ in range(2):
                assert (await other.profile(USERS[0], at=NOW_MS)).user_id == USERS[0]
                assert len(await other.profiles(USERS)) == len(USERS)

    run(network, steps)
    assert set(network.asked) == {"whole"}


@pytest.mark.parametrize("header", [None, "", "7,8", "x"])
def test_what_reports_no_shares_teaches_none(header: str | None) -> None:
    routes = Routes()
    routes.learn(["ann"], header)
    assert not routes.knows(["ann"])


def test_a_table_is_fetched_again_after_a_while_and_an_avoided_host_tried_again() -> None:
    now_s = [0.0]
    routes = Routes(lambda: now_s[0])
    assert [routes.due(), routes.due()] == [True, False]
    now_s[0] = TABLE_S
    assert routes.due()
    routes.fetched([ServingHost("http://b/", "0-31")])
    routes.learn(["ann"], "5")
    assert routes.holders_of("ann") == ("http://b",) and routes.holders_of("bob") == ()
    routes.avoid("http://b")
    assert routes.holders_of("ann") == ()
    now_s[0] += AVOIDED_S
    assert routes.holders_of("ann") == ("http://b",)
