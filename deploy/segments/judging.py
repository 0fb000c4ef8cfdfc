"""Evaluates the expressions of segments on users' profiles; each profile is what a worker would answer now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from deploy.serving.answers.host import Host
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Query
from deploy.serving.answers.queue import MOST_AT_ONCE
from springtide_client.answers import Profile
from state.config.settings import Settings
from state.errors import SettingsError
from state.events.identity import load_salt
from state.layout import SEGMENTS
from state.process.environment import wall_ms
from state.segments import ProfileFacts, Segment, SegmentStore


class JudgedUser(NamedTuple):
    """A user's segments at a time, computed by a version; an unknown user has none."""

    user: int
    at_ms: int
    version: int
    segments: frozenset[str]


class ProfileJudge:
    """Evaluates all segments for users. Not thread-safe."""

    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self._expressions = {segment.name: segment.expression for segment in segments.values()}
        kinds = frozenset[str]().union(*(expression.kinds for expression in self._expressions.values()))
        field_of_kind = {"feature": "features", "attribute": "attributes"}
        self._fields = frozenset(field for kind, field in field_of_kind.items() if kind in kinds)
        self._top = None if "interest" in kinds else 0

    def judge(self, predictor: Predictor, users: Sequence[int]) -> list[JudgedUser]:
        """Evaluates users by pseudonym; each batch uses one version.

        Raises:
            NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
        """
        queries = [Query(as_user_id(user), fields=self._fields, top=self._top) for user in users]
        judged_users: list[JudgedUser] = []
        for first in range(0, len(queries), MOST_AT_ONCE):
            answers = predictor.profiles(queries[first : first + MOST_AT_ONCE])
            judged_users += [self._judge_user(answer) for answer in answers]
        return judged_users

    def _judge_user(self, answer: Profile) -> JudgedUser:
        # An unknown user is in no segment, even if an expression holds for all-zero features.
        facts = _facts_of(answer)
        segments = (name for name, expression in self._expressions.items() if answer.known and expression.holds(facts))
        return JudgedUser(pseudonym(answer.user_id), answer.at_ms, answer.version.number, frozenset(segments))


def _facts_of(answer: Profile) -> ProfileFacts:
    """Returns what expressions can refer to in an answer; of categories with the same name the most probable counts."""
    interests: dict[str, float] = {}
    for interest in answer.interests:
        interests.setdefault(interest.label, interest.probability)
    return ProfileFacts(answer.features or {}, interests, answer.attributes or {}, answer.churn)


def open_host(settings: Settings) -> Host:
    """Opens this host's stores as a worker does; queries identify users by pseudonym in the form of `as_user_id`.

    Raises:
        MissingSalt: There is no salt.
        SettingsError: This host holds a part of the users.
    """
    if settings.serving.shares:
        raise SettingsError(
            f"serving.shares is {settings.serving.shares}, and segments need a host with all users",
            "run them on a host without serving.shares",
        )
    return Host(settings, load_salt(settings.salt_path, create=False), wall_ms, pseudonym)


@contextmanager
def open_segments(settings: Settings) -> Iterator[SegmentStore]:
    """Opens this host's segment store, read only."""
    store = SegmentStore(settings.serving_dir / SEGMENTS, readonly=True)
    try:
        yield store
    finally:
        store.close()


def as_user_id(user: int) -> str:
    """Returns the user id that a query has for a pseudonym.

    >>> pseudonym(as_user_id(171))
    171
    """
    return f"{user:016x}"


def pseudonym(text: str) -> int:
    """Returns the pseudonym in a user id from `as_user_id`."""
    return int(text, 16)
