"""Files that versions refer to by digest: the programs that serving runs, and the specs of the bootstrap."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from state import layout
from state.config.sections import Model
from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptVersion, RegistryError, SpecMismatch
from state.features.spec import FeatureSpec
from state.registry.directory import Directory, file_bytes, usable

SPEC = "spec.json"
_SEAL_BYTES = 32


class Specs:
    """The programs and feature specs of one registry directory."""

    def __init__(self, directory: Directory) -> None:
        directory.ensure(layout.PROGRAMS, layout.SPECS, layout.PREPARED)
        self._directory = directory
        self._programs, self._specs = directory.path / layout.PROGRAMS, directory.path / layout.SPECS
        self._prepared = directory.path / layout.PREPARED

    def add_program(self, program: bytes) -> str:
        """Stores a program; returns its SHA-256, which is its name. Replaces a damaged copy.

        Raises:
            UnusableRegistry: The disk refused.
        """
        digest = durable.digest(program)
        path = self._programs / f"{digest}.tflite"
        with usable(f"keep program {digest[:12]}"):
            if path.exists() and path.read_bytes() == program:
                # It is in use again, so its age is reset for garbage collection.
                os.utime(path)
            else:
                self._directory.replace(path, program)
        return digest

    def program(self, digest: str) -> bytes:
        """The program with this SHA-256.

        Raises:
            CorruptVersion: It is missing or fails its digest.
        """
        path = self._programs / f"{digest}.tflite"
        try:
            return self._directory.content(path, digest)
        except FileNotFoundError:
            raise CorruptVersion(f"{path} is missing", "restart the trainer to lower the model again") from None
        except ValueError as error:
            raise CorruptVersion(str(error), "remove it and restart the trainer to lower the model again") from None

    def names(self) -> list[str]:
        """The names of completed bootstraps: digests of feature specs, see `bootstrapped`."""
        with usable("be listed"):
            return sorted(path.name for path in self._specs.iterdir() if (path / SPEC).exists())

    def bootstrapped(self, spec: str, model: Model) -> str | None:
        """The name under which a feature spec was bootstrapped with the preprocessing of `model`; None if it was not.

        The first bootstrap is named by the spec's digest. Bootstraps with another preprocessing have a number appended.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        names = [name for name in self.names() if name.partition(".")[0] == spec]
        return next((name for name in names if fits(self.spec(name), model)), None)

    def free_name(self, spec: str) -> str:
        """The name for the next bootstrap of a feature spec.

        Raises:
            UnusableRegistry: The disk refused.
        """
        used = {*self.names()}
        names = itertools.chain([spec], (f"{spec}.{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in used)

    def add_spec(self, digest: str, document: Mapping[str, Any], fill: Callable[[Path], None]) -> bool:
        """Stores the result of a bootstrap; False if another process was faster, whose result is kept.

        Args:
            digest: Digest of the feature spec, or `free_name`.
            document: Any JSON values.
            fill: Writes the directory `transform/` into a given folder.

        Raises:
            UnusableRegistry: The disk refused.
        """
        with usable(f"store feature spec {digest[:12]}"):
            return self._directory.add_folder(self._specs / digest, SPEC, document, fill)

    def spec(self, digest: str) -> dict[str, Any]:
        """The document that the bootstrap wrote for a feature spec.

        Raises:
            SpecMismatch: It was not bootstrapped here.
            CorruptVersion: The file fails its digest.
        """
        path = self._specs / digest / SPEC
        try:
            return documents.decode_sealed(file_bytes(path), dict[str, Any])
        except FileNotFoundError:
            raise SpecMismatch(
                f"{path} does not exist: run `springtide bootstrap` with these feature settings"
            ) from None
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "move it away and run `springtide bootstrap`"
            ) from error

    def transform(self, digest: str) -> Path:
        """The directory with the transform graph of a feature spec, with every file checked.

        Raises:
            SpecMismatch: It was not bootstrapped here.
            CorruptVersion: A file is missing or fails its digest.
        """
        folder = self._specs / digest
        for name, expected in self.spec(digest)["files"].items():
            path = folder / name
            if not path.is_file() or durable.digest(file_bytes(path)) != expected:
                raise CorruptVersion(
                    f"{path} is missing or fails its digest", f"move {folder} away and run `springtide bootstrap`"
                )
        return folder / "transform"

    def prepared(self, name: str, environment: Mapping[str, str]) -> memoryview | None:
        """What `keep_prepared` stored for a bootstrap in an equal environment, writable.

        None if there is nothing, or it is damaged, or it is of another environment or bootstrap.
        """
        try:
            content = bytearray((self._prepared / name).read_bytes())
        except OSError:
            return None
        seal, data = bytes(content[:_SEAL_BYTES]), memoryview(content)[_SEAL_BYTES:]
        return data if seal == self._seal(name, environment, data) else None

    def keep_prepared(self, name: str, environment: Mapping[str, str], data: bytes) -> None:
        """Stores what follows from a bootstrap and an environment alone, in place of what was stored for the bootstrap.

        It is not part of a backup or of a shared registry, because it can be computed again.

        Raises:
            UnusableRegistry: The disk refused.
        """
        with usable(f"keep what follows from feature spec {name[:12]}"):
            self._directory.replace(self._prepared / name, self._seal(name, environment, data) + data)

    def _seal(self, name: str, environment: Mapping[str, str], data: bytes | memoryview) -> bytes:
        """SHA-256 over a bootstrap's files, an environment and what follows from them."""
        sealed_by = json.dumps([self.spec(name)["files"], dict(environment)], sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(sealed_by).digest() + hashlib.sha256(data).digest()).digest()


def fits(document: Mapping[str, Any], model: Model) -> bool:
    """Whether the bootstrap with this `document` used this preprocessing, with equal values of the options it read."""
    if document.get("preprocessing", model.preprocessing) != model.preprocessing:
        return False
    return all(model.written.get(name, default) == then for name, (then, default) in document.get("asked", {}).items())


class SpecActions:
    """Names of actions by number, for every feature spec that was ever bootstrapped; cached. `own` is always known."""

    def __init__(self, registry: Path, own: FeatureSpec) -> None:
        self._registry = registry
        self._known = {own.digest: own.actions}

    def of(self, spec: str) -> tuple[str, ...] | None:
        """The names, in the order of their numbers; None for an unknown spec."""
        # A reader must not create a registry.
        if spec not in self._known and (self._registry / layout.SPECS).is_dir():
            with contextlib.suppress(SpecMismatch, RegistryError, KeyError):
                document = Specs(Directory(self._registry)).spec(spec)
                self._known[spec] = tuple(document["spec"]["actions"])
        return self._known.get(spec)
