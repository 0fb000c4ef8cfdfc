"""The clients: `AsyncClient` for asyncio programs, and `Client` with the same calls for programs without an event loop.

Every call only reads, so a call whose response was lost can safely be sent again.

Each message of an exception gives the cause and the remedy.

ClientError
├── Unreachable         the address cannot be reached
├── TimedOut            no response arrived in time
├── Refused             the response is an error: status, what, do, where
│   ├── Overloaded      429: more requests than can be served in time
│   └── ServerFailed    5xx: not ready, too late, or failed
└── UnexpectedAnswer    the response is not from Springtide, or has another format
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from springtide_client.answers import (
    Explanation,
    Failure,
    ModelMetadata,
    ModelPredictions,
    ModelStatus,
    Profile,
    Profiles,
    Ranking,
    Readiness,
    Recommendations,
    SegmentLookalikes,
    SegmentPage,
    SegmentSize,
    SegmentSizes,
    ServingHost,
    ServingHosts,
    SimilarItems,
    UserSegment,
)


class ClientError(Exception):
    """Base class of the client's errors: a call got no response, or an error. `what` happened, and what to `do`."""

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; {do}" if do else what)
        self.what, self.do = what, do


class Unreachable(ClientError):
    """The address cannot be reached. Check whether a worker runs there."""


class TimedOut(ClientError):
    """No response arrived in time. Allow more time, or request less at once."""


