"""The users nearest to the members of a segment, by the vectors of their profiles.

    v_u     the vector of user u less the mean over all users, at unit length
    s(u)    v_u . mean of v_m over the members m: the mean cosine of u with the members

The quality is precision at k with held-out members: a fifth of the members, chosen by pseudonym, are added to the users
who are not members. It is compared with the order by most clicks, and with chance.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.segments.judging import as_user_id, open_host, open_segments, pseudonym
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Query
from deploy.serving.answers.queue import MOST_AT_ONCE
from state.config.settings import Settings
from state.disk import files as durable
from state.layout import LOOKALIKES
from state.process.environment import wall_ms
from state.process.part import die_with, run_part
from state.process.user_code import for_children
from state.segments import LookalikeList, NearUser, PrecisionAt, all_members, segments_of, write_lookalikes

EVERY_S = 3600.0
"""Between two lists of a segment."""

HELD_BACK = 5
"""One of this many members is held out."""
FEWEST_HELD_BACK = 10
CUTS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_VECTOR, _CLICKS = frozenset(("vector", "features")), "events.visible"

_log = logging.getLogger(__name__)

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


def vectors_of(predictor: Predictor, report: Callable[[int], None]) -> UserVectors:
    """Computes the current vectors of all users with a history; needs 4 bytes per number and user.

    `report` is called with the number of users read so far, after each batch.

    Raises:
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
    """
    users: list[int] = []
    vectors: list[F32] = []
    clicks: list[int] = []
    version = passed = 0
    for batch in _users(predictor):
        answers = predictor.profiles([Query(as_user_id(user), fields=_VECTOR, top=0) for user in batch])
        for answer in answers:
            if answer.known and answer.vector is not None and answer.features is not None:
                users.append(pseudonym(answer.user_id))
                vectors.append(np.array(answer.vector, np.float32))
                clicks.append(answer.features[_CLICKS])
                version = answer.version.number
        passed += len(batch)
        report(passed)
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
    cosines: F32 = unit @ unit[members].mean(axis=0)
    return cosines


def nearest(vectors: UserVectors, members: Flags, most: int) -> list[tuple[int, float]]:
    """Returns the `most` users nearest to the members who are not members, nearest first, with their similarities."""
    if not members.any():
        return []
    scores = similarities(vectors.vectors, members)
    scores[members] = -np.inf
    order = np.argsort(-scores, kind="stable")[: min(most, int((~members).sum()))]
    return [(int(vectors.users[index]), float(scores[index])) for index in order.tolist()]


def precision_curve(vectors: UserVectors, members: Flags, cuts: Sequence[int] = CUTS) -> list[PrecisionAt]:
    """Returns precision at k with held-out members; empty if there are too few members.

    Args:
        vectors: All users.
        members: `[n]` bool.
        cuts: The values of k; values beyond the number of users are left out.
    """
    held_out = members & (vectors.users % np.uint64(HELD_BACK) == 0)
    visible, ranked = members & ~held_out, ~members | held_out
    if held_out.sum() < FEWEST_HELD_BACK or not visible.any():
        return []
    hits = held_out[ranked]
    orders = [similarities(vectors.vectors, visible)[ranked], vectors.clicks[ranked]]
    near, most = (np.cumsum(hits[np.argsort(-order, kind="stable")]) for order in orders)
    chance = float(hits.mean())
    return [PrecisionAt(k, float(near[k - 1] / k), float(most[k - 1] / k), chance) for k in cuts if k < len(hits)]


def aside(settings: Settings) -> Path:
    """Returns the temporary directory where a child writes lists."""
    return settings.serving_dir / f"{LOOKALIKES}.new"


class LookalikeLists:
    """The lookalike lists of one host; without `segments.lookalikes` there are none. Use it in the main thread."""

    def __init__(self, settings: Settings, clock_s: Callable[[], float]) -> None:
        self._settings, self._clock_s = settings, clock_s
        self._folder, self._aside = settings.serving_dir / LOOKALIKES, aside(settings)
        self._wanted = bool(settings.segments.lookalikes)
        self._child: subprocess.Popen[bytes] | None = None
        self._due_s = clock_s()
        # Control may have changed while this process did not run.
        self.drop()

    def tick(self) -> None:
        """Publishes the lists of a finished child, and starts the next child if it is due.

        Raises:
            OSError: The operating system refused; existing lists stay, and a later call tries again.
        """
        if not self._wanted:
            return
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            self._child = None
            if code == 0:
                self._place()
            else:
                _log.error("listing lookalikes failed with exit code %d; the lists stay as they are", code)
        if self._clock_s() >= self._due_s:
            self._due_s = self._clock_s() + EVERY_S
            shutil.rmtree(self._aside, ignore_errors=True)
            environment = for_children({**os.environ, **self._settings.environment()})
            command = [sys.executable, "-m", "deploy.segments.lookalikes"]
            self._child = subprocess.Popen(command, env=environment, preexec_fn=die_with(os.getpid()))

    def drop(self) -> None:
        """Removes all lists and stops the child; the next tick starts again."""
        self.close()
        for folder in (self._folder, self._aside):
            shutil.rmtree(folder, ignore_errors=True)
        self._due_s = self._clock_s()

    def close(self) -> None:
        """Kills the child; its unfinished lists are not used."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _place(self) -> None:
        self._folder.mkdir(exist_ok=True)
        durable.exchange(self._aside, self._folder)
        durable.sync_directory(self._folder.parent)
        shutil.rmtree(self._aside, ignore_errors=True)
        _log.info("the lookalikes of segments are listed again")


def run(settings: Settings) -> None:
    """Writes the list of each segment that has members, from the current stores of this host.

    Raises:
        SpringtideError: A required store or file does not exist.
        OSError: The disk is full, or the operating system refused the access.
    """
    host, folder = open_host(settings), aside(settings)
    folder.mkdir()
    try:
        vectors = vectors_of(host.predictor(), lambda users: None)
    finally:
        host.close()
    with open_segments(settings) as store:
        for segment in segments_of(settings):
            within = [user for page in all_members(store, segment) for user, _ in page]
            members = np.isin(vectors.users, np.array(within, np.uint64))
            if not members.any():
                continue
            near = nearest(vectors, members, settings.segments.lookalikes)
            lookalikes = LookalikeList(
                vectors.version,
                wall_ms(),
                int(members.sum()),
                len(vectors.users),
                tuple(NearUser(f"{user:016x}", similarity) for user, similarity in near),
                tuple(precision_curve(vectors, members)),
            )
            write_lookalikes(folder, segment, lookalikes)
    durable.sync_directory(folder)


def main(argv: list[str] | None = None) -> int:
    """Writes the lists with the settings of `argv`; returns the exit code."""
    return run_part("segments", run, argv, _log)


if __name__ == "__main__":
    sys.exit(main())
