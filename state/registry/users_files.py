"""The files of users that control names, by digest: those of masks, and erasures, each of which names the one before.

Where the registry is shared they lie in its place before a generation names
them, and are brought from there when one does.
"""

from __future__ import annotations

import os
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.features.erased import Erased, Erasure
from state.features.masked_users import MaskedUsers
from state.process import killpoints
from state.registry.control import Control
from state.registry.directory import Directory, sharing


class UsersFiles(Directory):
    """The users' files of one registry directory. One object per thread."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, layout.MASKS)
        self._users: dict[str, MaskedUsers] = {}
        self._erased: dict[str, Erased] = {"": Erased.NOBODY}

    def keep_users_of(self, control: Control) -> None:
        """Writes the users of its masks and its erasures, each to a file of their own, durably; those known stay.

        Raises:
            OSError: The disk refused.
            UnusableRegistry: The place where the registry is shared did.
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
        """The erasures that the file of this SHA-256 ends, each read once; control generations share them.

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
