"""Walks over all users again and again: windows empty by themselves, and versions learn, without a click of one's own.

Those with a history come in the order of their pseudonyms, then members who
have none any more. A pass takes `every_s` and spreads its work over it; one
that is hurried takes the time that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from state.history.store import HistoryStore
from state.segments.store import SegmentStore, all_members


class UserSweep:
    """Says whom to look at next; used by one thread.

    Args:
        histories: Gives this host's, which may be opened again.
        store: The members.
        names: The segments.
        every_s: How long a pass takes.
        clock_s: A monotonic clock.
        at_once: The most users at a time.

    Attributes:
        hurried: Whether this pass waits for nothing.
        took_s: How long the last whole pass took; 0 before.
    """

    def __init__(
        self,
        histories: Callable[[], HistoryStore],
        store: SegmentStore,
        names: Collection[str],
        every_s: float,
        clock_s: Callable[[], float],
        at_once: int,
    ) -> None:
        self._histories, self._store, self._names = histories, store, names
        self._every_s, self._clock_s, self._at_once = every_s, clock_s, at_once
        self._pass: Iterator[list[int]] | None = None
        self._begun_s = self._due_s = clock_s()
        self._share_s = 0.0
        self.hurried, self.took_s = False, 0.0

    def hurry(self) -> None:
        """Begins a pass now, in place of the one that is under way."""
        self._pass, self.hurried = None, True

    def users(self) -> list[int]:
        """Whom to look at now; nobody where it is too early."""
        now_s = self._clock_s()
        if not self.hurried and now_s < self._due_s:
            return []
        if self._pass is None:
            self._pass, self._begun_s, self._due_s = self._walk(), now_s, now_s
            self._share_s = self._every_s / max(1, self._histories().users())
        found = next(self._pass, None)
        if found is None:
            self._pass, self.took_s = None, now_s - self._begun_s
            self._due_s = now_s if self.hurried else max(now_s, self._begun_s + self._every_s)
            self.hurried = False
            return []
        self._due_s = max(self._due_s + len(found) * self._share_s, now_s - self._every_s)
        return found

    def _walk(self) -> Iterator[list[int]]:
        following: int | None = 0
        while following is not None:
            ends = self._histories().ends(following, self._at_once)
            following = ends.following
            yield ends.users
        for name in self._names:
            for page in all_members(self._store, name, self._at_once):
                users = [user for user, _ in page]
                histories = self._histories().read_many(users)
                yield [user for user, events in zip(users, histories, strict=True) if not len(events)]
