"""The versions in a registry directory that are followed and not kept: how they come, are found, and go.

A version between two durable ones costs no sync and lies in `recent/` for some
seconds, so short that the kernel drops its pages before it writes them. Nobody
goes back to one: the training log makes it again, bit for bit. A durable
version lies in `recent/` too, as what changed since the version before it.

Numbers never come twice, although a power cut may take `recent/` away: after
another start of the machine they go on beyond any that may have been there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from state import layout
from state.disk import files as durable
from state.disk.clean_mark import boot_id
from state.errors import CorruptVersion, UnknownVersion
from state.process import killpoints
from state.registry import manifest
from state.registry.brought_files import MANIFEST
from state.registry.directory import usable
from state.registry.folders import appears
from state.registry.manifest import Manifest
from state.registry.versions import Versions

MOST_BETWEEN = 10_000
"""Fewer versions lie between two durable ones."""


class Recents(Versions):
    """The versions of both lifetimes of one registry directory."""

    def either(self, version: int) -> Manifest:
        """The manifest of a version, the recent one where there are both.

        Raises:
            UnknownVersion: It is neither here nor kept.
            CorruptVersion: Its manifest fails its digest.
        """
        try:
            return self.manifest(version, "recent")
        except (UnknownVersion, CorruptVersion):
            return self.manifest(version)

    def latest(self, epoch: int | None) -> Manifest | None:
        """The newest version of `epoch` of either lifetime, or of all epochs; None while there is none.

        Recent ones that go meanwhile, or that a power cut has damaged, are passed over.

        Raises:
            CorruptVersion: The manifest of the newest durable one fails its digest.
        """
        newest = self.newest(epoch)
        for version in reversed(self.recents()):
            if newest is not None and version <= newest:
                break
            try:
                found = self.manifest(version, "recent")
            except (UnknownVersion, CorruptVersion):
                continue
            if epoch in (None, found.epoch):
                return found
        return None if newest is None else self.manifest(newest)

    def next_after(self, version: int) -> int | None:
        """The next version of either lifetime with a higher number, of whatever epoch; cheap enough to poll."""
        with usable("be read"):
            if (self.folder("recent", version + 1) / MANIFEST).exists():
                return version + 1
        return min((found for found in (*self.recents(), *self.versions()) if found > version), default=None)

    def add_recent(
        self, made: Manifest, files: Mapping[str, bytes], last_check: Callable[[], None] = lambda: None
    ) -> bool:
        """Adds a version to `recent/`; complete when this returns, and never synced. False where the number is taken.

        Raises:
            UnusableRegistry: The disk refused; nothing of it is left.
        """
        final, temporary = self.folder_of(made), self.temporary(f"recent-{made.version}")
        with usable(f"take version {made.version}"):
            temporary.mkdir()
            try:
                for name, data in files.items():
                    (temporary / name).write_bytes(data)
                (temporary / MANIFEST).write_bytes(manifest.encode(made))
                killpoints.reach("recent.written")
                last_check()
                if not appears(temporary, final):
                    return False
                killpoints.reach("recent.renamed")
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self._remember(final, made)
        return True

    def sweep_recent(self, boot: str | None = None) -> int:
        """Takes all of `recent/` away; only for the process that holds the trainer's lock, before it publishes.

        1. The highest number that may have been used stays taken: a file of that name and the ending `.last`. It is
           durable where the machine was started again, since `recent/` may have lost names then.
        2. Under which start of the machine numbers are taken from here on is written down.
        3. The versions go.

        Args:
            boot: Which start of the machine this is; by default the kernel's.

        Returns:
            How many went.

        Raises:
            UnusableRegistry: The disk refused.
        """
        boot = boot_id() if boot is None else boot
        folder, mark = self.path / layout.RECENT, self.path / layout.RECENT_BOOT
        with usable("be swept"):
            # 1.
            before = mark.read_text() if mark.exists() else boot
            last = self.next_number() - 1 + (0 if before == boot else MOST_BETWEEN)
            keeper = folder / f"{last:012d}.last"
            left = [path for path in folder.iterdir() if path != keeper]
            if not keeper.exists():
                durable.write(keeper, b"")
                durable.sync_directory(folder)
            killpoints.reach("recent.numbered")
            # 2.
            if before != boot or not mark.exists():
                temporary = self.temporary("recent-boot")
                durable.write(temporary, boot.encode())
                temporary.replace(mark)
                durable.sync_directory(self.path)
            # 3.
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._manifests.clear()
        return sum(path.name.isdecimal() for path in left)
