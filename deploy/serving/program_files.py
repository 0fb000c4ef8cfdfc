"""A host's local copies of programs: the applier fetches them from the registry, and workers read them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from state.disk import files as durable
from state.errors import CorruptVersion
from state.registry.registry import Registry


class ProgramFiles:
    """Copies programs from the registry, so that workers read only this host's disk.

    Args:
        folder: The target directory; created if it is missing.
        registry: The source registry.
    """

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder = folder
        self._registry = registry
        self._brought: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def bring(self, digest: str) -> None:
        """Copies a program if it is missing or its copy is damaged. The copy is durable when this returns.

        Raises:
            CorruptVersion, UnknownVersion: The registry's file is damaged or missing.
        """
        if digest in self._brought:
            return
        final = path_of(self._folder, digest)
        if not final.exists() or hashlib.sha256(final.read_bytes()).hexdigest() != digest:
            program = self._registry.specs.program(digest)
            durable.replace(final, program)
        self._brought.add(digest)


def path_of(folder: Path, digest: str) -> Path:
    """Returns the path of a program's file.

    >>> path_of(Path("programs"), "ab").as_posix()
    'programs/ab.tflite'
    """
    return folder / f"{digest}.tflite"


def read_program(path: Path) -> bytes:
    """Reads a program file, whose name is its SHA-256.

    Raises:
        CorruptVersion: The file is missing, or its digest does not match.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptVersion(f"the program {path} is missing", "the applier copies it from the registry") from None
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise CorruptVersion(f"the program {path} fails its digest", "remove the file, and the applier copies it again")
    return data
