"""The document of a backup: what the backup contains. It is sealed with its digest and written last."""

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
        path: Its path in a restored system: under `registry/`, `stream-<shard>/`, or `salt`.
        bytes: Its size.
        sha256: Digest of its bytes, hexadecimal.
        pieces: The digests of its pieces, in order; each piece is an object.
    """

    path: str
    bytes: int
    sha256: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Backup:
    """The contents of one backup.

    Attributes:
        id: When the backup started, in UTC; ids ascend.
        created_at_ms: When the backup started, wall clock.
        release: The Springtide release that made it.
        salt: Fingerprint of the users' salt.
        spec: Digest of the feature spec of `version`; empty if there is none.
        generation: The newest control generation in the backup.
        epoch: The trainer's epoch in that generation.
        version: The newest version of that epoch, from which the trainer continues; None if there was none yet.
        log: The position in the training log from which the trainer continues.
        positions: By shard, the next offset of each source; the shard's histories are at least that far.
        versions: How many versions are in the backup.
        files: All files of the backup.
        left_out: Damaged parts that are not in the backup, with the reason.
        sent_bytes: How many bytes this backup added to the object store, after compression.
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
        """The total size of all files."""
        return sum(one.bytes for one in self.files)

    @property
    def with_salt(self) -> bool:
        """Whether the backup contains the salt."""
        return any(one.path == "salt" for one in self.files)


def id_at(now_ms: int) -> str:
    """Returns the id of a backup that starts now.

    >>> id_at(1_795_719_672_345)
    '20261126T190112.345Z'
    """
    import datetime

    at = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    return f"{at:%Y%m%dT%H%M%S}.{now_ms % 1000:03d}Z"


def is_id(text: str) -> bool:
    """Returns whether a text has the form of a backup's id.

    >>> is_id("20261126T190112.345Z"), is_id("../x")
    (True, False)
    """
    return _ID.fullmatch(text) is not None


def encode(backup: Backup) -> bytes:
    """Encodes `backup` as canonical JSON with its digest."""
    return sealed.encode(backup)


def decode(data: bytes) -> Backup:
    """Decodes a backup that `encode` wrote.

    Raises:
        ValueError: The digest does not match, this release does not read the format, or a file entry is invalid.
    """
    found = sealed.decode(data, Backup)
    if found.format != FORMAT:
        raise ValueError(f"it is of format {found.format}; this release reads {FORMAT}")
    for one in found.files:
        if not is_inside(one.path) or not all(map(_DIGEST.fullmatch, (one.sha256, *one.pieces))):
            raise ValueError(f"it names an impossible file {one.path!r}")
    return found


def is_inside(path: str) -> bool:
    """Returns whether a relative path stays below its base directory.

    >>> is_inside("registry/control/00000001.json"), is_inside("registry/../x"), is_inside("/etc/passwd"), is_inside("")
    (True, False, False, False)
    """
    return all(part not in ("", ".", "..") and "\0" not in part for part in path.split("/"))
