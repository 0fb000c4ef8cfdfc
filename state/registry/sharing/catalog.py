"""Catalogue of a shared registry: the versions and programs in the object store, readable with one request.

A sender of a version writes its files, its manifest, then the catalogue. A
deletion changes the catalogue first. So everything that the catalogue names is
complete, except for a moment during a deletion.
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
    """The contents of the object store.

    Attributes:
        serial: Serial number; grows with each change.
        claim: Claim of the trainer that wrote it.
        last: The highest number that any version has had.
        folders: Folder of each durable version, such as `bases/000000000001` -> mark of its manifest.
        programs: Digests of the programs.
    """

    serial: int = 0
    claim: int = 0
    last: int = 0
    folders: Mapping[str, str] = field(default_factory=dict)
    programs: tuple[str, ...] = ()


def at_place(place: FilePlace) -> Catalog:
    """Reads the catalogue in order to update it; an empty one if it is missing or damaged.

    Raises:
        UnusablePlace: The object store cannot be reached.
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
    """A mark that changes when a manifest is rewritten.

    >>> len(mark_of(b"{}"))
    16
    """
    return hashlib.sha256(data).hexdigest()[:16]


def encode(catalog: Catalog) -> bytes:
    """Encodes `catalog` as JSON with its digest.

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
    """Decodes what `encode` wrote.

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
