"""The users nearest to the members of a segment, by the vectors of their profiles.

    v_u     the vector of user u less the mean over all users, at unit length
    s(u)    v_u . mean of v_m over the members m: the mean cosine of u with the members

The mean is subtracted because all vectors share it; without this all users are near to each other. One query runs
against all users, so all products are computed exactly; an index pays off only for many queries.

The quality is measured with held-out members. A fifth of the members, chosen by pseudonym, are added to the users who
are not members. The measure is precision at k: the share of held-out members among the first k. It is compared with
the order by most clicks, and with chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.segments.judging import named, pseudonym
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Query
from deploy.serving.answers.queue import MOST_AT_ONCE
from state.segments.lookalikes import PrecisionAt

HELD_BACK = 5
"""One of this many members is held out."""
FEWEST_HELD_BACK = 10
CUTS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_VECTOR, _CLICKS = frozenset(("vector", "features")), "events.visible"

F32 = NDArray[np.float32]
Flags = NDArray[np.bool_]


class UserVectors(NamedTuple):
    """n known users.

    Attributes:
        users: `[n]` uint64, pseudonyms.
        vectors: `[n, width]` float32.
        clicks: `[n]` int64, visible events.
        version: The version of the newest answer.
    """

    users: NDArray[np.uint64]
    vectors: F32
    clicks: NDArray[np.int64]
    version: int


def vectors_of(predictor: Predictor, looked: Callable[[int], None]) -> UserVectors:
    """Computes the current vectors of all users with a history; needs 4 bytes per number and user.

    Args:
        predictor: Computes the profiles; its queries identify users by pseudonym.
        looked: Called with the number of users read so far, after each batch.

    Raises:
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
    """
    users: list[int] = []
    vectors: list[F32] = []
    clicks: list[int] = []
    version = seen = 0
    for some in _users(predictor):
        answers = predictor.profiles([Query(named(user), fields=_VECTOR, top=0) for user in some])
        for answer in answers:
            if answer.known and answer.vector is not None and answer.features is not None:
                users.append(pseudonym(answer.user_id))
                vectors.append(answer.vector.copy())
                clicks.append(answer.features[_CLICKS])
                version = answer.version["number"]
        seen += len(some)
        looked(seen)
    stacked = np.stack(vectors) if vectors else np.empty((0, 0), np.float32)
    return UserVectors(np.array(users, np.uint64), stacked, np.array(clicks, np.int64), version)


def _users(predictor: Predictor) -> Iterator[list[int]]:
    following: int | None = 0
    while following is not None:
        ends = predictor.histories.ends(following, MOST_AT_ONCE)
        following = ends.following
        if ends.users:
            yield ends.users


def similarities(vectors: F32, members: Flags) -> F32:
    """Returns the mean cosine of each user with the members, `[n]` float32.

    >>> vectors = np.array([[2, 1], [4, 2], [-3, 0], [-3, -3]], np.float32)
    >>> [f"{one:.2f}" for one in similarities(vectors, np.array([True, False, False, False]))]
    ['1.00', '1.00', '-0.89', '-0.95']

    Args:
        vectors: `[n, width]` float32.
        members: `[n]` bool; at least one is True.
    """
    centred = vectors - vectors.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    found: F32 = unit @ unit[members].mean(axis=0)
    return found


def nearest(found: UserVectors, members: Flags, most: int) -> list[tuple[int, float]]:
    """Returns the `most` users nearest to the members who are not members, nearest first, with their similarities."""
    if not members.any():
        return []
    scores = similarities(found.vectors, members)
    scores[members] = -np.inf
    order = np.argsort(-scores, kind="stable")[: min(most, int((~members).sum()))]
    return [(int(found.users[place]), float(scores[place])) for place in order.tolist()]


def precision_curve(found: UserVectors, members: Flags, cuts: Sequence[int] = CUTS) -> list[PrecisionAt]:
    """Returns precision at k with held-out members; empty if there are too few members.

    Args:
        found: All users.
        members: `[n]` bool.
        cuts: The values of k; values beyond the number of users are left out.
    """
    held = members & (found.users % np.uint64(HELD_BACK) == 0)
    given, asked = members & ~held, ~members | held
    if held.sum() < FEWEST_HELD_BACK or not given.any():
        return []
    hits = held[asked]
    orders = [similarities(found.vectors, given)[asked], found.clicks[asked]]
    ours, most = (np.cumsum(hits[np.argsort(-one, kind="stable")]) for one in orders)
    chance = float(hits.mean())
    return [PrecisionAt(k, float(ours[k - 1] / k), float(most[k - 1] / k), chance) for k in cuts if k < len(hits)]
