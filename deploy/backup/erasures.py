"""Erasures that were decided after a backup: they count in what it brings back, as far as somebody still knows of them.

Who was erased meanwhile is in the histories and rows of an older backup. The
newest backup at the same place knows later erasures, and so does a registry
that was not lost. They are given again, in order, each in a generation of its
own; erased copies then go as after any erasure.
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
    """The erasures that a backup knows.

    Args:
        backup: Any at the place.
        objects: Of the place.
        folder: Where its control is written; a directory that does not exist.

    Raises:
        DamagedBackup: An object of it is missing or fails its digest.
        CorruptVersion: Control in it is damaged.
    """
    for file in backup.files:
        if file.path.startswith(CONTROL_FILES):
            path = folder / file.path.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(objects.read(file)))
    return of(Controls(folder))


def in_registry(path: Path) -> Erased:
    """The erasures that a registry knows which was not lost.

    Raises:
        BackupError: It is none.
        CorruptVersion: Its control is damaged.
    """
    if not (path / layout.CONTROL).is_dir():
        raise BackupError(f"{path} is no registry", "name a directory with control/ in it")
    return of(Controls(path))


def of(controls: Controls) -> Erased:
    """The erasures that control knows.

    Raises:
        CorruptVersion: It is damaged.
    """
    control = controls.control()
    return Erased.NOBODY if control is None else control.erased


def missing(here: Erased, known: Erased) -> tuple[Erasure, ...]:
    """Those of `known` that are to be given again, in order.

    Raises:
        BackupError: The two are not of one system.
    """
    # Given again once, an erasure has another generation.
    mine, theirs = ([(one.users, one.until) for one in erased] for erased in (here, known))
    shared = min(len(mine), len(theirs))
    if mine[:shared] != theirs[:shared]:
        raise BackupError(
            "the erasures known elsewhere are not those of this backup and later ones",
            "name the registry of this system",
        )
    return known.entries[shared:]


def give_again(registry: Registry, erasures: tuple[Erasure, ...], backup_id: str, actor: str, now_ms: int) -> None:
    """Makes each a generation of control.

    Raises:
        RegistryError: The registry refused.
    """
    for one in erasures:
        reason = f"erasure {one.id}, of after backup {backup_id}, counts again"

        def decided(control: Control, one: Erasure = one, reason: str = reason) -> Control:
            return erasing.erase(control, one.users, one.until, actor=actor, reason=reason, now_ms=now_ms)

        registry.change(decided)
