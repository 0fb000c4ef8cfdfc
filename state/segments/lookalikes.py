"""The users nearest to a segment's members as they were found last, for workers of this host: a file a segment.

    lookalikes/<segment>.json   `LookalikeList` as JSON, with its digest

They are whole or absent. Whoever keeps members removes all of them where control
changes: an erased user is in none, and none is of a version that was left.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from state.disk import files as durable
from state.errors import CorruptStore
from state.registry import sealed


class NearUser(NamedTuple):
    """A user by the pseudonym, 16 hexadecimal digits, and the mean cosine with the members."""

    pseudonym: str
    similarity: float


class PrecisionAt(NamedTuple):
    """Of the first k of several orders, which share are members that were held back."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class LookalikeList(msgspec.Struct, frozen=True):
    """One segment's.

    Attributes:
        version: By which they were found.
        at_ms: When, wall clock.
        members: How many members were compared with.
        users: How many users were looked at.
        lookalikes: The nearest first.
        precision: How good the order is; empty where too few members could be held back.
    """

    version: int
    at_ms: int
    members: int
    users: int
    lookalikes: tuple[NearUser, ...]
    precision: tuple[PrecisionAt, ...]


def write(folder: Path, segment: str, found: LookalikeList) -> None:
    """Writes a segment's list; durable once its directory is in place and synced.

    Raises:
        OSError: The disk refused.
    """
    durable.write(folder / f"{segment}.json", sealed.encode(found))


def read(folder: Path, segment: str) -> LookalikeList | None:
    """A segment's list; None where there is none.

    Raises:
        CorruptStore: It is damaged.
    """
    path = folder / f"{segment}.json"
    try:
        return sealed.decode(path.read_bytes(), LookalikeList)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is damaged ({error})", "remove it: it is made again") from error
