"""Reads segments and their members from the host's copy of the segments topic, for a worker."""

from __future__ import annotations

from typing import TypedDict

from deploy.serving.answers.query import iso
from state.config.settings import Settings
from state.errors import BadRequest, NotReady, StoreError
from state.events.identity import Salt, user_id
from state.layout import DATA, LOOKALIKES, SEGMENTS
from state.segments import lookalikes
from state.segments.expression import texts_of
from state.segments.members import Membership, SegmentStore


class SegmentSize(TypedDict):
    """A segment: its name, its expression, and its number of users."""

    name: str
    expression: str
    size: int


class SegmentSizes(TypedDict):
    """All segments, in the order of the settings."""

    segments: list[SegmentSize]


class SegmentMember(TypedDict):
    """A member: the pseudonym (16 hexadecimal digits), the log time of joining, and the version that decided it."""

    pseudonym: str
    since: str
    since_ms: int
    version: int


class SegmentPage(SegmentSize):
    """A page of members in the order of pseudonyms; `next` is the start of the next page, null on the last page."""

    members: list[SegmentMember]
    next: str | None


UserSegment = TypedDict(
    "UserSegment",
    {"segment": str, "user_id": str, "in": bool, "since": str | None, "since_ms": int | None, "version": int | None},
)
"""Whether a user is in a segment, since when, and by which version."""


class Lookalike(TypedDict):
    """A lookalike: the pseudonym (16 hexadecimal digits), and the mean cosine similarity to the members."""

    pseudonym: str
    similarity: float


class ListPrecision(TypedDict):
    """Precision at k: the share of held-out members in the first k, ranked by similarity, by clicks, and by chance."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class SegmentLookalikes(TypedDict):
    """The users nearest to the members at the time of listing, nearest first, without users who have joined since."""

    segment: str
    version: int
    at: str
    at_ms: int
    members: int
    users: int
    lookalikes: list[Lookalike]
    precision: list[ListPrecision]


class HostSegments:
    """Reads segments, members and lookalikes. Used by one thread."""

    def __init__(self, settings: Settings, salt: Salt) -> None:
        self._path, self._map_bytes = settings.serving_dir / SEGMENTS, settings.serving.map_gb << 30
        self._lists, self._listed = settings.serving_dir / LOOKALIKES, settings.segments.lookalikes
        self._texts, self._salt = texts_of(settings), salt
        self._store: SegmentStore | None = None
        self._file = (0, 0)

    def sizes(self) -> SegmentSizes:
        """Returns all segments with their sizes; raises NotReady if this host has no store of members."""
        sizes = self._opened().sizes() if self._texts else {}
        return {"segments": [self._size(name, sizes) for name in self._texts]}

    def page(self, segment: str, start: int, most: int) -> SegmentPage:
        """Returns a page of at most `most` members of a segment, from pseudonym `start` on.

        Raises:
            BadRequest: No segment has this name.
            NotReady: This host has no store of members.
        """
        self._require(segment)
        store = self._opened()
        members = store.page(segment, start, most + 1)
        return {
            **self._size(segment, store.sizes()),
            "members": [_member(user, membership) for user, membership in members[:most]],
            "next": f"{members[most][0]:016x}" if len(members) > most else None,
        }

    def of_user(self, segment: str, user: str) -> UserSegment:
        """Returns whether the user with this raw id is in a segment; raises the errors of `page`."""
        self._require(segment)
        (membership,) = self._opened().memberships([(segment, user_id(self._salt, user))])
        since = (None, None, None) if membership is None else (iso(membership.since_ms), *membership)
        return {
            "segment": segment,
            "user_id": user,
            "in": membership is not None,
            "since": since[0],
            "since_ms": since[1],
            "version": since[2],
        }

    def lookalikes(self, segment: str, most: int) -> SegmentLookalikes:
        """Returns at most `most` lookalikes of a segment's members.

        Raises:
            BadRequest: No segment has this name.
            NotReady: This host has no store of members, or no list of lookalikes yet.
            CorruptStore: The list is damaged.
        """
        self._require(segment)
        store, listed = self._opened(), lookalikes.read(self._lists, segment)
        if listed is None:
            do = "try again later: they are computed each hour, once a user is in the segment"
            raise NotReady(
                f"no lookalikes of {segment} are listed here",
                do if self._listed else "set segments.lookalikes, and restart",
            )
        joined = store.memberships([(segment, int(user.pseudonym, 16)) for user in listed.lookalikes])
        near = [user for user, membership in zip(listed.lookalikes, joined, strict=True) if membership is None]
        return {
            "segment": segment,
            "version": listed.version,
            "at": iso(listed.at_ms),
            "at_ms": listed.at_ms,
            "members": listed.members,
            "users": listed.users,
            "lookalikes": [{"pseudonym": user.pseudonym, "similarity": user.similarity} for user in near[:most]],
            "precision": [
                {"k": point.k, "lookalikes": point.lookalikes, "most_clicks": point.most_clicks, "chance": point.chance}
                for point in listed.precision
            ],
        }

    def close(self) -> None:
        """Closes the store; the next query reopens it."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _opened(self) -> SegmentStore:
        path = self._path / DATA
        file = (path.stat().st_dev, path.stat().st_ino) if path.exists() else (0, 0)
        if self._store is None or file != self._file:
            self.close()
            try:
                self._store = SegmentStore(self._path, self._map_bytes, readonly=True)
            except StoreError as error:
                raise NotReady(error.what, error.do) from error
            self._file = file
        return self._store

    def _require(self, segment: str) -> None:
        if segment not in self._texts:
            listed = ", ".join(self._texts)
            do = f"ask for one of {listed}" if listed else "name it in [segments], and start again"
            raise BadRequest(f"there is no segment {segment[:80]!r}", do, http_status=404)

    def _size(self, name: str, sizes: dict[str, int]) -> SegmentSize:
        return {"name": name, "expression": self._texts[name], "size": sizes.get(name, 0)}


def _member(user: int, membership: Membership) -> SegmentMember:
    return {
        "pseudonym": f"{user:016x}",
        "since": iso(membership.since_ms),
        "since_ms": membership.since_ms,
        "version": membership.version,
    }