class Refused(ClientError):
    """The response is an error.

    Args:
        status: HTTP status code.
        where: The part of the request at fault, if there is one: a parameter, or a JSON pointer into the body.
        retry_after_s: The wait in seconds that the worker requests before a retry; None if it requests none.
    """

    def __init__(
        self, status: int, what: str, do: str = "", where: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(what, do)
        self.status, self.where, self.retry_after_s = status, where, retry_after_s


class Overloaded(Refused):
    """The worker receives more requests than it can serve in time. Send fewer, or run more workers."""


class ServerFailed(Refused):
    """The worker is not ready, exceeded its deadline, or failed. Its log gives the cause."""


class UnexpectedAnswer(ClientError):
    """The response is not from Springtide, or has another format. Check the address and any proxies in between."""


SHARE = "springtide-share"
"""Header that requests the shares of the users of a request; the response has it with the shares."""
TABLE_S = 5.0
"""How old the table of hosts may be."""
AVOIDED_S = 30.0
"""How long no request is sent to a host that did not answer."""
MOST_USERS = 200_000
"""Users whose share is remembered, some 20 MB."""


class Routes:
    """The hosts and users' shares that a client has learned. Used in one event loop."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._shares: dict[str, int] = {}
        self._hosts: list[tuple[str, frozenset[int]]] = []
        self._avoided: dict[str, float] = {}
        self._due_s = float("-inf")

    def due(self) -> bool:
        """Whether the table of hosts is to be fetched now; true once every `TABLE_S`."""
        if self._clock_s() < self._due_s:
            return False
        self._due_s = self._clock_s() + TABLE_S
        return True

    def fetched(self, hosts: Sequence[ServingHost]) -> None:
        """Takes the table of hosts."""
        self._hosts = [(host.address.rstrip("/"), shares_in(host.shares)) for host in hosts]

    def learn(self, users: Sequence[str], header: str | None) -> None:
        """Remembers the shares of users as a response reports them."""
        shares = (header or "").split(",")
        if len(shares) != len(users) or not all(share.isdigit() for share in shares):
            return
        while len(self._shares) + len(users) > MOST_USERS and self._shares:
            # The user that was learned first.
            del self._shares[next(iter(self._shares))]
        self._shares.update(zip(users, map(int, shares), strict=True))

    def knows(self, users: Sequence[str]) -> bool:
        """Whether the shares of all these users are known."""
        return all(user in self._shares for user in users)

    def holders_of(self, user: str) -> tuple[str, ...]:
        """Returns the addresses of the hosts that hold a user; none if they or the user's share are unknown."""
        share, now_s = self._shares.get(user), self._clock_s()
        return tuple(
            address for address, shares in self._hosts if share in shares and self._avoided.get(address, 0.0) <= now_s
        )

    def avoid(self, address: str) -> None:
        """Sends no requests to a host for a while."""
        self._avoided[address] = self._clock_s() + AVOIDED_S


def shares_in(text: str) -> frozenset[int]:
    """Parses the shares of a host.

    >>> sorted(shares_in("0-2,32"))
    [0, 1, 2, 32]
    """
    shares = set[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        shares.update(range(int(first), int(last or first) + 1))
    return frozenset(shares)


TIMEOUT_S = 10.0
DIRECT_S = 2.0
"""How long a host may take to answer before the request goes to the client's own address."""
AGAIN = frozenset((429, 503))
"""HTTP status codes of temporary refusals."""
T = TypeVar("T")
P = ParamSpec("P")


class Cap(msgspec.Struct, frozen=True):
    """The maximum number of times (`count`) that a user may see an item within a period.

    The period ends at the requested time (`at`) and has `within_s` seconds.
    """

    count: int
    within_s: float


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """An item to rank; `item` and `category` are raw ids.

    Attributes:
        category: Its category; by default the one it was last seen in.
        bid: What an engagement is worth; either all items have a bid, or none.
        cap: How often the user may see it.
    """

    item: str
    category: str | None = None
    bid: float | None = None
    cap: Cap | None = None


class User(msgspec.Struct, frozen=True, omit_defaults=True):
    """One user of a batch request.

    Attributes:
        item: An item; the response then includes the probability that the user engages with it.
        category: The item's category; by default the one it was last seen in.
        at: The time to compute the profile for: milliseconds since 1970, or ISO 8601; by default now.
    """

    user_id: str
    item: str | None = None
    category: str | None = None
    at: str | int | None = None
    context: dict[str, str] | None = None


@dataclass(frozen=True)
class Retries:
    """How often and for how long a client retries temporary refusals and broken connections.

    Attributes:
        most: Maximum number of retries after the first attempt; 0 for none.
        longest_wait_s: Maximum wait before one retry. If a worker asks for a longer one, the call is not retried.
        first_wait_s: Wait before the first retry if the worker asks for none; it doubles with each retry.
    """

    most: int = 3
    longest_wait_s: float = 5.0
    first_wait_s: float = 0.1

    def wait_s(self, tried: int, retry_after_s: float | None, left_s: float = math.inf) -> float | None:
        """Returns how long to wait after attempt number `tried`; None for no further attempt.

        Without `retry_after_s`, jitter shortens the wait by up to a half. `left_s` is the time until the call's
        deadline, after which there is no attempt.

        >>> Retries().wait_s(1, 2.0), Retries().wait_s(1, 60.0), Retries().wait_s(1, 2.0, left_s=1.5)
        (2.0, None, None)
        >>> 2.5 <= Retries(most=10_000).wait_s(5000, None) <= 5.0
        True
        """
        if tried > self.most:
            return None
        wait_s = retry_after_s
        if wait_s is None:
            # 2.0**1024 overflows; the wait reaches its maximum long before.
            longest_s = min(self.first_wait_s * 2.0 ** min(tried - 1, 1000), self.longest_wait_s)
            wait_s = longest_s * random.uniform(0.5, 1.0)
        return wait_s if wait_s <= self.longest_wait_s and wait_s < left_s else None


class AsyncClient:
    """Asynchronous client of one serving address. Use it in an `async with`, or call `close`.

    Tasks of one event loop may share it.

    Args:
        url: Address of a worker, or of a load balancer in front of several, such as `http://localhost:8501`.
        timeout_s: Time limit of a call in seconds, including all retries and the waits between them.
        token: Sent with each request as `authorization: Bearer`, if the server requires one.
        route: Whether to send requests to the hosts that hold their users (`serving.shares`), as soon as those are
            known; other requests go to `url`. The hosts' addresses must be reachable from here.
        http: Sends the requests, for example through a proxy or with another certificate; `close` closes it. By
            default, a client with httpx's defaults.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries = Retries(),
        token: str | None = None,
        route: bool = False,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._routes = Routes() if route else None
        self._url, self._retries, self._timeout_s = url.rstrip("/"), retries, timeout_s
        self._http = http or httpx.AsyncClient()
        if token is not None:
            self._http.headers["authorization"] = f"Bearer {token}"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def profile(
        self,
        user_id: str,
        *,
        item: str | None = None,
        category: str | None = None,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
        fields: Sequence[str] = (),
        top: int | None = None,
    ) -> Profile:
        """Returns one user's profile.

        Args:
            user_id: The raw id.
            item: An item; the answer then has the probability that the user engages with it.
            category: The item's category; by default the one that it was last seen in.
            at: The time to answer for: milliseconds since 1970, or ISO 8601; by default now.
            context: Values of context fields.
            fields: Optional parts of the answer: of `features`, `vector`, `attributes`, `sources`.
            top: The most interests of the answer; by default 10.

        Raises:
            ClientError: See the module.
        """
        parameters = {"item": item, "category": category, "at": at, "fields": ",".join(fields) or None, "top": top}
        return await self._get("/v1/profiles/{}", user_id, Profile, parameters, context)

    async def profiles(
        self, users: Sequence[str | User], *, fields: Sequence[str] = (), top: int | None = None
    ) -> list[Profile]:
        """Returns the profiles of up to 1,000 users in their order; otherwise as `profile`.

        They are all of one version, unless hosts hold parts of the users: then those of one host are.
        """
        named = [User(user) if isinstance(user, str) else user for user in users]
        options = _without_none({"fields": list(fields) or None, "top": top})

        async def part(indices: Sequence[int]) -> list[Profile]:
            users_of_part = [named[index] for index in indices]
            body, ids = (
                {"profiles": msgspec.to_builtins(users_of_part), **options},
                [user.user_id for user in users_of_part],
            )
            return (await self._ask("POST", "/v1/profiles:batch", Profiles, ids, json=body)).profiles

        if self._routes is None or not named:
            return await part(range(len(named)))
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, user in enumerate(named):
            groups.setdefault(self._routes.holders_of(user.user_id), []).append(index)
        parts = await asyncio.gather(*map(part, groups.values()))
        by_place = {
            index: profile
            for indices, profiles in zip(groups.values(), parts, strict=True)
            for index, profile in zip(indices, profiles, strict=True)
        }
        return [by_place[index] for index in range(len(named))]

    async def rank(
        self,
        user_id: str,
        items: Sequence[str | Item],
        *,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Ranks up to 1,000 items, the most probable for this user first; arguments and errors as of `profile`.

        With bids, the item of the highest expected value comes first. Items at their cap are only in `left_out`.
        """
        body = {"user_id": user_id, "items": msgspec.to_builtins(list(items)), "at": at, "context": context}
        return await self._ask("POST", "/v1/rank", Ranking, [user_id], json=_without_none(body))

    async def recommend(
        self,
        user_id: str,
        *,
        n: int | None = None,
        category: str | None = None,
        exclude: Sequence[str] = (),
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Recommendations:
        """Returns items for this user, each with its reason; other arguments as of `profile`.

        Args:
            user_id: The raw id.
            n: The most items, up to 100; by default 20.
            category: Only items of this category.
            exclude: Which items are left out: `clicked`, those that the user clicked; `shown`, those only shown.
            at: As of `profile`.
            context: Likewise.

        Raises:
            ClientError: See the module.
        """
        parameters = {"n": n, "category": category, "exclude": ",".join(exclude) or None, "at": at}
        return await self._get("/v1/recommendations/{}", user_id, Recommendations, parameters, context)

    async def similar(
        self,
        user_id: str,
        *,
        n: int | None = None,
        exclude: Sequence[str] = (),
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> SimilarItems:
        """Returns the items that are nearest to this user; arguments and errors as of `recommend`."""
        parameters = {"n": n, "exclude": ",".join(exclude) or None, "at": at}
        return await self._get("/v1/similar/{}", user_id, SimilarItems, parameters, context)

    async def explain(
        self,
        user_id: str,
        *,
        label: str | None = None,
        item: str | None = None,
        category: str | None = None,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
        top: int | None = None,
    ) -> Explanation:
        """Explains the probability of an interest (`label`, as a profile shows it) or of an engagement (`item`).

        `top` is the maximum number of reasons, by default 10. Other arguments and errors are as of `profile`.
        """
        parameters = {"label": label, "item": item, "category": category, "at": at, "top": top}
        return await self._get("/v1/profiles/{}/explain", user_id, Explanation, parameters, context)

    async def segments(self) -> list[SegmentSize]:
        """Returns all segments with their sizes, in the order of the settings; errors as of `profile`."""
        return (await self._ask("GET", "/v1/segments", SegmentSizes, [])).segments

    async def segment(self, segment: str, *, start: str | None = None, n: int | None = None) -> SegmentPage:
        """Returns a page of a segment's members, in the order of their pseudonyms; errors as of `profile`.

        `start` is the `next` of the page before. `n` is the most members, up to 1,000; by default 100.
        """
        params = _without_none({"from": start, "n": n})
        return await self._ask("GET", f"/v1/segments/{in_path(segment)}", SegmentPage, [], params=params)

    async def in_segment(self, segment: str, user_id: str) -> UserSegment:
        """Returns whether the user with this raw id is in a segment, and since when; errors as of `profile`."""
        path = f"/v1/segments/{in_path(segment)}/users/{in_path(user_id)}"
        return await self._ask("GET", path, UserSegment, [user_id])

    async def lookalikes(self, segment: str, *, n: int | None = None) -> SegmentLookalikes:
        """Returns the `n` users nearest to a segment's members (up to 1,000; by default 100); errors as of `profile`."""
        path = f"/v1/segments/{in_path(segment)}/lookalikes"
        return await self._ask("GET", path, SegmentLookalikes, [], params=_without_none({"n": n}))

    async def model_status(self, *, version: int | None = None, label: str | None = None) -> ModelStatus:
        """Returns the versions that can be requested, the served one first; or the one with this number or label.

        Raises:
            ClientError: See the module.
        """
        return await self._ask("GET", _model(version, label), ModelStatus, [])

    async def model_metadata(self, *, version: int | None = None, label: str | None = None) -> ModelMetadata:
        """Returns the signatures of a version, by default of the served one; errors as of `profile`."""
        return await self._ask("GET", f"{_model(version, label)}/metadata", ModelMetadata, [])

    async def predict(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        signature: str | None = None,
        version: int | None = None,
        label: str | None = None,
    ) -> list[Any]:
        """Returns the outputs of a version for up to 1,000 rows of inputs, as TensorFlow Serving does.

        Args:
            rows: For each row its inputs by name, such as `{"user_id": "ann", "item": "i1"}`.
            signature: By default `serving_default`, which takes user ids; `raw` takes the program's own inputs.
            version: A version's number; by default the served one.
            label: A version's label, instead of its number.

        Raises:
            ClientError: See the module.
        """
        body = _without_none({"instances": list(rows), "signature_name": signature})
        path = f"{_model(version, label)}:predict"
        return (await self._ask("POST", path, ModelPredictions, [], json=body)).predictions

    async def hosts(self) -> list[ServingHost]:
        """Returns the live hosts that hold parts of the users; none if each host holds all. Errors as of `profile`."""
        return (await self._ask("GET", "/v1/hosts", ServingHosts, [])).hosts

    async def ready(self) -> Readiness:
        """Returns whether the worker can answer, and what it lacks; there are no retries.

        Raises:
            ClientError: The worker does not answer.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        response = await self._send(self._url, "GET", "/readyz", deadline_s)
        return _decoded(response, Readiness, (200, 503))

    async def _get(
        self, path: str, user_id: str, kind: type[T], parameters: Mapping[str, Any], context: Mapping[str, str] | None
    ) -> T:
        named = {name: str(value) for name, value in parameters.items() if value is not None}
        named |= {f"context.{name}": value for name, value in (context or {}).items()}
        return await self._ask("GET", path.format(in_path(user_id)), kind, [user_id], params=named or None)

    async def _ask(self, method: str, path: str, kind: type[T], users: Sequence[str], **options: Any) -> T:
        """Sends a request about users until it is answered, refused for good, or out of retries or time."""
        loop, tried = asyncio.get_running_loop(), 0
        deadline_s = loop.time() + self._timeout_s
        while True:
            tried += 1
            try:
                response = await self._routed(method, path, deadline_s, users, **options)
            except Unreachable:
                wait_s = self._retries.wait_s(tried, None, deadline_s - loop.time())
                if wait_s is None:
                    raise
            else:
                if response.status_code not in AGAIN:
                    return _decoded(response, kind)
                wait_s = self._retries.wait_s(tried, _retry_after_s(response), deadline_s - loop.time())
                if wait_s is None:
                    return _decoded(response, kind)
            await asyncio.sleep(wait_s)

    async def _routed(
        self, method: str, path: str, deadline_s: float, users: Sequence[str], **options: Any
    ) -> httpx.Response:
        """Sends a request to a host that holds the first user, if one is known and answers; else to the own address."""
        routes = self._routes
        if routes is None:
            return await self._send(self._url, method, path, deadline_s, **options)
        if routes.due():
            await self._fetch_hosts(routes, deadline_s)
        holders = routes.holders_of(users[0]) if users else ()
        if holders:
            host = random.choice(holders)
            soon_s = min(deadline_s, asyncio.get_running_loop().time() + DIRECT_S)
            try:
                response = await self._send(host, method, path, soon_s, **options)
                if response.status_code not in AGAIN:
                    return response
            except (Unreachable, TimedOut):
                routes.avoid(host)
        if not routes.knows(users):
            options["headers"] = {SHARE: "1"}
        response = await self._send(self._url, method, path, deadline_s, **options)
        routes.learn(users, response.headers.get(SHARE))
        return response

    async def _fetch_hosts(self, routes: Routes, deadline_s: float) -> None:
        """Fetches the table of hosts; without an answer the last one stays in use."""
        soon_s = min(deadline_s, asyncio.get_running_loop().time() + DIRECT_S)
        with suppress(ClientError):
            routes.fetched(_decoded(await self._send(self._url, "GET", "/v1/hosts", soon_s), ServingHosts).hosts)

    async def _send(self, url: str, method: str, path: str, deadline_s: float, **options: Any) -> httpx.Response:
        """Sends one request; the only method that uses the network."""
        try:
            left_s = deadline_s - asyncio.get_running_loop().time()
            return await asyncio.wait_for(self._http.request(method, url + path, timeout=None, **options), left_s)
        except UnicodeEncodeError as error:
            raise _not_unicode(error) from error
        except (httpx.TimeoutException, asyncio.TimeoutError) as error:
            raise TimedOut(f"{url} did not answer in time", "give more time, or ask for less at once") from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"{url} cannot be asked ({error or type(error).__name__})", "look whether a worker runs there"
            ) from error


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Makes a method of `Client` out of one of `AsyncClient`, with the same arguments, errors and documentation."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs))

    return call


class Client:
    """Client of one serving address. Threads may share it. Use it in a `with`, or call `close`.

    It runs an `AsyncClient` in an event loop in its own thread, because only a task can be cancelled at any moment.
    So a server that sends one byte at a time does not hold a call beyond its time limit.

    Args: As of `AsyncClient`; `http` is used in that event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries = Retries(),
        token: str | None = None,
        route: bool = False,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._client = AsyncClient(url, timeout_s=timeout_s, retries=retries, token=token, route=route, http=http)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="springtide-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    profile = _blocking(AsyncClient.profile)
    profiles = _blocking(AsyncClient.profiles)
    rank = _blocking(AsyncClient.rank)
    recommend = _blocking(AsyncClient.recommend)
    similar = _blocking(AsyncClient.similar)
    explain = _blocking(AsyncClient.explain)
    segments = _blocking(AsyncClient.segments)
    segment = _blocking(AsyncClient.segment)
    in_segment = _blocking(AsyncClient.in_segment)
    lookalikes = _blocking(AsyncClient.lookalikes)
    model_status = _blocking(AsyncClient.model_status)
    model_metadata = _blocking(AsyncClient.model_metadata)
    predict = _blocking(AsyncClient.predict)
    hosts = _blocking(AsyncClient.hosts)
    ready = _blocking(AsyncClient.ready)

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            # A signal interrupted the wait: end the call too.
            future.cancel()
            raise


def in_path(user_id: str) -> str:
    """Percent-encodes an id for a URL path, including ids of dots only, which would be path segments.

    >>> in_path("a/b c"), in_path("..")
    ('a%2Fb%20c', '%2E%2E')

    Raises:
        ClientError: The id is empty, or UTF-8 cannot encode it.
    """
    if not user_id:
        raise ClientError("an id is empty", "name a user, a segment or a label")
    try:
        return quote(user_id, safe="") if user_id.strip(".") else "%2E" * len(user_id)
    except UnicodeEncodeError as error:
        raise _not_unicode(error) from None


def _not_unicode(error: UnicodeEncodeError) -> ClientError:
    return ClientError(
        f"the question has the character {error.object[error.start]!a}, which UTF-8 cannot encode",
        "send valid Unicode: surrogates come in pairs only",
    )


def _decoded(response: httpx.Response, kind: type[T], statuses: Sequence[int] = (200,)) -> T:
    """Decodes a response.

    Raises:
        Refused: The response is an error. A 429 or 5xx may also come from a proxy, in any format.
        UnexpectedAnswer: The response has another format.
    """
    status, pause_s = response.status_code, _retry_after_s(response)
    refusal: type[Refused] = Overloaded if status == 429 else ServerFailed if status >= 500 else Refused
    try:
        if status in statuses:
            return msgspec.json.decode(response.content, type=kind)
        failure = msgspec.json.decode(response.content, type=Failure)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = f"{response.url.host} answers {status} in another form ({error})"
        do = "check the address, and the proxies between client and worker"
        if refusal is Refused:
            raise UnexpectedAnswer(problem, do) from None
        raise refusal(status, problem, do, retry_after_s=pause_s) from None
    raise refusal(status, failure.error, failure.do, failure.where, pause_s)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Returns the `retry-after` header in seconds; None if it is absent or a date."""
    value = response.headers.get("retry-after")
    return float(value) if value is not None and value.isascii() and value.isdigit() else None


def _model(version: int | None, label: str | None) -> str:
    """The path of a version of the model; ClientError if both are given."""
    if version is not None and label is not None:
        raise ClientError("both a version and a label are given", "name the version by one of them")
    chosen = f"/versions/{version}" if version is not None else f"/labels/{in_path(label)}" if label is not None else ""
    return f"/v1/models/profile{chosen}"


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
