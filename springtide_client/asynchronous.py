"""Asynchronous client of the HTTP API for asyncio programs, with the same methods as `Client`."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import httpx

from springtide_client import questions
from springtide_client.answers import Explanation, Profile, Ranking, Readiness, Recommendations, SimilarItems
from springtide_client.errors import Unreachable
from springtide_client.questions import READY, Item, Question, User
from springtide_client.retrying import AGAIN, Retries, retry_after_s
from springtide_client.synchronous import TIMEOUT_S

T = TypeVar("T")


class AsyncClient:
    """Asynchronous client of one serving address. Use it in an `async with`, or call `close`.

    Tasks of one event loop may share it.

    Args:
        url: Address of a worker, or of a load balancer in front of several, such as `http://localhost:8501`.
        timeout_s: Time limit of a call in seconds, including all retries and the waits between them.
        retries: How often, and for how long, a temporarily refused call is retried.
        token: Sent with each request as `authorization: Bearer`, if the server requires one.
        headers: Additional headers of each request, for example for a proxy.
        verify: Whether to verify the certificate of an `https` address, or the SSL context to verify it with.
        transport: Sends the requests; by default httpx's own transport.
        sleep: Waits the given number of seconds.
        chance: Returns a random number from 0 to 1.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries = Retries(),  # noqa: B008 - immutable
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._url, self._retries, self._sleep, self._chance = url.rstrip("/"), retries, sleep, chance
        self._timeout_s = timeout_s
        own = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(
            headers={**own, **(headers or {})}, timeout=None, transport=transport, verify=verify
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends its connections."""
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
        """One user's profile.

        Args:
            user_id: The raw id.
            item: An item; the answer then has the probability that the user engages with it.
            category: The item's category; by default the one that it was last seen in.
            at: The time to answer for: milliseconds since 1970, or ISO 8601; by default now.
            context: Values of context fields.
            fields: Optional parts of the answer: of `features`, `vector`, `attributes`, `sources`.
            top: The most interests of the answer; by default 10.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return await self._ask(questions.profile(user_id, item, category, at, context, fields, top))

    async def profiles(
        self, users: Sequence[str | User], *, fields: Sequence[str] = (), top: int | None = None
    ) -> list[Profile]:
        """Profiles of up to 1,000 users in their order, all of one version; arguments and errors as of `profile`."""
        return (await self._ask(questions.profiles(users, fields, top))).profiles

    async def rank(
        self,
        user_id: str,
        items: Sequence[str | Item],
        *,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Up to 1,000 items, the most probable for this user first; arguments and errors as of `profile`.

        With bids the item of the highest expected value comes first; items at their cap are only in `left_out`.
        """
        return await self._ask(questions.rank(user_id, items, at, context))

    async def recommend(
        self,
        user_id: str,
        *,
        n: int | None = None,
        category: str | None = None,
        exclude_seen: bool = False,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Recommendations:
        """Items for this user, each with its reason.

        Args:
            user_id: The raw id.
            n: The most items, up to 100; by default 20.
            category: Only items of this category.
            exclude_seen: Whether items that the user clicked are left out.
            at: As of `profile`.
            context: Likewise.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return await self._ask(questions.recommend(user_id, n, category, exclude_seen, at, context))

    async def similar(
        self,
        user_id: str,
        *,
        n: int | None = None,
        exclude_seen: bool = False,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> SimilarItems:
        """The items that are nearest to this user; arguments as of `recommend`.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return await self._ask(questions.similar(user_id, n, exclude_seen, at, context))

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
        """Why an interest (`label`) or an engagement (`item`) is as probable as it is.

        Args:
            user_id: The raw id.
            label: A category, as a profile shows it; or
            item: An item.
            category: As of `profile`.
            at: Likewise.
            context: Likewise.
            top: The most reasons; by default 10.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return await self._ask(questions.explain(user_id, label, item, category, at, context, top))

    async def ready(self) -> Readiness:
        """Whether the worker can answer, and what it lacks; there are no retries.

        Raises:
            ClientError: The worker does not answer.
        """
        return questions.read(READY, await self._send(READY, self._deadline_s()))

    async def _ask(self, question: Question[T]) -> T:
        tried, deadline_s = 0, self._deadline_s()
        while True:
            tried += 1
            try:
                response = await self._send(question, deadline_s)
            except Unreachable:
                wait_s = self._wait_s(tried, None, deadline_s)
                if wait_s is None:
                    raise
            else:
                wait_s = self._wait_s(tried, retry_after_s(response.headers.get("retry-after")), deadline_s)
                if response.status_code not in AGAIN or wait_s is None:
                    return questions.read(question, response)
            await self._sleep(wait_s)

    def _deadline_s(self) -> float:
        """The deadline, by the loop's clock, of a call that starts now."""
        return asyncio.get_running_loop().time() + self._timeout_s

    def _wait_s(self, tried: int, pause_s: float | None, deadline_s: float) -> float | None:
        left_s = deadline_s - asyncio.get_running_loop().time()
        return self._retries.wait_s(tried, pause_s, self._chance(), left_s)

    async def _send(self, question: Question[T], deadline_s: float) -> httpx.Response:
        """Sends one request; the only method that uses the network."""
        try:
            async with asyncio.timeout_at(deadline_s):
                return await self._http.request(
                    question.method, self._url + question.path, params=question.parameters or None, json=question.body
                )
        except (httpx.TransportError, TimeoutError, UnicodeEncodeError) as error:
            raise questions.failed(error, self._url) from error
