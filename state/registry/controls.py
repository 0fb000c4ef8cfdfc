"""Reads and appends the control generations of a registry; each one is a file that only one process can create.

`UsersFiles` keeps the files of users that control refers to by digest: masks, and erasures, each of which names its
predecessor. In a shared registry they are uploaded before a generation refers to them. Other hosts fetch them when
a generation does.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.errors import ControlConflict, CorruptVersion, UnfitMask
from state.features.erased import Erased, Erasure
from state.features.masked_users import MaskedUsers
from state.process import killpoints
from state.registry import control_codec, sealed
from state.registry.control import Control
from state.registry.directory import Directory, file_bytes, sharing, usable

_TRIES = 8
NEWEST = "newest"  # the file next to the generations that records the newest one
MOST_BYTES = 100_000
"""Limit of a generation's file: every process reads it when it changes, and all of them are kept."""


class UsersFiles(Directory):
    """The users' files of one registry directory. One object per thread."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, layout.MASKS)
        self._users: dict[str, MaskedUsers] = {}
        self._erased: dict[str, Erased] = {"": Erased.NOBODY}

    def keep_users_of(self, control: Control) -> None:
        """Writes the users of its masks and its erasures, each to a separate file, durably; existing files stay.

        Raises:
            OSError: The disk refused.
            UnusableRegistry: The shared store refused.
        """
        for entry in (*control.masks, *control.lifted):
            self._keep_users(entry.users)
        for digest, data in control.erased.files:
            if digest not in self._erased:
                self._keep(self._erasure_path(digest), data)

    def _keep_users(self, users: MaskedUsers) -> None:
        if users and users.digest not in self._users:
            self._keep(self._users_path(users.digest), users.to_bytes())

    def _keep(self, final: Path, data: bytes) -> None:
        """Writes users to the file that their digest names; a damaged one is replaced."""
        if (place := self.shared) is not None:
            with sharing():
                place.write(f"{layout.MASKS}/{final.name}", data)
        if final.exists() and final.read_bytes() == data:
            return
        temporary = self.temporary(f"users-{final.stem}-{os.urandom(4).hex()}")
        durable.write(temporary, data)
        temporary.replace(final)
        durable.sync_directory(final.parent)
        killpoints.reach("control.users")

    def masked_users(self, digest: str) -> MaskedUsers:
        """The users of a mask, read once; control generations share them.

        Raises:
            ValueError: Their file is missing or damaged.
        """
        if digest not in self._users:
            self._users[digest] = MaskedUsers.from_bytes(self._kept(self._users_path(digest), "the users of a mask"))
        return self._users[digest]

    def erasures(self, digest: str) -> Erased:
        """The chain of erasures up to the file of this SHA-256, each read once; control generations share them.

        Raises:
            ValueError: A file is missing or damaged.
        """
        unread: list[tuple[str, Erasure]] = []
        at = digest
        while at not in self._erased:
            found, before = Erasure.from_bytes(self._kept(self._erasure_path(at), "an erasure"))
            unread.append((at, found))
            at = before
        erased = self._erased[at]
        for name, one in reversed(unread):
            erased = self._erased[name] = Erased((*erased.entries, one))
        return erased

    def _kept(self, path: Path, noun: str) -> bytes:
        try:
            return self.content(path, path.stem)
        except FileNotFoundError:
            raise ValueError(f"{path}, {noun}, is missing") from None
        except ValueError:
            raise ValueError(f"{path}, {noun}, fails its digest") from None

    def _users_path(self, digest: str) -> Path:
        return self.path / layout.MASKS / f"{digest}.users"

    def _erasure_path(self, digest: str) -> Path:
        return self.path / layout.MASKS / f"{digest}.erased"


class Controls(UsersFiles):
    """The generations of one registry directory. One object per thread."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, layout.CONTROL)
        self._control: Control | None = None

    def control(self) -> Control | None:
        """The newest control generation; None before the first. It is cheap to poll: it checks one file name.

        Raises:
            CorruptVersion: The file fails its digest.
        """
        if self._control is None:
            number = self._noted() or max(self._generations(), default=0)
            if number:
                self._control = self._read_control(number)
        while self._control is not None and self._is_there(self._control.generation + 1):
            self._control = self._read_control(self._control.generation + 1)
        return self._control

    def controls(self, last: int | None = None) -> list[Control]:
        """The generations in order: the audit log.

        Args:
            last: How many of the newest; None for all, which can be many in an old system.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        numbers = self._generations()
        return [self._read_control(number) for number in (numbers if last is None else numbers[-last:])]

    def beginning_of(self, epoch: int) -> Control | None:
        """The generation that began `epoch`; None if there is no such epoch.

        Raises:
            CorruptVersion: A file fails its digest.
        """
        number = self._first_from(epoch)
        found = None if number is None else self.generation(number)
        return found if found is not None and found.epoch == epoch else None

    def beginnings(self) -> list[Control]:
        """The generation that began each epoch, ascending; of a few thousand generations it reads a few dozen.

        Raises:
            CorruptVersion: A file is missing or fails its digest.
        """
        newest = self.control()
        began = map(self.beginning_of, range(1, newest.epoch + 1)) if newest else ()
        return [one for one in began if one is not None]

    def last_of_epochs(self, first: int, last: int) -> list[Control]:
        """The last generation of each epoch from `first` to `last`, ascending; of a few thousand it reads a few dozen.

        Raises:
            CorruptVersion: A file is missing or fails its digest.
        """
        newest = self.control()
        ends = [self._first_from(epoch + 1) for epoch in range(first, last + 1)] if newest else []
        numbers = sorted({(end or newest.generation + 1) - 1 for end in ends if newest} - {0})
        return [self.generation(number) for number in numbers]

    def _first_from(self, epoch: int) -> int | None:
        """The first generation of `epoch` or a later one: epochs only grow from one generation to the next."""
        newest = self.control()
        if newest is None or newest.epoch < epoch:
            return None
        return 1 + bisect_left(range(1, newest.generation + 1), epoch, key=lambda one: self.generation(one).epoch)

    def propose(self, control: Control) -> Control:
        """Makes `control` the newest generation, durably.

        1. The users of its masks and its erasures, each in a file of their own.
        2. The generation, in a temporary file.
        3. If the registry is shared, its file in the shared store, which only one process can create. It counts from then
           on.
        4. A hard link by its number, which only one process can make. It counts from here on at the latest.
        5. The directory is synced.

        A crash before 3 leaves control as it was. After a later crash it counts here once it is fetched. Proposing the
        newest generation again, as after a crash, changes nothing.

        Raises:
            ControlConflict: Its generation exists and differs, or does not follow the newest one.
            UnfitMask: It does not fit in its file.
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
                f"control generation {control.generation} does not follow {newest.generation if newest else 'nothing'}",
                "look at `springtide history`, then repeat the command",
            )
        # 1.
        self.keep_users_of(control)
        data = sealed.seal(control_codec.encode(control))
        if len(data) > MOST_BYTES:
            raise UnfitMask(
                f"control with {len(control.masks)} masks takes {len(data):,} bytes, {MOST_BYTES:,} are allowed",
                "name users or a span of time in place of so many ranges, or lift some: `springtide unmask`",
            )
        # 2.
        temporary = self.temporary(f"control-{control.generation}-{os.urandom(4).hex()}")
        durable.write(temporary, data)
        killpoints.reach("control.written")
        final = self._control_path(control.generation)
        try:
            # 3.
            self._create_shared(control.generation, data)
            killpoints.reach("control.shared")
            # 4.
            os.link(temporary, final)
        except FileExistsError:
            other = self._read_control(control.generation)
            if other != control:
                raise ControlConflict(
                    f"control generation {control.generation} was just created by {other.actor} ({other.action}: {other.reason})",
                    "look at `springtide history`, then repeat the command",
                ) from None
        finally:
            temporary.unlink()
        killpoints.reach("control.linked")
        # 5.
        durable.sync_directory(final.parent)
        self._note(control.generation)
        return control

    def _create_shared(self, generation: int, data: bytes) -> None:
        """Creates the file of a generation in the shared store; does nothing if the registry is not shared.

        Raises:
            FileExistsError: Another process created it; that file is now here.
            UnusableRegistry: The shared store cannot be reached.
        """
        if (place := self.shared) is None:
            return
        name = f"{layout.CONTROL}/{self._control_path(generation).name}"
        with sharing():
            if place.create(name, data):
                return
            # If the reply was lost, the file there is our own.
            theirs = place.read(name)
        if theirs != data:
            self.receive(generation, theirs)
            raise FileExistsError(name)

    def receive(self, generation: int, data: bytes) -> None:
        """Stores a generation from the shared store here, durably; the files of its users first.

        Raises:
            CorruptVersion: It fails its digest, or a file of users is missing there.
            UnusableRegistry: The disk refused, or the shared store cannot be reached.
        """
        final = self._control_path(generation)
        self._decoded(final, data)
        with usable(f"take control generation {generation}"):
            temporary = self.temporary(f"control-{generation}-{os.urandom(4).hex()}")
            durable.write(temporary, data)
            try:
                os.link(temporary, final)
            except FileExistsError:
                return
            finally:
                temporary.unlink()
            durable.sync_directory(final.parent)
        self._note(generation)

    def generation(self, number: int) -> Control:
        """One generation.

        Raises:
            CorruptVersion: Its file is missing or fails its digest.
        """
        try:
            return self._read_control(number)
        except FileNotFoundError as error:
            raise CorruptVersion(
                f"{self._control_path(number)} is missing", "restore it from a copy: it is a part of the audit log"
            ) from error

    def _note(self, generation: int) -> None:
        """Records which generation is the newest, to avoid listing all; a lost or late record does no harm."""
        temporary = self.temporary(f"newest-{os.urandom(4).hex()}")
        with suppress(OSError):
            temporary.write_text(str(generation))
            temporary.replace(self.path / layout.CONTROL / NEWEST)

    def _noted(self) -> int:
        """The recorded generation, if it exists, else 0. Newer ones may follow it."""
        try:
            number = int((self.path / layout.CONTROL / NEWEST).read_text())
        except (OSError, ValueError):
            return 0
        return number if self._is_there(number) else 0

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

    def _generations(self) -> list[int]:
        # Not by glob, which treats an unreadable directory as an empty one.
        with usable("be listed"):
            names = [path.name for path in (self.path / layout.CONTROL).iterdir()]
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _is_there(self, generation: int) -> bool:
        with usable("be read"):
            return self._control_path(generation).exists()

    def _control_path(self, generation: int) -> Path:
        return self.path / layout.CONTROL / f"{generation:08d}.json"

    def _read_control(self, generation: int) -> Control:
        path = self._control_path(generation)
        return self._decoded(path, file_bytes(path))

    def _decoded(self, path: Path, data: bytes) -> Control:
        try:
            return control_codec.decode(json.loads(sealed.unseal(data)), self.masked_users, self.erasures)
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "restore it from a copy: it says what should be served"
            ) from error
