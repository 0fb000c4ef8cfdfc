"""The registry: versions, the control generations that say which should be used, and what versions refer to.

    versions/<number>/         a delta: manifest.json and its files
    bases/<number>/            the full state at that version: the first one, and those of the compactor
    control/<generation>.json  what should be; never changed, never deleted
    programs/<sha256>.tflite   programs that answers run
    specs/<digest>/            spec.json and transform/ of the bootstrap
    tmp/                       what is being written; names carry their writer

Any number of processes may read. The trainer, under its lock, is the only one
to publish versions; whoever may write the directory may propose control.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from state.disk import files as durable
from state.errors import ControlConflict, CorruptVersion, SpecMismatch, WrongEpoch
from state.process import killpoints
from state.registry import control as codec
from state.registry import manifest
from state.registry.control import Control
from state.registry.manifest import Draft, Manifest
from state.registry.versions import Versions, file_bytes, usable

SERVING = "serving.safetensors"
TRAINING = "training.safetensors"
SPEC = "spec.json"
_TRIES = 8


class Registry(Versions):
    """One registry directory. One object per thread, except that `read` may run in any."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with contextlib.suppress(OSError):
            for name in ("control", "programs", "specs"):
                (path / name).mkdir(parents=True, exist_ok=True)
        self._control: Control | None = None

    # Control

    def control(self) -> Control | None:
        """The newest control generation; None before the first. Costs one look at a file name: poll it.

        Raises:
            CorruptVersion: The file fails its digest.
        """
        if self._control is None:
            numbers = self._generations()
            if numbers:
                self._control = self._read_control(numbers[-1])
        while self._control is not None and self._is_there(self._control.generation + 1):
            self._control = self._read_control(self._control.generation + 1)
        return self._control

    def controls(self) -> list[Control]:
        """All generations in order: the audit log.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        return [self._read_control(number) for number in self._generations()]

    def propose(self, control: Control) -> Control:
        """Makes `control` the newest generation, durably.

        Proposing the newest generation again, as after a crash, changes nothing.

        Raises:
            ControlConflict: Its generation exists and differs, or does not follow the newest one.
            UnusableRegistry: The disk refused; nothing was changed.
        """
        with usable(f"take control generation {control.generation}"):
            return self._propose(control)

    def _propose(self, control: Control) -> Control:
        newest = self.control()
        if newest == control:
            return control
        if control.generation != (newest.generation if newest else 0) + 1:
            raise ControlConflict(
                f"control generation {control.generation} does not follow {newest.generation if newest else 'nothing'}; "
                "look at `springtide history`, then repeat the command"
            )
        temporary = self._temporary(f"control-{control.generation}-{os.urandom(4).hex()}")
        durable.write(temporary, manifest.seal(codec.encode(control)))
        killpoints.reach("control.written")
        final = self._control_path(control.generation)
        try:
            os.link(temporary, final)
        except FileExistsError:
            other = self._read_control(control.generation)
            if other != control:
                raise ControlConflict(
                    f"control generation {control.generation} was just created by {other.actor} ({other.action}: {other.reason}); "
                    "look at `springtide history`, then repeat the command"
                ) from None
        finally:
            temporary.unlink()
        killpoints.reach("control.linked")
        durable.sync_directory(final.parent)
        return control

    def change(self, transition: Callable[[Control], Control]) -> Control:
        """Takes control on by a pure transition, again from the newest generation when somebody was faster.

        Returns:
            The newest generation; the one there was where the transition changes nothing.

        Raises:
            ControlConflict: There is no control yet, or others were faster all the time.
        """
        for _ in range(_TRIES):
            control = self.control()
            if control is None:
                raise ControlConflict(f"{self.path} has no control yet; start the trainer once: `springtide train`")
            wanted = transition(control)
            if wanted is control:
                return control
            try:
                return self.propose(wanted)
            except ControlConflict as error:
                conflict = error
        raise conflict

    # Versions

    def publish(self, draft: Draft, files: Mapping[str, bytes]) -> Manifest:
        """Adds a version; it is complete, durable and visible to every reader when this returns.

        Raises:
            WrongEpoch: Control is at another epoch; nothing was added.
            UnknownVersion: The parent is not kept.
        """
        self._check_epoch(draft.epoch)
        ancestors = () if draft.parent is None else self.manifest(draft.parent).visible
        while True:
            made = manifest.complete(draft, self.next_number(), ancestors, files)
            if self.add(made, files, last_check=lambda: self._check_epoch(draft.epoch)):
                return made

    def add_base(self, of: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Keeps the full state at the version `of`; nothing is added where there is one."""
        made = manifest.complete_base(of, files)
        self.add(made, files)
        return made

    # Programs and specs

    def add_program(self, program: bytes) -> str:
        """Keeps a program; returns its SHA-256, which names it. A damaged copy of it is replaced.

        Raises:
            UnusableRegistry: The disk refused.
        """
        digest = hashlib.sha256(program).hexdigest()
        final = self.path / "programs" / f"{digest}.tflite"
        with usable(f"keep program {digest[:12]}"):
            if not final.exists() or final.read_bytes() != program:
                temporary = self._temporary(f"program-{digest}")
                temporary.unlink(missing_ok=True)
                durable.write(temporary, program)
                temporary.replace(final)
                durable.sync_directory(final.parent)
        return digest

    def program(self, digest: str) -> bytes:
        """The program with this SHA-256.

        Raises:
            CorruptVersion: It is missing or fails its digest.
        """
        path = self.path / "programs" / f"{digest}.tflite"
        try:
            program = file_bytes(path)
        except FileNotFoundError:
            raise CorruptVersion(f"{path} is missing; restart the trainer to lower the model again") from None
        if hashlib.sha256(program).hexdigest() != digest:
            raise CorruptVersion(f"{path} fails its digest; remove it and restart the trainer to lower the model again")
        return program

    def specs(self) -> list[str]:
        """The digests of the feature specs that were bootstrapped."""
        with usable("be listed"):
            return sorted(path.name for path in (self.path / "specs").iterdir() if (path / SPEC).exists())

    def add_spec(self, digest: str, document: Mapping[str, Any], fill: Callable[[Path], None]) -> bool:
        """Keeps what the bootstrap found out; False where another was faster, whose result stays.

        Args:
            digest: Of the feature spec.
            document: Anything JSON.
            fill: Writes the directory `transform/` into the folder it is given.

        Raises:
            UnusableRegistry: The disk refused.
        """
        with usable(f"take feature spec {digest[:12]}"):
            return self._add_spec(digest, document, fill)

    def _add_spec(self, digest: str, document: Mapping[str, Any], fill: Callable[[Path], None]) -> bool:
        final = self.path / "specs" / digest
        temporary = self._temporary(f"spec-{digest}")
        temporary.mkdir()
        try:
            fill(temporary)
            files = {
                str(path.relative_to(temporary)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            body = json.dumps({**document, "files": files}, sort_keys=True).encode()
            durable.write(temporary / SPEC, manifest.seal(body))
            durable.sync_tree(temporary)
            killpoints.reach("spec.written")
            temporary.rename(final)
        except OSError:
            if not (final / SPEC).exists():
                raise
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        durable.sync_directory(final.parent)
        return True

    def spec(self, digest: str) -> dict[str, Any]:
        """What the bootstrap wrote about a feature spec.

        Raises:
            SpecMismatch: It was not bootstrapped here.
            CorruptVersion: The file fails its digest.
        """
        path = self.path / "specs" / digest / SPEC
        try:
            document: dict[str, Any] = json.loads(manifest.unseal(file_bytes(path)))
        except FileNotFoundError:
            raise SpecMismatch(
                f"{path} does not exist: run `springtide bootstrap` with these feature settings"
            ) from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise CorruptVersion(f"{path} is damaged: {error}; move it away and run `springtide bootstrap`") from error
        return document

    def transform(self, digest: str) -> Path:
        """The directory with the transform graph of a feature spec, every file checked.

        Raises:
            SpecMismatch: It was not bootstrapped here.
            CorruptVersion: A file is missing or fails its digest.
        """
        folder = self.path / "specs" / digest
        for name, expected in self.spec(digest)["files"].items():
            path = folder / name
            if not path.is_file() or hashlib.sha256(file_bytes(path)).hexdigest() != expected:
                raise CorruptVersion(
                    f"{path} is missing or fails its digest; move {folder} away and run `springtide bootstrap`"
                )
        return folder / "transform"

    def _check_epoch(self, epoch: int) -> None:
        control = self.control()
        if control is None or control.epoch != epoch:
            now = "there is no control yet" if control is None else f"control is at epoch {control.epoch}"
            raise WrongEpoch(f"a version of epoch {epoch} was refused: {now}")

    def _generations(self) -> list[int]:
        # Not by glob, which takes a directory that it may not read for an empty one.
        with usable("be listed"):
            paths = list((self.path / "control").iterdir())
        return sorted(int(path.stem) for path in paths if path.suffix == ".json" and path.stem.isdecimal())

    def _is_there(self, generation: int) -> bool:
        with usable("be read"):
            return self._control_path(generation).exists()

    def _control_path(self, generation: int) -> Path:
        return self.path / "control" / f"{generation:08d}.json"

    def _read_control(self, generation: int) -> Control:
        path = self._control_path(generation)
        try:
            return codec.decode(json.loads(manifest.unseal(file_bytes(path))))
        except (ValueError, msgspec.MsgspecError) as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}; restore it from a copy: it says what should be served"
            ) from error


def require_preprocessing(about: Mapping[str, Any], preprocessing: str) -> None:
    """Refuses a preprocessing that is not the one which a feature spec was bootstrapped with.

    Args:
        about: What the bootstrap wrote about the spec.
        preprocessing: The setting `model.preprocessing`.

    Raises:
        SpecMismatch: It is another one.
    """
    if about.get("preprocessing", preprocessing) != preprocessing:
        raise SpecMismatch(
            f"the registry was bootstrapped with preprocessing {about['preprocessing']}, model.preprocessing is "
            f"{preprocessing}; put it back, or start a new state directory"
        )
