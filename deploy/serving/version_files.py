"""A host's copies of programs and feature specs: the applier fetches them from the registry, and workers read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from state.disk import files as durable
from state.errors import CorruptVersion, RegistryError, SpecMismatch
from state.features.spec import FeatureSpec
from state.registry.registry import Registry


class VersionFiles:
    """Copies programs and feature specs from the registry, so that workers read only this host's disk.

    `folder` is created if it is missing.
    """

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder, self._registry = folder, registry
        self._fetched: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def fetch_program(self, digest: str) -> None:
        """Copies a program if it is missing or its copy is damaged. The copy is durable when this returns.

        Raises:
            CorruptVersion, UnknownVersion: The registry's file is damaged or missing.
        """
        path = program_path(self._folder, digest)
        if path in self._fetched:
            return
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            durable.replace(path, self._registry.specs.program(digest))
        self._fetched.add(path)

    def fetch_spec(self, digest: str) -> None:
        """Copies a missing spec durably; does nothing if the registry lacks it, because `read_spec` reports that."""
        path = _spec_path(self._folder, digest)
        if path in self._fetched:
            return
        try:
            document = self._registry.specs.spec(digest)["spec"]
        except (SpecMismatch, RegistryError, KeyError):
            return
        if not path.exists():
            durable.replace(path, json.dumps(document, sort_keys=True).encode())
        self._fetched.add(path)


def program_path(folder: Path, digest: str) -> Path:
    """Returns the path of a program's file.

    >>> program_path(Path("programs"), "ab").as_posix()
    'programs/ab.tflite'
    """
    return folder / f"{digest}.tflite"


def _spec_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.spec.json"


def read_program(folder: Path, digest: str) -> bytes:
    """Reads the program with this SHA-256.

    Raises:
        CorruptVersion: The file is missing, or its digest does not match.
    """
    path = program_path(folder, digest)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptVersion(f"the program {path} is missing", "the applier copies it from the registry") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptVersion(f"the program {path} fails its digest", "remove the file, and the applier copies it again")
    return data


def read_spec(folder: Path, digest: str) -> FeatureSpec:
    """Reads a feature spec.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError, KeyError: It is not this spec, or belongs to a release that computes other windows.
    """
    spec = FeatureSpec.from_json(_spec_path(folder, digest).read_text())
    if spec.digest != digest:
        raise ValueError("the file has another spec")
    return spec
