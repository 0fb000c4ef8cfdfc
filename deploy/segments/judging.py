"""Holds profiles against the expressions of segments: each profile is what a worker would answer now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deploy.serving.answer import Answer, Query
from deploy.serving.host import Host
from deploy.serving.predictor import MOST_AT_ONCE, Predictor
from state.config.settings import Settings
from state.events.identity import load_salt
from state.process.wall_clock import wall_ms
from state.segments.configured import Segment
from state.segments.expression import ProfileFacts, operands


class JudgedUser(NamedTuple):
    """One user's profile, held against all expressions.

    Attributes:
        user: The pseudonym.
        at_ms: The time that the profile speaks of.
        version: Which version it is from.
        within: The segments whose expression holds; none for who is unknown.
    """

    user: int
    at_ms: int
    version: int
    within: frozenset[str]


class ProfileJudge:
    """Judges users; use it in one thread.

    Args:
        segments: By name.
    """

    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self._expressions = {one.name: one.expression for one in segments.values()}
        kinds = {operand.kind for one in self._expressions.values() for operand in operands(one)}
        asked = {"feature": "features", "attribute": "attributes"}
        self._fields = frozenset(field for kind, field in asked.items() if kind in kinds)
        self._top = None if "interest" in kinds else 0

    def judge(self, predictor: Predictor, users: Sequence[int]) -> list[JudgedUser]:
        """Judges users, each batch by one version.

        Args:
            predictor: What answers; its questions call users by their pseudonyms.
            users: Their pseudonyms.

        Raises:
            NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
        """
        asked = [Query(named(user), fields=self._fields, top=self._top) for user in users]
        found: list[JudgedUser] = []
        for first in range(0, len(asked), MOST_AT_ONCE):
            answers = predictor.profiles(asked[first : first + MOST_AT_ONCE])
            found += [self._judged(answer) for answer in answers]
        return found

    def _judged(self, answer: Answer) -> JudgedUser:
        # Whoever nothing is known of is in no segment, whatever an expression says of zeros.
        facts = facts_of(answer)
        within = (name for name, one in self._expressions.items() if answer.known and one.holds(facts))
        return JudgedUser(pseudonym(answer.user_id), answer.at_ms, answer.version["number"], frozenset(within))


def facts_of(answer: Answer) -> ProfileFacts:
    """What an expression may ask of an answer; of several categories with one name the most probable counts."""
    interests: dict[str, float] = {}
    for one in answer.interests:
        interests.setdefault(one["label"], one["probability"])
    return ProfileFacts(answer.features or {}, interests, answer.attributes or {}, answer.churn)


def open_host(settings: Settings) -> Host:
    """This host's stores as a worker reads them; questions call users by their pseudonyms, as `named` does.

    Raises:
        MissingSalt: There is no salt.
    """
    return Host(settings, load_salt(settings.salt_path, create=False), wall_ms, pseudonym)


def named(user: int) -> str:
    """How a question calls a user here.

    >>> pseudonym(named(171))
    171
    """
    return f"{user:016x}"


def pseudonym(text: str) -> int:
    """Whom a question of `named` is about."""
    return int(text, 16)
