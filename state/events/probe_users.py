"""The users whose clicks ask how long the loop takes: ids that no shop gives, and clicks that name nothing.

A click of theirs has no item and no category, which a click of nobody else may
lack. So it moves positions, a history and the count of rows, and is in no
target, measure, popularity, recommendation or weight. They are pseudonymised,
expire, are masked and erased as all users are.
"""

from __future__ import annotations

PREFIX = "springtide-probe-"
SLOTS = 512
"""So many of them there are: each waits long for its next turn, and a store has few of them."""


def probe_user(number: int) -> str:
    """The raw id of one of them.

    >>> probe_user(SLOTS + 3)
    'springtide-probe-3'
    """
    return f"{PREFIX}{number % SLOTS}"


def is_probe_user(user: object) -> bool:
    """Whether a raw id is one of theirs.

    >>> is_probe_user("springtide-probe-3"), is_probe_user("ann"), is_probe_user(7)
    (True, False, False)
    """
    return type(user) is str and user.startswith(PREFIX)
