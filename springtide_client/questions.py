"""Builds the request of each call, and decodes its response or raises its error; both clients use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpcore
import httpx
import msgspec

from springtide_client.answers import (
    Explanation,
    Failure,
    Profile,
    Profiles,
    Ranking,
    Readiness,
    Recommendations,
    SimilarItems,
)
from springtide_client.errors import (
    ClientError,
    Overloaded,
    Refused,
    ServerFailed,
    TimedOut,
    UnexpectedAnswer,
    Unreachable,
)
from springtide_client.retrying import retry_after_s

T = TypeVar("T")


@dataclass(frozen=True)
class Cap:
    """The maximum number of times that a user may see an item within a period.

    Attributes:
        count: The item is left out once the user has seen it this many times.
        within_s: Length in seconds of the period, which ends at the requested time (`at`).
    """

    count: int
    within_s: float


class Item(NamedTuple):
    """An item to rank.

    Attributes:
        item: The raw id.
        category: Its category; by default the one it was last seen in.
        bid: What an engagement is worth; either all items have a bid, or none.
        cap: How often the user may see it.
    """

    item: str
    category: str | None = None
    bid: float | None = None
    cap: Cap | None = None


class User(NamedTuple):
    """One user of a batch request.

    Attributes:
        user_id: The raw id.
        item: An item; the response then includes the probability that the user engages with it.
        category: The item's category; by default the one it was last seen in.
        at: The time to compute the profile for: milliseconds since 1970, or ISO 8601; by default now.
        context: Values of context fields.
    """

    user_id: str
    item: str | None = None
    category: str | None = None
    at: str | int | None = None
    context: Mapping[str, str] | None = None


class Question(NamedTuple, Generic[T]):
    """An HTTP request and the type of its response.

    Attributes:
        method: HTTP method.
        path: URL path, with the user's id percent-encoded.
        answer: The type of the response.
        parameters: Query parameters.
        body: JSON body.
        answered_by: Status codes whose body is decoded as `answer`.
    """

    method: str
    path: str
    answer: type[T]
    parameters: Mapping[str, str] = {}
    body: Any = None
    answered_by: tuple[int, ...] = (200,)


def profile(
    user_id: str,
    item: str | None,
    category: str | None,
    at: str | int | None,
    context: Mapping[str, str] | None,
    fields: Sequence[str],
    top: int | None,
) -> Question[Profile]:
    """Builds the request for one profile.

    >>> profile("a/b", "i1", None, 1500, {"device": "tv"}, ["vector"], None)[1:4:2]
    ('/v1/profiles/a%2Fb', {'item': 'i1', 'at': '1500', 'fields': 'vector', 'context.device': 'tv'})
    """
    given = {"item": item, "category": category, "at": at, "fields": ",".join(fields) or None, "top": top}
    return Question("GET", f"/v1/profiles/{in_path(user_id)}", Profile, _parameters(given, context))


def profiles(users: Sequence[str | User], fields: Sequence[str], top: int | None) -> Question[Profiles]:
    """Builds the request for several profiles.

    >>> profiles(["ann", User("bob", item="i1")], [], 3).body
    {'profiles': [{'user_id': 'ann'}, {'user_id': 'bob', 'item': 'i1'}], 'top': 3}
    """
    asked = [_without_none((User(one) if isinstance(one, str) else one)._asdict()) for one in users]
    body = {"profiles": asked, "fields": list(fields) or None, "top": top}
    return Question("POST", "/v1/profiles:batch", Profiles, body=_without_none(body))


def rank(
    user_id: str, items: Sequence[str | Item], at: str | int | None, context: Mapping[str, str] | None
) -> Question[Ranking]:
    """Builds the request that ranks the caller's items.

    >>> rank("ann", ["i1", Item("i2", "hats")], None, None).body
    {'user_id': 'ann', 'items': ['i1', {'item': 'i2', 'category': 'hats'}]}
    >>> rank("ann", [Item("i1", bid=0.5, cap=Cap(3, 86400))], None, None).body["items"]
    [{'item': 'i1', 'bid': 0.5, 'cap': {'count': 3, 'within_s': 86400}}]
    """
    body = {
        "user_id": user_id,
        "items": [one if isinstance(one, str) else _item(one) for one in items],
        "at": at,
        "context": context,
    }
    return Question("POST", "/v1/rank", Ranking, body=_without_none(body))


def recommend(
    user_id: str,
    n: int | None,
    category: str | None,
    exclude_seen: bool,
    at: str | int | None,
    context: Mapping[str, str] | None,
) -> Question[Recommendations]:
    """Builds the request for recommended items."""
    given = {"n": n, "category": category, "exclude_seen": "true" if exclude_seen else None, "at": at}
    path = f"/v1/recommendations/{in_path(user_id)}"
    return Question("GET", path, Recommendations, _parameters(given, context))


def similar(
    user_id: str, n: int | None, exclude_seen: bool, at: str | int | None, context: Mapping[str, str] | None
) -> Question[SimilarItems]:
    """Builds the request for the items most similar to a user."""
    given = {"n": n, "exclude_seen": "true" if exclude_seen else None, "at": at}
    return Question("GET", f"/v1/similar/{in_path(user_id)}", SimilarItems, _parameters(given, context))


def explain(
    user_id: str,
    label: str | None,
    item: str | None,
    category: str | None,
    at: str | int | None,
    context: Mapping[str, str] | None,
    top: int | None,
) -> Question[Explanation]:
    """Builds the request that explains a probability."""
    given = {"label": label, "item": item, "category": category, "at": at, "top": top}
    path = f"/v1/profiles/{in_path(user_id)}/explain"
    return Question("GET", path, Explanation, _parameters(given, context))


READY = Question("GET", "/readyz", Readiness, answered_by=(200, 503))


def in_path(user_id: str) -> str:
    """Percent-encodes a user id for a URL path, including ids of dots only, which would be path segments.

    >>> in_path("a/b c"), in_path("..")
    ('a%2Fb%20c', '%2E%2E')

    Raises:
        ClientError: The id is empty, or UTF-8 cannot encode it.
    """
    if not user_id:
        raise ClientError("the user id is empty", "name a user")
    try:
        user_id.encode()
    except UnicodeEncodeError as error:
        raise failed(error, "") from None
    return quote(user_id, safe="") if user_id.strip(".") else "%2E" * len(user_id)


def read(question: Question[T], response: httpx.Response) -> T:
    """Decodes a response.

    Raises:
        Refused: The response is an error. A 429 or 5xx may also come from a proxy, in any format.
        UnexpectedAnswer: The response has another format.
    """
    status = response.status_code
    kind: type[Refused] = Overloaded if status == 429 else ServerFailed if status >= 500 else Refused
    pause_s = retry_after_s(response.headers.get("retry-after"))
    try:
        if status in question.answered_by:
            return msgspec.json.decode(response.content, type=question.answer)
        said = msgspec.json.decode(response.content, type=Failure)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        what = f"{response.url.host} answers {status} to {question.method} {_shape(question.path)} in another form ({error})"
        do = "check the address, and the proxies between client and worker"
        if kind is Refused:
            raise UnexpectedAnswer(what, do) from None
        raise kind(status, what, do, retry_after_s=pause_s) from None
    raise kind(status, said.error, said.do, said.where, pause_s)


def failed(error: Exception, base_url: str) -> ClientError:
    """The client error for a request that could not be encoded, or got no response."""
    if isinstance(error, UnicodeEncodeError):
        return ClientError(
            f"the question has the character {error.object[error.start]!a}, which UTF-8 cannot encode",
            "send valid Unicode: surrogates come in pairs only",
        )
    if isinstance(error, (httpx.TimeoutException, httpcore.TimeoutException, TimeoutError)):
        return TimedOut(f"{base_url} did not answer in time", "give more time, or ask for less at once")
    return Unreachable(
        f"{base_url} cannot be asked ({error or type(error).__name__})", "look whether a worker runs there"
    )


def _shape(path: str) -> str:
    """Replaces the user's id in a path with a placeholder.

    >>> _shape("/v1/profiles/ann/explain"), _shape("/v1/profiles:batch")
    ('/v1/profiles/{user_id}/explain', '/v1/profiles:batch')
    """
    _, first, second, *rest = [*path.split("/"), ""]
    return "/".join(("", first, second, *(("{user_id}", *rest[1:-1]) if len(rest) > 1 else ())))


def _parameters(given: Mapping[str, Any], context: Mapping[str, str] | None) -> dict[str, str]:
    named = {name: str(value) for name, value in given.items() if value is not None}
    return named | {f"context.{name}": value for name, value in (context or {}).items()}


def _item(one: Item) -> dict[str, Any]:
    cap = {} if one.cap is None else {"cap": asdict(one.cap)}
    return _without_none(one._asdict()) | cap


def _without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
