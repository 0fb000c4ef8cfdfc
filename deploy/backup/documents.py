"""What a backup says about itself: one document, sealed with its digest, written last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from state.registry import sealed
from state.registry.manifest import LogRange

FORMAT = 1
_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file in a backup.

    Attributes:
        path: Where it belongs: under `registry/`, `stream-<shard>/`, or `salt`.
        bytes: Its size.
        sha256: Digest of its bytes, hexadecimal.
        pieces: The digests of its pieces, in order; each is an object.
    """

    path: str
    bytes: int
    sha256: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup.

    Attributes:
        id: When it was begun, in UTC; ids ascend.
        created_at_ms: Likewise, wall clock.
        release: Of Springtide.
        salt: Fingerprint of the users' salt.
        spec: Digest of the feature spec of `version`; empty where there is none.
        generation: The newest control generation in it.
        epoch: The trainer's epoch of that.
        version: The newest version of that epoch, on which the trainer goes on; None where there was none yet.
        log: Where the trainer reads on.
        positions: By shard the next offset of each source; its histories are there, or further.
        versions: How many versions are in it.
        files: All of it.
        left_out: What was damaged and is not in it, with the reason.
        sent_bytes: How many bytes were new to the place, as they lie there.
    """

    id: str
    created_at_ms: int
    release: str
    salt: str
    spec: str
    generation: int
    epoch: int
    version: int | None
    log: LogRange | None
    positions: Mapping[str, Mapping[str, int]]
    versions: int
    files: tuple[KeptFile, ...]
    left_out: tuple[str, ...] = ()
    sent_bytes: int = 0
    format: int = field(default=FORMAT)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(one.bytes for one in self.files)

    @property
    def with_salt(self) -> bool:
        """Whether the salt is in it."""
        return any(one.path == "salt" for one in self.files)


def id_at(now_ms: int) -> str:
    """The id of a backup begun now.

    >>> id_at(1_795_719_672_345)
    '20261126T190112.345Z'
    """
    import datetime

    at = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    return f"{at:%Y%m%dT%H%M%S}.{now_ms % 1000:03d}Z"


def is_id(text: str) -> bool:
    """Whether this may be a backup's id.

    >>> is_id("20261126T190112.345Z"), is_id("../x")
    (True, False)
    """
    return _ID.fullmatch(text) is not None


def encode(backup: Backup) -> bytes:
    """`backup` as canonical JSON with its digest."""
    return sealed.encode(backup)


def decode(data: bytes) -> Backup:
    """The backup that `encode` wrote.

    Raises:
        ValueError: The bytes fail their digest, are of a format that this release does not read, or name impossible files.
    """
    found = sealed.decode(data, Backup)
    if found.format != FORMAT:
        raise ValueError(f"it is of format {found.format}; this release reads {FORMAT}")
    for one in found.files:
        if not is_inside(one.path) or not all(map(_DIGEST.fullmatch, (one.sha256, *one.pieces))):
            raise ValueError(f"it names an impossible file {one.path!r}")
    return found


def is_inside(path: str) -> bool:
    """Whether a path stays below the directory that it is taken from.

    >>> is_inside("registry/control/00000001.json"), is_inside("registry/../x"), is_inside("/etc/passwd"), is_inside("")
    (True, False, False, False)
    """
    return all(part not in ("", ".", "..") and "\0" not in part for part in path.split("/"))
