"""The client of programs without an event loop."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import httpcore
import httpx

from springtide_client import questions
from springtide_client.answers import Explanation, Profile, Ranking, Readiness, Recommendations, SimilarItems
from springtide_client.deadline import Deadline
from springtide_client.errors import Unreachable
from springtide_client.questions import READY, Item, Question, User
from springtide_client.retrying import AGAIN, Retries, retry_after_s

T = TypeVar("T")
TIMEOUT_S = 10.0


class Client:
    """Asks one address; threads may share it. Use it in a `with`, or `close` it.

    Args:
        url: Of a worker, or of what stands before several, such as `http://localhost:8501`.
        timeout_s: Until an answer, all tries and the waits between them included. Only the look-up of the
            address's name is not limited by it.
        retries: How patient it is where it is refused for now.
        token: Goes with each request as `authorization: Bearer`, where the server wants one.
        headers: Of each request, such as a proxy wants them.
        verify: Whether the certificate of an `https` address must be good, or the context that says which ones are.
        transport: What carries requests; by default httpx's own.
        sleep: Waits so many seconds.
        chance: A number from 0 to 1.
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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._url, self._retries, self._sleep, self._chance = url.rstrip("/"), retries, sleep, chance
        self._timeout_s, self._deadline = timeout_s, Deadline()
        own = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            headers={**own, **(headers or {})}, timeout=timeout_s, transport=transport, verify=verify
        )
        self._deadline.hold(self._http)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._http.close()

    def profile(
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
            item: An item; how probable it is that the user engages with it is answered too.
            category: The item's category; by default the one that it was last seen in.
            at: The time to answer for: milliseconds since 1970, or ISO 8601; by default now.
            context: Values of context fields.
            fields: What the answer has beside the rest: of `features`, `vector`, `attributes`, `sources`.
            top: The most interests of the answer; by default 10.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.profile(user_id, item, category, at, context, fields, top))

    def profiles(
        self, users: Sequence[str | User], *, fields: Sequence[str] = (), top: int | None = None
    ) -> list[Profile]:
        """Profiles of up to 1,000 users in their order, all of one version; arguments and errors as of `profile`."""
        return self._ask(questions.profiles(users, fields, top)).profiles

    def rank(
        self,
        user_id: str,
        items: Sequence[str | Item],
        *,
        at: str | int | None = None,
        context: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Up to 1,000 items, the most probable for this user first; arguments and errors as of `profile`.

        With bids the one of the highest expected value comes first; what has reached its cap is in `left_out` alone.
        """
        return self._ask(questions.rank(user_id, items, at, context))

    def recommend(
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
            n: How many items at most, up to 100; by default 20.
            category: Only items of this category.
            exclude_seen: Whether items that the user clicked are left out.
            at: As of `profile`.
            context: Likewise.

        Raises:
            ClientError: See `springtide_client.errors`.
        """
        return self._ask(questions.recommend(user_id, n, category, exclude_seen, at, context))

    def similar(
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
        return self._ask(questions.similar(user_id, n, exclude_seen, at, context))

    def explain(
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
        return self._ask(questions.explain(user_id, label, item, category, at, context, top))

    def ready(self) -> Readiness:
        """Whether the worker can answer, and what it lacks; it is asked once.

        Raises:
            ClientError: Nobody answers.
        """
        self._deadline.at_s = time.monotonic() + self._timeout_s
        return questions.read(READY, self._send(READY))

    def _ask(self, question: Question[T]) -> T:
        self._deadline.at_s = time.monotonic() + self._timeout_s
        tried = 0
        while True:
            tried += 1
            try:
                response = self._send(question)
            except Unreachable:
                wait_s = self._wait_s(tried, None)
                if wait_s is None:
                    raise
            else:
                wait_s = self._wait_s(tried, retry_after_s(response.headers.get("retry-after")))
                if response.status_code not in AGAIN or wait_s is None:
                    return questions.read(question, response)
            self._sleep(wait_s)

    def _wait_s(self, tried: int, pause_s: float | None) -> float | None:
        return self._retries.wait_s(tried, pause_s, self._chance(), self._deadline.at_s - time.monotonic())

    def _send(self, question: Question[T]) -> httpx.Response:
        """The one place where the network is used."""
        try:
            return self._http.request(
                question.method,
                self._url + question.path,
                params=question.parameters or None,
                json=question.body,
                timeout=self._deadline.left_s(),
            )
        except (httpx.TransportError, httpcore.TimeoutException, UnicodeEncodeError) as error:
            raise questions.failed(error, self._url) from error
