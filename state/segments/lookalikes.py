"""Lookalikes of each segment: the users nearest to its members, in one file per segment for the workers of this host.

The process that stores members removes all files when control changes, so none contains an erased user.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptStore


class NearUser(NamedTuple):
    """A user, by the pseudonym (16 hexadecimal digits), and the mean cosine similarity with the members."""

    pseudonym: str
    similarity: float


class PrecisionAt(NamedTuple):
    """Precision at k of several rankings: the share of held-out members among the first k."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class LookalikeList(msgspec.Struct, frozen=True):
    """The lookalikes of one segment.

    Attributes:
        version: The version whose embeddings were used.
        members: Number of members with which users were compared.
        lookalikes: The users, nearest first.
        precision: Quality of the ranking; empty if too few members could be held out.
    """

    version: int
    at_ms: int
    members: int
    users: int
    lookalikes: tuple[NearUser, ...]
    precision: tuple[PrecisionAt, ...]


def write(folder: Path, segment: str, lookalikes: LookalikeList) -> None:
    """Writes a segment's list; durable once its directory is in place and synced."""
    durable.write(folder / f"{segment}.json", documents.encode_sealed(lookalikes))


def read(folder: Path, segment: str) -> LookalikeList | None:
    """Reads a segment's list; None if there is none."""
    path = folder / f"{segment}.json"
    try:
        return documents.decode_sealed(path.read_bytes(), LookalikeList)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is damaged ({error})", "remove it: it is computed again") from error
