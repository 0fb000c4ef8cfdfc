"""What is asked: each call as a request, and an answer read into its type or raised; shared by both clients."""

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
    """How often at most a user may have seen an item.

    Attributes:
        count: From so many on it is left out.
        within_s: In so many seconds before the time to answer for.
    """

    count: int
    within_s: float


class Item(NamedTuple):
    """An item to rank.

    Attributes:
        item: The raw id.
        category: Its category; without one it counts as of the category that it was last seen in.
        bid: What an engagement is worth; all items have one, or none.
        cap: How often the user may have seen it.
    """

    item: str
    category: str | None = None
    bid: float | None = None
    cap: Cap | None = None


class User(NamedTuple):
    """What is asked of one user of a batch.

    Attributes:
        user_id: The raw id.
        item: An item; how probable it is that the user engages with it is answered too.
        category: The item's category; by default the one that it was last seen in.
        at: The time to answer for: milliseconds since 1970, or ISO 8601; by default now.
        context: Values of context fields.
    """

    user_id: str
    item: str | None = None
    category: str | None = None
    at: str | int | None = None
    context: Mapping[str, str] | None = None


class Question(NamedTuple, Generic[T]):
    """A request, and the type of its answer.

    Attributes:
        method: Of HTTP.
        path: With the user's id percent-encoded.
        answer: The type.
        parameters: Of the query.
        body: As JSON takes it.
        answered_by: Statuses that are an answer.
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
    """One profile.

    >>> profile("a/b", "i1", None, 1500, {"device": "tv"}, ["vector"], None)[1:4:2]
    ('/v1/profiles/a%2Fb', {'item': 'i1', 'at': '1500', 'fields': 'vector', 'context.device': 'tv'})
    """
    given = {"item": item, "category": category, "at": at, "fields": ",".join(fields) or None, "top": top}
    return Question("GET", f"/v1/profiles/{in_path(user_id)}", Profile, _parameters(given, context))


def profiles(users: Sequence[str | User], fields: Sequence[str], top: int | None) -> Question[Profiles]:
    """Many profiles.

    >>> profiles(["ann", User("bob", item="i1")], [], 3).body
    {'profiles': [{'user_id': 'ann'}, {'user_id': 'bob', 'item': 'i1'}], 'top': 3}
    """
    asked = [_without_none((User(one) if isinstance(one, str) else one)._asdict()) for one in users]
    body = {"profiles": asked, "fields": list(fields) or None, "top": top}
    return Question("POST", "/v1/profiles:batch", Profiles, body=_without_none(body))


def rank(
    user_id: str, items: Sequence[str | Item], at: str | int | None, context: Mapping[str, str] | None
) -> Question[Ranking]:
    """Items of the caller's, ranked.

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
    """Items of the server's choice."""
    given = {"n": n, "category": category, "exclude_seen": "true" if exclude_seen else None, "at": at}
    path = f"/v1/recommendations/{in_path(user_id)}"
    return Question("GET", path, Recommendations, _parameters(given, context))


def similar(
    user_id: str, n: int | None, exclude_seen: bool, at: str | int | None, context: Mapping[str, str] | None
) -> Question[SimilarItems]:
    """Items near to a user."""
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
    """Why a probability is what it is."""
    given = {"label": label, "item": item, "category": category, "at": at, "top": top}
    path = f"/v1/profiles/{in_path(user_id)}/explain"
    return Question("GET", path, Explanation, _parameters(given, context))


READY = Question("GET", "/readyz", Readiness, answered_by=(200, 503))


def in_path(user_id: str) -> str:
    """An id as it stands in a path; dots alone would be a step in it.

    >>> in_path("a/b c"), in_path("..")
    ('a%2Fb%20c', '%2E%2E')

    Raises:
        ClientError: It is empty, or has a character that UTF-8 has not.
    """
    if not user_id:
        raise ClientError("the user id is empty", "name a user")
    try:
        user_id.encode()
    except UnicodeEncodeError as error:
        raise failed(error, "") from None
    return quote(user_id, safe="") if user_id.strip(".") else "%2E" * len(user_id)


def read(question: Question[T], response: httpx.Response) -> T:
    """The answer that a response is.

    Raises:
        Refused: It is an error; one of 429 and 5xx may also be a proxy's, in any form.
        UnexpectedAnswer: It is not of the form.
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
    """The error to raise for a request that was not answered, or could not be written."""
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
    """A path without the user's id.

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
