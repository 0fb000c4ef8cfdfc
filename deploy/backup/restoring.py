"""Restores a backup on an empty machine: `springtide restore FROM`.

1. Nothing is there that would be lost or mixed with it, and the salt is the one of its users.
2. Every file is built aside, under `restoring/`, and each piece compared with its digest.
3. Its histories open and are as far as the backup says; its newest version has all that makes it up.
4. Numbers of versions that the lost system may have used stay taken, so that a serving host that
   still has some never mixes them with new ones. Control says in a generation of its own who restored what.
5. The files take their places: histories first, control last. A crash before leaves nothing but `restoring/`; one in
   between a directory that the next restore refuses, and that is to be emptied.

What goes on from there is an ordinary start after a crash: stream and trainer
read on in Kafka from where their parts of the backup were, serving begins anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deploy.backup.documents import Backup, KeptFile
from deploy.backup.objects import Objects
from deploy.backup.places import BackupPlace, usable
from state import layout
from state.config.settings import Settings
from state.disk import clean_mark
from state.disk import files as durable
from state.disk.clean_mark import CleanMark
from state.disk.lock import DirectoryLock
from state.errors import BackupError, MissingSalt, SaltMismatch
from state.events.identity import load_salt
from state.history.store import HistoryStore
from state.process import killpoints
from state.registry import control as transitions
from state.registry.registry import Registry

RESTORING = "restoring"
SALT = "salt"
MOST_VERSIONS_PER_S, MOST_BETWEEN = 100, 10_000
_MAY_BE_THERE = {layout.LOCK, layout.SALT, layout.KAFKA, layout.LOGS, layout.REPLAY, layout.REGISTRY, RESTORING}
_MAY_BE_IN_REGISTRY = {layout.TRAINER_LOCK, layout.COMPACTOR_LOCK, RESTORING}


class Restored(NamedTuple):
    """What was restored.

    Attributes:
        backup: Of which backup.
        users: How many users have a history, over all shards.
        positions: By shard the next offset of each source.
        generation: The control generation that says so.
        first_number: The least number that the next version may have.
    """

    backup: Backup
    users: int
    positions: dict[str, dict[str, int]]
    generation: int
    first_number: int


def restore(
    settings: Settings, place: BackupPlace, backup: Backup, actor: str, now_ms: int, said: Callable[[int], None]
) -> Restored:
    """Puts a backup in place; durable when this returns.

    Args:
        settings: Where to.
        place: Where it lies.
        backup: Which one.
        actor: Who is named in the history.
        now_ms: Wall clock.
        said: Told how many bytes were written, again and again.

    Raises:
        BackupError: Something is there already, or the disk refused.
        DamagedBackup: An object is missing or fails its digest; the message names it.
        MissingSalt, SaltMismatch: The salt of its users is not there, or is another.
        LockHeld: The system runs.
    """
    state, registry_dir = settings.state_dir, settings.registry_dir
    with DirectoryLock(state), DirectoryLock(registry_dir, layout.TRAINER_LOCK):
        # 1.
        require_empty(settings)
        require_salt(settings, backup)
        with _built_aside(settings) as aside:
            # 2.
            _write_all(settings, place, backup, said)
            killpoints.reach("restore.written")
            # 3.
            users, positions = _finish_stores(settings, backup)
            # 4.
            generation, first = _finish_registry(registry_dir / RESTORING, backup, actor, now_ms)
            # 5.
            _take(aside)
    return Restored(backup, users, positions, generation, first)


def require_empty(settings: Settings) -> None:
    """Refuses where state is there that would be lost, or mixed with another.

    Raises:
        BackupError: It names what is there.
    """
    state, registry = settings.state_dir, settings.registry_dir
    there = [
        one for one in _entries(state) if one.name not in _MAY_BE_THERE and one not in (registry, settings.salt_path)
    ]
    there += [one for one in _entries(registry) if one.name not in _MAY_BE_IN_REGISTRY]
    if settings.registry_dir != state / layout.REGISTRY:
        there += _entries(state / layout.REGISTRY)
    there = [one for one in there if _has_files(one)]
    if there:
        raise BackupError(
            f"{there[0]} is there: a backup is restored on an empty machine",
            "move it away, or choose another paths.state; the salt and Kafka's data may stay",
        )


def require_salt(settings: Settings, backup: Backup) -> None:
    """Refuses another salt than that of the backup's users, and none where the backup has none.

    Raises:
        MissingSalt: There is none.
        SaltMismatch: It is another.
        SettingsError: It cannot be read.
    """
    path = settings.salt_path
    if path.exists():
        mine = load_salt(path, create=False)
        if mine.fingerprint != backup.salt:
            raise SaltMismatch.between(f"backup {backup.id}", backup.salt, mine.fingerprint)
    elif not backup.with_salt:
        raise MissingSalt(
            f"backup {backup.id} was made without the salt {backup.salt}, and there is none at {path}",
            "put its copy there, mode 0600, or name it with --paths.salt_file FILE",
        )


@contextmanager
def _built_aside(settings: Settings) -> Iterator[list[Path]]:
    """The empty directories to build in; what is left in them goes where the block fails."""
    aside = [settings.state_dir / RESTORING, settings.registry_dir / RESTORING]
    with usable(str(settings.state_dir), "be written"):
        for folder in aside:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        try:
            yield aside
        finally:
            for folder in aside:
                shutil.rmtree(folder, ignore_errors=True)


def _write_all(settings: Settings, place: BackupPlace, backup: Backup, said: Callable[[int], None]) -> None:
    objects = Objects(place, listed=False)
    for file in backup.files:
        if file.path != SALT:
            _write(_place_of(settings, file), objects.read(file), said)
        elif not settings.salt_path.exists():
            settings.salt_path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(settings.salt_path, b"".join(objects.read(file)))
            durable.sync_directory(settings.salt_path.parent)


def _place_of(settings: Settings, file: KeptFile) -> Path:
    """Where a file is built."""
    first, _, rest = file.path.partition("/")
    if first == layout.REGISTRY:
        return settings.registry_dir / RESTORING / rest
    return settings.state_dir / RESTORING / first / rest


def _write(path: Path, pieces: Iterator[bytes], said: Callable[[int], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb", buffering=0, opener=partial(os.open, mode=0o600)) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
            said(len(piece))


def _finish_stores(settings: Settings, backup: Backup) -> tuple[int, dict[str, dict[str, int]]]:
    """Marks the stores as closed in order, and looks whether they are as far as the backup says."""
    users, positions = 0, dict[str, dict[str, int]]()
    for path in layout.streams(settings.state_dir / RESTORING):
        clean_mark.write(path / layout.MARK, CleanMark(True, clean_mark.boot_id()))
        store = HistoryStore(path, settings.features.history, settings.stream.map_gb << 30, readonly=True)
        try:
            users += store.users()
            found = {str(source): after for source, after in store.positions().items()}
        finally:
            store.close()
        least = backup.positions.get(path.parent.name, {})
        if any(found.get(source, 0) < after for source, after in least.items()):
            raise BackupError(f"{path} is behind what backup {backup.id} says", "restore another one, and report this")
        positions[path.parent.name] = found
        (path / "lock.mdb").unlink(missing_ok=True)
    return users, positions


def _finish_registry(aside: Path, backup: Backup, actor: str, now_ms: int) -> tuple[int, int]:
    """Looks whether the newest version is whole, keeps numbers taken, and writes the generation that says who restored."""
    registry = Registry(aside)
    if backup.version is not None:
        registry.chain(backup.version)
    elapsed_s = max(now_ms - backup.created_at_ms, 0) // 1000
    last = registry.next_number() - 1 + MOST_BETWEEN + MOST_VERSIONS_PER_S * elapsed_s
    durable.write(aside / layout.RECENT / f"{last:012d}.last", b"")
    reason = f"restored backup {backup.id}"
    made = registry.change(lambda now: transitions.restored(now, actor=actor, reason=reason, now_ms=now_ms))
    shutil.rmtree(aside / layout.TEMPORARY)
    return made.generation, last + 1


def _take(aside: list[Path]) -> None:
    """Moves what was built aside to where it belongs, and removes the rest."""
    for folder in aside:
        durable.sync_tree(folder)
    for folder in aside:
        # Control is what makes a registry: the trainer writes a first one where there is none.
        for one in sorted(folder.iterdir(), key=lambda one: (one.name == layout.CONTROL, one.name)):
            final = folder.parent / one.name
            if final.is_dir():
                # Of empty directories alone, as was seen before.
                shutil.rmtree(final)
            one.rename(final)
            killpoints.reach("restore.taken")
        durable.sync_directory(folder.parent)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_files(path: Path) -> bool:
    return not path.is_dir() or any(not one.is_dir() for one in path.rglob("*"))
