"""Splits a batch of queries between the arms of a rollout, and merges the rows of the answers. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from state.experiments.exposure import Arm

QUESTIONS = ("profiles", "users")
"""The fields in which a batch can have its queries: objects with `user_id`, or ids."""


class Asker(msgspec.Struct):
    """The user of a query."""

    user_id: str | int


class _Answered(msgspec.Struct):
    """The rows of an answer."""

    profiles: list[msgspec.Raw]


class QuestionBatch(msgspec.Struct, frozen=True):
    """A batch of queries, as the client sent it.

    Attributes:
        name: The field with the queries.
        questions: The queries as raw JSON.
        users: The raw user id of each query.
        rest: The other fields by name, as raw JSON.
    """

    name: str
    questions: Sequence[msgspec.Raw]
    users: Sequence[str]
    rest: Mapping[str, msgspec.Raw]

    def part(self, places: Iterable[int]) -> bytes:
        """Encodes the body of a batch with only the queries at `places`.

        >>> found = read(b'{"users": ["ann", 7, "bob"], "top": 3}')
        >>> found.users, found.part([0, 1])
        (['ann', '7', 'bob'], b'{"top":3,"users":["ann",7]}')
        """
        return msgspec.json.encode({**self.rest, self.name: [self.questions[place] for place in places]})


def read(body: bytes) -> QuestionBatch | None:
    """Parses a request's body; returns None if it is not a valid batch, and then the endpoint reports the error.

    >>> read(b'{"profiles": [{"user_id": 7, "item": "i1"}]}').users, read(b'{"users": 7}'), read(b"{}")
    (['7'], None, None)
    """
    try:
        rest = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        (name,) = rest.keys() & set(QUESTIONS)
        questions = msgspec.json.decode(rest.pop(name), type=list[msgspec.Raw])
        if name == "users":
            users = [str(msgspec.json.decode(one, type=str | int)) for one in questions]
        else:
            users = [str(msgspec.json.decode(one, type=Asker).user_id) for one in questions]
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return None
    return QuestionBatch(name, questions, users, rest)


def rows(body: bytes) -> list[bytes] | None:
    """Returns the rows of an answer as raw JSON; None if it is not an answer to a batch.

    >>> rows(b'{"profiles":[{"a":1},{"a":2}]}'), rows(b"{}")
    ([b'{"a":1}', b'{"a":2}'], None)
    """
    try:
        return [bytes(one) for one in msgspec.json.decode(body, type=_Answered).profiles]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def joined(answers: Iterable[tuple[Arm, bytes]]) -> bytes:
    """Builds the answer to a batch; each row names its arm.

    >>> joined([("live", b'{"a":1}'), ("trial", b'{"a":2}')])
    b'{"profiles":[{"a":1,"arm":"live"},{"a":2,"arm":"trial"}]}'
    """
    return b'{"profiles":[' + b",".join(b'%s,"arm":"%s"}' % (row[:-1], arm.encode()) for arm, row in answers) + b"]}"
