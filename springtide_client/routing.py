"""Routes the requests of a client to the hosts that hold the users, if the client has learned them.

Only servers can compute the share of a user, because pseudonyms have a secret salt. On request, a server reports the
share with its answer, and the client remembers it. Requests about other users go to the client's own address, which
forwards them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from springtide_client.answers import ServingHost

SHARE = "springtide-share"
"""Header that requests the shares of the users of a request; the response has it with the shares."""
TABLE_S = 5.0
"""How old the table of hosts may be."""
AVOIDED_S = 30.0
"""How long no request is sent to a host that did not answer."""
MOST_USERS = 200_000
"""Users whose share is remembered, some 20 MB."""


class Routes:
    """The hosts and users' shares that a client has learned. Used in one event loop."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._shares: dict[str, int] = {}
        self._hosts: list[tuple[str, frozenset[int]]] = []
        self._avoided: dict[str, float] = {}
        self._due_s = float("-inf")

    def due(self) -> bool:
        """Whether the table of hosts is to be fetched now; true once every `TABLE_S`."""
        if self._clock_s() < self._due_s:
            return False
        self._due_s = self._clock_s() + TABLE_S
        return True

    def fetched(self, hosts: Sequence[ServingHost]) -> None:
        """Takes the table of hosts."""
        self._hosts = [(host.address.rstrip("/"), shares_in(host.shares)) for host in hosts]

    def learn(self, users: Sequence[str], header: str | None) -> None:
        """Remembers the shares of users as a response reports them."""
        shares = (header or "").split(",")
        if len(shares) != len(users) or not all(share.isdigit() for share in shares):
            return
        while len(self._shares) + len(users) > MOST_USERS and self._shares:
            # The user that was learned first.
            del self._shares[next(iter(self._shares))]
        self._shares.update(zip(users, map(int, shares), strict=True))

    def knows(self, users: Sequence[str]) -> bool:
        """Whether the shares of all these users are known."""
        return all(user in self._shares for user in users)

    def holders_of(self, user: str) -> tuple[str, ...]:
        """Returns the addresses of the hosts that hold a user; none if they or the user's share are unknown."""
        share, now_s = self._shares.get(user), self._clock_s()
        return tuple(
            address for address, shares in self._hosts if share in shares and self._avoided.get(address, 0.0) <= now_s
        )

    def avoid(self, address: str) -> None:
        """Sends no requests to a host for a while."""
        self._avoided[address] = self._clock_s() + AVOIDED_S


def shares_in(text: str) -> frozenset[int]:
    """Parses the shares of a host.

    >>> sorted(shares_in("0-2,32"))
    [0, 1, 2, 32]
    """
    shares = set[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        shares.update(range(int(first), int(last or first) + 1))
    return frozenset(shares)
