"""Probe users, whose clicks measure the latency of the loop. Their ids are reserved.

A click of a probe user has no item and no category, which no other click may
lack. So it moves positions, a history and the count of rows, but enters no
target, metric, popularity, recommendation or weight. Probe users are
pseudonymised, expire, are masked and are erased like all users.
"""

from __future__ import annotations

PREFIX = "springtide-probe-"
SLOTS = 512
"""The number of probe users: each waits long before it is used again, and a store holds few of them."""


def probe_user(number: int) -> str:
    """The raw id of a probe user.

    >>> probe_user(SLOTS + 3)
    'springtide-probe-3'
    """
    return f"{PREFIX}{number % SLOTS}"


def is_probe_user(user: object) -> bool:
    """Whether a raw id belongs to a probe user.

    >>> is_probe_user("springtide-probe-3"), is_probe_user("ann"), is_probe_user(7)
    (True, False, False)
    """
    return type(user) is str and user.startswith(PREFIX)
