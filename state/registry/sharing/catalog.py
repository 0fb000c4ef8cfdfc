"""The catalogue of a shared registry: which versions and programs lie there, so that one request tells a host what there is.

Whoever sends a version writes its files, its manifest, then the catalogue;
whoever takes one away writes the catalogue first. So what the catalogue names
is complete, but for a moment in which something goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from state.places.place import FilePlace
from state.registry import sealed

NAME = "catalog.json"


@dataclass(frozen=True)
class Catalog:
    """What lies in the place.

    Attributes:
        serial: Grows with each change.
        claim: Of the trainer that wrote it.
        last: The highest number that any version has had.
        folders: Of each durable version its folder, such as `bases/000000000001`, and the mark of its manifest.
        programs: Digests of the programs.
    """

    serial: int = 0
    claim: int = 0
    last: int = 0
    folders: Mapping[str, str] = field(default_factory=dict)
    programs: tuple[str, ...] = ()


def at_place(place: FilePlace) -> Catalog:
    """The catalogue there, for whoever writes it; an empty one where there is none, or a damaged one.

    Raises:
        UnusablePlace: The place cannot be reached.
    """
    try:
        return decode(place.read(NAME))
    except (FileNotFoundError, ValueError):
        return Catalog()


def version_of(folder: str) -> int:
    """The version of a folder.

    >>> version_of("merged/000000000012-000000000007")
    12
    """
    return int(folder.rpartition("/")[2].partition("-")[0])


def mark_of(data: bytes) -> str:
    """What tells a manifest that was rewritten from the one before.

    >>> len(mark_of(b"{}"))
    16
    """
    return hashlib.sha256(data).hexdigest()[:16]


def encode(catalog: Catalog) -> bytes:
    """`catalog` as JSON with its digest.

    >>> decode(encode(Catalog(3, 1, 7, {"bases/000000000001": "ab"}))).folders
    {'bases/000000000001': 'ab'}
    """
    body = {
        "serial": catalog.serial,
        "claim": catalog.claim,
        "last": catalog.last,
        "folders": dict(catalog.folders),
        "programs": list(catalog.programs),
    }
    return sealed.seal(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def decode(data: bytes) -> Catalog:
    """What `encode` wrote.

    Raises:
        ValueError: It is damaged.
    """
    try:
        found = json.loads(sealed.unseal(data))
        return Catalog(
            int(found["serial"]),
            int(found["claim"]),
            int(found["last"]),
            {str(folder): str(mark) for folder, mark in found["folders"].items()},
            tuple(str(one) for one in found["programs"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no catalogue: {error}") from error
