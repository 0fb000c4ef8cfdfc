"""Packs several recent versions into one file, so that a host fetches them with one request a second. Pure.

    32 bytes   SHA-256 of what follows
    the rest   one zstd frame: head length (8 bytes, little endian), head (JSON), the files one after another

The head has the files of each version with their sizes, and the serial number of
the catalogue. A pack is named by its first version, so a host that has the
previous version knows the name to request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import zstandard

FOLDER = "recent"
DIGEST_BYTES, LENGTH_BYTES = 32, 8
LEVEL = 1
MOST_BYTES = 1 << 32
"""Size limit of an unpacked pack. One second of the busiest trainer takes some megabytes."""


class Pack(NamedTuple):
    """The contents of a pack.

    Attributes:
        serial: Serial number of the catalogue when the pack was built.
        versions: (number, files by name) of each version, ascending.
    """

    serial: int
    versions: Sequence[tuple[int, Mapping[str, bytes]]]


def name_of(first: int) -> str:
    """The name of the pack that begins with this version.

    >>> name_of(7)
    'recent/000000000007'
    """
    return f"{FOLDER}/{first:012d}"


def encode(pack: Pack) -> bytes:
    """Encodes `pack` as a file.

    >>> decode(encode(Pack(4, [(7, {"manifest.json": b"{}", "a": b"12"})])))
    Pack(serial=4, versions=[(7, {'manifest.json': b'{}', 'a': b'12'})])
    """
    listed = [[number, [[name, len(data)] for name, data in files.items()]] for number, files in pack.versions]
    head = json.dumps({"catalog": pack.serial, "versions": listed}).encode()
    parts = [len(head).to_bytes(LENGTH_BYTES, "little"), head]
    parts += [data for _, files in pack.versions for data in files.values()]
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(parts))
    return hashlib.sha256(frame).digest() + frame


def decode(data: bytes) -> Pack:
    """Decodes what `encode` wrote.

    Raises:
        ValueError: It is truncated or damaged.
    """
    frame = data[DIGEST_BYTES:]
    if hashlib.sha256(frame).digest() != data[:DIGEST_BYTES]:
        raise ValueError("a pack of versions fails its digest")
    if not 0 <= zstandard.frame_content_size(frame) <= MOST_BYTES:
        raise ValueError("a pack of versions says that it is larger than any")
    body = memoryview(zstandard.ZstdDecompressor().decompress(frame))
    begin = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    head = json.loads(bytes(body[LENGTH_BYTES:begin]))
    versions = []
    for number, listed in head["versions"]:
        files = {}
        for name, size in listed:
            files[str(name)] = bytes(body[begin : begin + size])
            begin += size
        versions.append((int(number), files))
    return Pack(int(head["catalog"]), versions)
