"""Repeats, after a restore, the erasures that happened after the backup, as far as they are still known.

The histories and rows of an older backup still hold users who were erased later. The newest backup in the same
object store knows the later erasures, and so does a registry that was not lost. They are repeated in order, each
in its own control generation. The erased copies then disappear as after any erasure.
"""

from __future__ import annotations

from pathlib import Path

from deploy.backup.documents import Backup
from deploy.backup.objects import Objects
from state import layout
from state.errors import BackupError
from state.features.erased import Erased, Erasure
from state.registry import erasing
from state.registry.control import Control
from state.registry.controls import Controls
from state.registry.registry import Registry

CONTROL_FILES = tuple(f"{layout.REGISTRY}/{folder}/" for folder in (layout.CONTROL, layout.MASKS))


def known_to(backup: Backup, objects: Objects, folder: Path) -> Erased:
    """Returns the erasures recorded in a backup.

    Args:
        backup: Any backup in the object store.
        objects: The objects of that store.
        folder: Where to write the backup's control; a directory that does not exist.

    Raises:
        DamagedBackup: An object of the backup is missing or fails its digest.
        CorruptVersion: Control in the backup is damaged.
    """
    for file in backup.files:
        if file.path.startswith(CONTROL_FILES):
            path = folder / file.path.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(objects.read(file)))
    return of(Controls(folder))


def in_registry(path: Path) -> Erased:
    """Returns the erasures recorded in a registry that was not lost.

    Raises:
        BackupError: `path` is not a registry.
        CorruptVersion: The registry's control is damaged.
    """
    if not (path / layout.CONTROL).is_dir():
        raise BackupError(f"{path} is no registry", "name a directory with control/ in it")
    return of(Controls(path))


def of(controls: Controls) -> Erased:
    """Returns the erasures recorded in control.

    Raises:
        CorruptVersion: Control is damaged.
    """
    control = controls.control()
    return Erased.NOBODY if control is None else control.erased


def missing(here: Erased, known: Erased) -> tuple[Erasure, ...]:
    """Returns the erasures of `known` that must be repeated, in order.

    Raises:
        BackupError: `here` and `known` belong to different systems.
    """
    # A repeated erasure has another generation, so generations are not compared.
    mine, theirs = ([(one.users, one.until) for one in erased] for erased in (here, known))
    shared = min(len(mine), len(theirs))
    if mine[:shared] != theirs[:shared]:
        raise BackupError(
            "the erasures known elsewhere are not those of this backup and later ones",
            "name the registry of this system",
        )
    return known.entries[shared:]


def give_again(registry: Registry, erasures: tuple[Erasure, ...], backup_id: str, actor: str, now_ms: int) -> None:
    """Repeats each erasure as a new control generation.

    Raises:
        RegistryError: The registry refused the change.
    """
    for one in erasures:
        reason = f"erasure {one.id}, of after backup {backup_id}, counts again"

        def decided(control: Control, one: Erasure = one, reason: str = reason) -> Control:
            return erasing.erase(control, one.users, one.until, actor=actor, reason=reason, now_ms=now_ms)

        registry.change(decided)
