"""Reads segments and their members from the host's copy of the segments topic, for a worker."""

from __future__ import annotations

from deploy.serving.answers.query import iso
from springtide_client.answers import (
    ListPrecision,
    Lookalike,
    SegmentLookalikes,
    SegmentMember,
    SegmentPage,
    SegmentSize,
    SegmentSizes,
    UserSegment,
)
from state.config.settings import Settings
from state.errors import BadRequest, NotReady, StoreError
from state.events.identity import Salt, user_id
from state.layout import DATA, LOOKALIKES, SEGMENTS
from state.segments import lookalikes
from state.segments.expression import texts_of
from state.segments.members import Membership, SegmentStore


class HostSegments:
    """Reads segments, members and lookalikes. Used by one thread."""

    def __init__(self, settings: Settings, salt: Salt) -> None:
        self._path = settings.serving_dir / SEGMENTS
        self._lists, self._listed = settings.serving_dir / LOOKALIKES, settings.segments.lookalikes
        self._texts, self._salt = texts_of(settings), salt
        self._store: SegmentStore | None = None
        self._file = (0, 0)

    def sizes(self) -> SegmentSizes:
        """Returns all segments with their sizes; raises NotReady if this host has no store of members."""
        sizes = self._opened().sizes() if self._texts else {}
        return SegmentSizes([self._size(name, sizes) for name in self._texts])

    def page(self, segment: str, start: int, most: int) -> SegmentPage:
        """Returns a page of at most `most` members of a segment, from pseudonym `start` on.

        Raises:
            BadRequest: No segment has this name.
            NotReady: This host has no store of members.
        """
        self._require(segment)
        store = self._opened()
        members = store.page(segment, start, most + 1)
        return SegmentPage(
            name=segment,
            expression=self._texts[segment],
            size=store.sizes().get(segment, 0),
            members=[_member(user, membership) for user, membership in members[:most]],
            next=f"{members[most][0]:016x}" if len(members) > most else None,
        )

    def of_user(self, segment: str, user: str) -> UserSegment:
        """Returns whether the user with this raw id is in a segment; raises the errors of `page`."""
        self._require(segment)
        (membership,) = self._opened().memberships([(segment, user_id(self._salt, user))])
        if membership is None:
            return UserSegment(segment, user, False, None, None, None)
        return UserSegment(segment, user, True, iso(membership.since_ms), membership.since_ms, membership.version)

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
        return SegmentLookalikes(
            segment=segment,
            version=listed.version,
            at=iso(listed.at_ms),
            at_ms=listed.at_ms,
            members=listed.members,
            users=listed.users,
            lookalikes=[Lookalike(*user) for user in near[:most]],
            precision=[ListPrecision(*point) for point in listed.precision],
        )

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
                self._store = SegmentStore(self._path, readonly=True)
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
        return SegmentSize(name, self._texts[name], sizes.get(name, 0))


def _member(user: int, membership: Membership) -> SegmentMember:
    return SegmentMember(f"{user:016x}", iso(membership.since_ms), membership.since_ms, membership.version)
