"""Recent versions of a registry: short-lived versions that serving follows and that are not durable.

A version between two durable ones is stored in `recent/` for some seconds,
without sync. It is removed before the kernel writes its pages to disk. Nobody
rolls back to one: the training log reproduces it, bit for bit. A durable version
is in `recent/` too, as what changed since the version before it.

Numbers are never reused, although a power failure may destroy `recent/`. After
a reboot of the machine they continue beyond any number that may have been there.
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
"""Upper limit of the number of versions between two durable ones."""


class Recents(Versions):
    """The durable and recent versions of one registry directory."""

    def either(self, version: int) -> Manifest:
        """The manifest of a version; the recent one if both exist.

        Raises:
            UnknownVersion: The version is neither recent nor durable.
            CorruptVersion: Its manifest fails its digest.
        """
        try:
            return self.manifest(version, "recent")
        except (UnknownVersion, CorruptVersion):
            return self.manifest(version)

    def latest(self, epoch: int | None) -> Manifest | None:
        """The newest version of `epoch`, or of all epochs, durable or recent; None if there is none.

        Skips recent versions that are removed meanwhile or that a power failure damaged.

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
        """The next version, durable or recent, with a higher number, of any epoch. Cheap enough to poll."""
        with usable("be read"):
            if (self.folder("recent", version + 1) / MANIFEST).exists():
                return version + 1
        return min((found for found in (*self.recents(), *self.versions()) if found > version), default=None)

    def add_recent(
        self, made: Manifest, files: Mapping[str, bytes], last_check: Callable[[], None] = lambda: None
    ) -> bool:
        """Adds a version to `recent/`, complete when this returns and never synced. False if the number is taken.

        Raises:
            UnusableRegistry: The disk refused; nothing of the version is left.
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
        """Removes everything in `recent/`. Only the process with the trainer's lock calls it, before it publishes.

        1. The highest number that may have been used stays taken, by a file with that name and the suffix `.last`. The
           file is durable, since `recent/` may have lost names when the machine was restarted.
        2. The boot id of the machine, under which numbers are taken from here on, is stored.
        3. The versions are removed.

        Args:
            boot: Boot id of the machine; by default the kernel's.

        Returns:
            How many versions were removed.

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
