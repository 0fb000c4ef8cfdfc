"""Content-addressed storage of backup files: pieces of at most 4 MiB, each an object named by its SHA-256.

A piece that is stored already is not sent again. A piece is compressed (zstd); its digest is that of the
uncompressed bytes, and every read verifies it. Only one piece is in memory at a time, whatever the file's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from typing import BinaryIO

import zstandard

from deploy.backup.documents import KeptFile
from deploy.backup.places import OBJECTS
from state.errors import DamagedBackup
from state.places.place import FilePlace
from state.process import killpoints

PIECE_BYTES = 4 << 20
_LEVEL = 3


class Objects:
    """The objects of a backup location, as used by one backup or one restore.

    Args:
        place: Where the objects are stored.
        listed: Whether to list the existing objects first; a backup must, because it adds to them.
    """

    def __init__(self, place: FilePlace, listed: bool = True) -> None:
        self._place = place
        self._there = set(digests(place)) if listed else set()
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()
        self.sent_bytes = 0

    def has(self, file: KeptFile) -> bool:
        """Returns whether all pieces of a file are stored."""
        return self._there.issuperset(file.pieces)

    def keep(self, path: str, source: BinaryIO) -> Generator[int, None, KeptFile]:
        """Stores the content of `source`, to its end.

        Yields:
            The number of bytes stored, after each piece.

        Returns:
            The entry of the file in the backup.
        """
        whole, size, pieces = hashlib.sha256(), 0, []
        while piece := _piece(source):
            whole.update(piece)
            size += len(piece)
            pieces.append(self._keep(piece))
            yield len(piece)
        return KeptFile(path, size, whole.hexdigest(), tuple(pieces))

    def _keep(self, piece: bytes) -> str:
        digest = hashlib.sha256(piece).hexdigest()
        if digest not in self._there:
            stored = self._compressor.compress(piece)
            self._place.write(name_of(digest), stored)
            killpoints.reach("backup.object")
            self._there.add(digest)
            self.sent_bytes += len(stored)
        return digest

    def read(self, file: KeptFile) -> Iterator[bytes]:
        """Yields a file piece by piece; the last piece comes only after the whole file is verified.

        Raises:
            DamagedBackup: An object is missing or fails its digest; the message names it.
            BackupError: The backup location cannot be reached.
        """
        whole, size, held = hashlib.sha256(), 0, b""
        for digest in file.pieces:
            if held:
                yield held
            held = self._read(digest, file.path)
            whole.update(held)
            size += len(held)
        if (size, whole.hexdigest()) != (file.bytes, file.sha256):
            raise damaged(f"{file.path}, made of its pieces", self._place.told)
        if held:
            yield held

    def _read(self, digest: str, path: str) -> bytes:
        name = name_of(digest)
        try:
            stored = self._place.read(name)
        except FileNotFoundError:
            raise damaged(f"{name}, a piece of {path}", self._place.told, " is missing") from None
        try:
            fits = 0 <= zstandard.frame_content_size(stored) <= PIECE_BYTES
            piece = self._decompressor.decompress(stored) if fits else b""
        except zstandard.ZstdError:
            piece = b""
        if hashlib.sha256(piece).hexdigest() != digest:
            raise damaged(f"{name}, a piece of {path}", self._place.told)
        return piece


def damaged(what: str, told: str, how: str = " fails its digest") -> DamagedBackup:
    """Returns the error for a damaged object of a backup location.

    >>> damaged("objects/ab/ab12", "/mnt/backups").what
    'objects/ab/ab12 at /mnt/backups fails its digest'
    """
    return DamagedBackup(
        f"{what} at {told}{how}",
        "restore another backup; where you remove that file, the next backup sends it anew if it still has it",
    )


def name_of(digest: str) -> str:
    """Returns the path of an object in the backup location.

    >>> name_of("ab12")
    'objects/ab/ab12'
    """
    return f"{OBJECTS}/{digest[:2]}/{digest}"


def digests(place: FilePlace) -> list[str]:
    """Returns the digests of all objects in a backup location."""
    return [name.rpartition("/")[2] for name in place.names(OBJECTS)]


def _piece(source: BinaryIO) -> bytes:
    """Reads the next piece. Every piece but the last has full size, even if `source` is a pipe with short reads."""
    found, left = [], PIECE_BYTES
    while left and (part := source.read(left)):
        found.append(part)
        left -= len(part)
    return b"".join(found)
