"""Reads and appends the control generations of a registry; each one is a file that only one process can create."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from state import layout
from state.disk import files as durable
from state.disk.documents import decode_sealed, encode_sealed, seal, unseal
from state.errors import ControlConflict, CorruptVersion, RegistryError, UnfitMask, UnusableRegistry
from state.features.erased import Erased, Erasure, MaskedUsers
from state.process import killpoints
from state.process.log_lines import SaidOnce
from state.registry import control as documents
from state.registry.control import Control
from state.registry.directory import Directory, file_bytes, sharing, usable

_TRIES = 8
MOST_BYTES = 100_000
"""Limit of a generation's file: every process reads it when it changes, and all of them are kept."""

Part = Literal["planned", "answered", "learned"]
"""Part of an outcome.

planned   the counts of the command
answered  the command's observations once serving had switched
learned   the trainer's observations once it had caught up
"""

_log = logging.getLogger(__name__)


class Controls:
    """The generations of one registry directory. One object per thread."""

    def __init__(self, path: Path, directory: Directory | None = None) -> None:
        self._directory = directory or Directory(path)
        self._directory.ensure(layout.CONTROL, layout.MASKS, layout.OUTCOMES)
        self.path = path
        self._folder, self._masks = path / layout.CONTROL, path / layout.MASKS
        self._control: Control | None = None
        self._users: dict[str, MaskedUsers] = {}
        self._erased: dict[str, Erased] = {"": Erased.NOBODY}

    def control(self) -> Control | None:
        """The newest generation; None before the first.

        The first call lists all generations; later calls check one file name.

        Raises:
            CorruptVersion: The file fails its digest.
        """
        if self._control is None:
            number = max(self._generations(), default=0)
            if number:
                self._control = self._read_control(number)
        while self._control is not None and self._exists(self._control.generation + 1):
            self._control = self._read_control(self._control.generation + 1)
        return self._control

    def require(self, generation: int) -> None:
        """Checks that a generation that this host has applied still exists.

        Raises:
            UnusableRegistry: It does not. All generations are kept, so the directory is unmounted, removed or replaced.
        """
        if not self._exists(generation):
            raise UnusableRegistry(
                f"{self.path} lacks control generation {generation}, which this host has applied",
                "mount or restore the registry; if another one replaced it, restart serving",
            )

    def controls(self, last: int | None = None) -> list[Control]:
        """The generations in order, or only the `last` newest of them: the audit log.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        numbers = self._generations()
        return [self._read_control(number) for number in (numbers if last is None else numbers[-last:])]

    def generation(self, number: int) -> Control:
        """One generation.

        Raises:
            CorruptVersion: Its file is missing or fails its digest.
        """
        try:
            return self._read_control(number)
        except FileNotFoundError as error:
            raise CorruptVersion(
                f"{self._path_of(number)} is missing", "restore it from a copy: it is a part of the audit log"
            ) from error

    def beginning_of(self, epoch: int) -> Control | None:
        """The generation that began `epoch`; None if there is no such epoch.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        number = self._first_from(epoch)
        control = None if number is None else self.generation(number)
        return control if control is not None and control.epoch == epoch else None

    def beginnings(self) -> list[Control]:
        """The generation that began each epoch, ascending; of a few thousand generations it reads a few dozen.

        Raises:
            CorruptVersion: A file is missing or fails its digest.
        """
        newest = self.control()
        began = map(self.beginning_of, range(1, newest.epoch + 1)) if newest else ()
        return [control for control in began if control is not None]

    def last_of_epochs(self, first: int, last: int) -> list[Control]:
        """The last generation of each epoch from `first` to `last`, ascending; of a few thousand it reads a few dozen.

        Raises:
            CorruptVersion: A file is missing or fails its digest.
        """
        newest = self.control()
        if newest is None:
            return []
        ends = [self._first_from(epoch + 1) or newest.generation + 1 for epoch in range(first, last + 1)]
        return [self.generation(number) for number in sorted({end - 1 for end in ends} - {0})]

    def _first_from(self, epoch: int) -> int | None:
        """The first generation of `epoch` or a later one: epochs only grow from one generation to the next."""
        newest = self.control()
        if newest is None or newest.epoch < epoch:
            return None
        return 1 + bisect_left(range(1, newest.generation + 1), epoch, key=lambda number: self.generation(number).epoch)

    def change(self, transition: Callable[[Control], Control]) -> Control:
        """Writes the next generation by a pure transition; retries from the newest one if another process was faster.

        Returns:
            The newest generation; the existing one if the transition changes nothing.

        Raises:
            ControlConflict: There is no control yet, or other processes were faster each time.
        """
        for _ in range(_TRIES):
            control = self.control()
            if control is None:
                raise ControlConflict(f"{self.path} has no control yet", "start the trainer once: `springtide train`")
            wanted = transition(control)
            if wanted is control:
                return control
            try:
                return self.propose(wanted)
            except ControlConflict as error:
                conflict = error
        raise conflict

    def propose(self, control: Control) -> Control:
        """Makes `control` the newest generation, durably.

        1. Write the users of its masks and its erasures, each to a separate file.
        2. Write the generation to a temporary file.
        3. If the registry is shared, create its file in the object store, which only one process can do. The generation
           is then in force.
        4. Create a hard link with its number, which only one process can do, and sync the directory. The generation is
           in force at the latest from here on.

        A crash before 3 leaves control unchanged. After a later crash, the generation is in force on this host once it
        is fetched. Proposing the newest generation again, as after a crash, changes nothing.

        Raises:
            ControlConflict: Its generation exists and differs, or does not follow the newest one.
            UnfitMask: It does not fit in its file.
            UnusableRegistry: The disk refused; nothing was changed.
        """
        newest = self.control()
        if newest == control:
            return control
        number = control.generation
        if number != (newest.generation if newest else 0) + 1:
            raise ControlConflict(
                f"control generation {number} does not follow {newest.generation if newest else 'nothing'}",
                "see `springtide history`, then repeat the command",
            )
        data = seal(documents.encode(control))
        if len(data) > MOST_BYTES:
            raise UnfitMask(
                f"control with {len(control.masks)} masks takes {len(data):,} bytes, {MOST_BYTES:,} are allowed",
                "name users or a span of time in place of so many ranges, or lift some: `springtide unmask`",
            )
        temporary = self._directory.temporary(f"control-{number}")
        with usable(f"store control generation {number}"):
            try:
                # 1.
                self._keep_users_of(control)
                # 2.
                durable.write(temporary, data)
                killpoints.reach("control.written")
                # 3.
                created = self._create_shared(number, data)
                killpoints.reach("control.shared")
                # 4.
                created = created and durable.link(temporary, self._path_of(number))
            finally:
                temporary.unlink(missing_ok=True)
        if not created and (other := self._read_control(number)) != control:
            raise ControlConflict(
                f"control generation {number} was just created by {other.actor} ({other.action}: {other.reason})",
                "see `springtide history`, then repeat the command",
            )
        killpoints.reach("control.linked")
        return control

    def _create_shared(self, generation: int, data: bytes) -> bool:
        """Creates the file of a generation in the object store; True on success, or if the registry is not shared.

        If another process created the file, it fetches that generation and returns False.
        """
        if (store := self._directory.shared) is None:
            return True
        name = f"{layout.CONTROL}/{self._path_of(generation).name}"
        if self._directory.claim is not None and self._directory.claim.ask_store is not None:
            # The check follows the read of the newest generation, because a takeover creates a generation.
            self._directory.claim.ask_store()
        with sharing():
            # If the response was lost, the file in the object store is our own.
            if store.create(name, data) or (stored := store.read(name)) == data:
                return True
        self.receive(generation, stored)
        return False

    def receive(self, generation: int, data: bytes) -> None:
        """Stores a generation from the object store on this host, durably; the files of its users first.

        Raises:
            CorruptVersion: It fails its digest, or a file of users is missing in the object store.
            UnusableRegistry: The disk refused, or the object store cannot be reached.
        """
        path = self._path_of(generation)
        self._decoded(path, data)
        with usable(f"store control generation {generation}"):
            self._directory.create(path, data)

    # Files of users

    def _keep_users_of(self, control: Control) -> None:
        for entry in (*control.masks, *control.lifted):
            if entry.users and entry.users.digest not in self._users:
                self._keep(self._masks / f"{entry.users.digest}.users", entry.users.to_bytes())
        for digest, data in control.erased.files:
            if digest not in self._erased:
                self._keep(self._masks / f"{digest}.erased", data)

    def _keep(self, path: Path, data: bytes) -> None:
        """Writes users to the file that their digest names; a damaged one is replaced."""
        if (store := self._directory.shared) is not None:
            with sharing():
                store.write(f"{layout.MASKS}/{path.name}", data)
        if not (path.exists() and path.read_bytes() == data):
            self._directory.replace(path, data)
            killpoints.reach("control.users")

    def _masked_users(self, digest: str) -> MaskedUsers:
        if digest not in self._users:
            self._users[digest] = MaskedUsers.from_bytes(self._kept(f"{digest}.users", "the users of a mask"))
        return self._users[digest]

    def _erasures(self, digest: str) -> Erased:
        unread: list[tuple[str, Erasure]] = []
        while digest not in self._erased:
            erasure, before = Erasure.from_bytes(self._kept(f"{digest}.erased", "an erasure"))
            unread.append((digest, erasure))
            digest = before
        erased = self._erased[digest]
        for name, erasure in reversed(unread):
            erased = self._erased[name] = Erased((*erased.entries, erasure))
        return erased

    def _kept(self, name: str, noun: str) -> bytes:
        path = self._masks / name
        try:
            return self._directory.content(path, path.stem)
        except FileNotFoundError:
            raise ValueError(f"{path}, {noun}, is missing") from None
        except ValueError:
            raise ValueError(f"{path}, {noun}, fails its digest") from None

    # Files of generations

    def _generations(self) -> list[int]:
        # Not by glob, which treats an unreadable directory as an empty one.
        with usable("be listed"):
            names = os.listdir(self._folder)  # noqa: PTH208 - thousands of names
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _exists(self, generation: int) -> bool:
        with usable("be read"):
            return self._path_of(generation).exists()

    def _path_of(self, generation: int) -> Path:
        return self._folder / f"{generation:08d}.json"

    def _read_control(self, generation: int) -> Control:
        path = self._path_of(generation)
        return self._decoded(path, file_bytes(path))

    def _decoded(self, path: Path, data: bytes) -> Control:
        try:
            return documents.decode(unseal(data), self._masked_users, self._erasures)
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "restore it from a copy: it controls which version is served"
            ) from error

    # Outcomes

    def add_outcome(self, epoch: int, part: Part, document: Mapping[str, Any]) -> bool:
        """Stores a part of the outcome of the rollback that began `epoch`, durably; False if it exists already.

        Raises:
            UnusableRegistry: The disk refused.
        """
        path = self._outcome_path(epoch, part)
        with usable(f"keep the outcome of epoch {epoch}"):
            return not path.exists() and self._directory.create(path, encode_sealed(document))

    def outcome(self, epoch: int, part: Part) -> dict[str, Any] | None:
        """A part of the outcome of the rollback that began `epoch`; None if it is not written yet.

        Raises:
            CorruptVersion: Its file fails its digest.
        """
        path = self._outcome_path(epoch, part)
        try:
            return decode_sealed(file_bytes(path), dict[str, Any])
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "remove it: nothing but the history needs it"
            ) from error

    def _outcome_path(self, epoch: int, part: Part) -> Path:
        return self.path / layout.OUTCOMES / f"{epoch:08d}-{part}.json"


class ControlPoll:
    """Polls control for a process that keeps running without it; the registry may not exist. Not thread-safe."""

    def __init__(self, registry: Path) -> None:
        self._path = registry
        self._controls: Controls | None = None
        self._last: Control | None = None
        self._warn_once = SaidOnce(_log.warning)

    def poll(self) -> Control | None:
        """The newest control; None if there is none. If it cannot be read, warns once and returns the last one read."""
        try:
            self._last = self.read()
        except RegistryError as error:
            self._warn_once(f"{error}; the last control stays in force")
        return self._last

    def read(self) -> Control | None:
        """The newest control; None if there is none.

        Raises:
            RegistryError: It cannot be read.
        """
        if self._controls is None:
            if not (self._path / layout.CONTROL).is_dir():
                return None
            self._controls = Controls(self._path)
        return self._controls.control()
