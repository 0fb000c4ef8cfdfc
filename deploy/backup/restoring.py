"""Restores a backup on an empty machine: `springtide restore FROM`.

1. Check that the restore would lose or mix no existing state, and that the salt is the one of the backup's users.
2. Build every file under `restoring/`, and compare each piece with its digest.
3. Check that the histories open and reach the backup's positions, and that the newest version is complete. Serving
   gets a copy of the histories, so that answers stay the same if Kafka cannot replay the clicks.
4. Reserve the version numbers that the lost system may have used, so that a serving host that still has such versions
   never mixes them with new ones. Apply known erasures made after the backup again. A new control generation records
   who restored what.
5. Write the salt, and move the files to their final paths: histories first, control last. A crash before this step
   leaves only `restoring/`. A crash during it leaves a directory that the next restore refuses; empty it first.

Afterwards the system starts as after a crash: stream, trainer and serving continue in Kafka from the positions in the
backup.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from deploy.backup import serving_start
from deploy.backup.location import Backup, KeptFile, Objects, usable
from state import layout
from state.config.settings import Settings
from state.disk import files as durable
from state.disk.files import CleanMark
from state.disk.lock import DirectoryLock
from state.errors import BackupError, MissingSalt, SaltMismatch
from state.events.identity import load_salt
from state.features.erased import Erased, Erasure
from state.file_store import FileStore
from state.history.appends import Appends
from state.history.rewinding import branch_extra
from state.history.store import HistoryStore
from state.positions import Source
from state.process import killpoints
from state.registry import control as transitions
from state.registry.control import Control
from state.registry.controls import Controls
from state.registry.log_line import WHOLE
from state.registry.manifest import sees
from state.registry.registry import MOST_BETWEEN, Registry

RESTORING = "restoring"
"""The directory in which a restore builds its files; leftovers in it have no use."""

_MAY_BE_THERE = {layout.LOCK, layout.SALT, layout.KAFKA, layout.LOGS, layout.REPLAY, layout.REGISTRY, RESTORING}
_MAY_BE_IN_REGISTRY = {layout.TRAINER_LOCK, layout.TAKEOVER_LOCK, layout.COMPACTOR_LOCK, RESTORING}
SALT = "salt"
MOST_VERSIONS_PER_S = 100
CONTROL_FILES = tuple(f"{layout.REGISTRY}/{folder}/" for folder in (layout.CONTROL, layout.MASKS))


def _require_restorable(settings: Settings, backup: Backup) -> None:
    """Refuses a restore that would lose or mix state, or whose salt is missing or differs."""
    state, registry, salt = settings.state_dir, settings.registry_dir, settings.salt_path
    existing = [path for path in _entries(state) if path.name not in _MAY_BE_THERE and path not in (registry, salt)]
    existing += [path for path in _entries(registry) if path.name not in _MAY_BE_IN_REGISTRY]
    if registry != state / layout.REGISTRY:
        existing += _entries(state / layout.REGISTRY)
    if existing := [path for path in existing if _has_files(path)]:
        raise BackupError(
            f"{existing[0]} exists: a backup is restored on an empty machine",
            "move it away, or choose another paths.state; the salt and Kafka's data may stay",
        )
    if salt.exists():
        local_salt = load_salt(salt, create=False)
        if local_salt.fingerprint != backup.salt:
            raise SaltMismatch.between(f"backup {backup.id}", backup.salt, local_salt.fingerprint)
    elif not backup.with_salt:
        raise MissingSalt(
            f"backup {backup.id} was made without the salt {backup.salt}, and there is none at {salt}",
            "put its copy there, mode 0600, or name it with --paths.salt_file FILE",
        )


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_files(path: Path) -> bool:
    return not path.is_dir() or any(not file.is_dir() for file in path.rglob("*"))


class By(NamedTuple):
    """Who restores, and when by the wall clock."""

    actor: str
    now_ms: int


class Since(NamedTuple):
    """What happened after a backup.

    Attributes:
        erased: Erasures that are still known elsewhere; those that the backup lacks are applied again.
        kafka_lost: Whether the topics are lost too, so that the trainer continues in another log.
    """

    erased: Erased = Erased.NOBODY
    kafka_lost: bool = False


class Restored(NamedTuple):
    """The result of a restore.

    Attributes:
        users: How many users have a history, over all shards.
        positions: By shard the next offset of each source.
        generation: The control generation that records the restore.
        first_number: The least number that the next version may have.
        erasures: How many erasures made after the backup were applied again.
    """

    users: int
    positions: dict[str, dict[str, int]]
    generation: int
    first_number: int
    erasures: int
    version: int | None


def restore(
    settings: Settings, store: FileStore, backup: Backup, by: By, progress: Callable[[int], None], since: Since
) -> Restored:
    """Restores a backup; durable when this returns.

    Args:
        settings: Settings of the new system.
        store: Location of the backup.
        backup: The backup.
        by: Who restores, and when.
        progress: Called repeatedly with the number of bytes written.
        since: What happened after the backup.

    Raises:
        BackupError: State exists already, the disk cannot be written, or the erasures are of another system.
        DamagedBackup: An object is missing or fails its digest; the message names it.
        MissingSalt, SaltMismatch: The salt of its users is missing, or differs.
        LockHeld: The system runs.
    """
    state, registry_dir, kafka_lost = settings.state_dir, settings.registry_dir, since.kafka_lost
    # 1. Before taking the locks, because their files would remain after a refusal.
    _require_restorable(settings, backup)
    with DirectoryLock(state), DirectoryLock(registry_dir, layout.TRAINER_LOCK):
        _require_restorable(settings, backup)
        with _built_aside(settings) as aside:
            # 2.
            salt = _write_all(settings, store, backup, progress)
            killpoints.reach("restore.written")
            # 3.
            users, positions = _finish_stores(settings, backup, kafka_lost)
            _begin_serving(settings, backup, kafka_lost)
            registry = Registry(registry_dir / RESTORING)
            if backup.version is not None:
                registry.chain(backup.version)
            # 4.
            first = _reserve_numbers(registry, backup, by.now_ms)
            repeated = _missing(_erasures_of(registry.generations), since.erased)
            _repeat(registry, repeated, backup.id, by.actor, by.now_ms)
            version, generation = _record(registry, backup, positions, by, kafka_lost)
            shutil.rmtree(registry.path / layout.TEMPORARY)
            # 5.
            if salt is not None:
                _write_salt(settings.salt_path, salt)
            _move_to_final_paths(aside)
    return Restored(users, positions, generation, first, len(repeated), version)


@contextmanager
def _built_aside(settings: Settings) -> Iterator[list[Path]]:
    """The empty directories to build in; their content is removed at the end."""
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


def _write_all(settings: Settings, store: FileStore, backup: Backup, progress: Callable[[int], None]) -> bytes | None:
    """Writes the backup's files aside; returns its salt if the machine needs it."""
    objects, salt = Objects(store, listed=False), None
    for file in backup.files:
        if file.path != SALT:
            _write(_path_of(settings, file), objects.read(file), progress)
        elif not settings.salt_path.exists():
            salt = b"".join(objects.read(file))
    return salt


def _write_salt(path: Path, salt: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, salt)
    durable.sync_directory(path.parent)


def _path_of(settings: Settings, file: KeptFile) -> Path:
    first, _, inner = file.path.partition("/")
    if first == layout.REGISTRY:
        return settings.registry_dir / RESTORING / inner
    return settings.state_dir / RESTORING / first / inner


def _write(path: Path, pieces: Iterator[bytes], progress: Callable[[int], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb", buffering=0, opener=partial(os.open, mode=0o600)) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
            progress(len(piece))


def _finish_stores(settings: Settings, backup: Backup, kafka_lost: bool) -> tuple[int, dict[str, dict[str, int]]]:
    """Marks the stores as closed cleanly, and checks that they reach the backup's positions."""
    users, positions = 0, dict[str, dict[str, int]]()
    for path in layout.streams(settings.state_dir / RESTORING):
        durable.write_clean_mark(path / layout.MARK, CleanMark(True, durable.boot_id()))
        if kafka_lost:
            # The branch is of a log that no longer exists.
            writing = HistoryStore(path, settings.features.history)
            writing.commit(Appends.none(), (), branch_extra(WHOLE))
            writing.close()
        store = HistoryStore(path, settings.features.history, readonly=True)
        try:
            users += store.users()
            positions_reached = {str(source): after for source, after in store.positions().items()}
        finally:
            store.close()
        least = backup.positions.get(path.parent.name, {})
        if any(positions_reached.get(source, 0) < after for source, after in least.items()):
            raise BackupError(f"{path} is behind what backup {backup.id} says", "restore another one, and report this")
        positions[path.parent.name] = positions_reached
        (path / "lock.mdb").unlink(missing_ok=True)
    return users, positions


def _begin_serving(settings: Settings, backup: Backup, kafka_lost: bool) -> None:
    """Gives serving a copy of the histories if the backed-up machine served, or if nothing else has the clicks."""
    aside = settings.state_dir / RESTORING
    streams, serving = layout.streams(aside), aside / layout.SERVING
    # Histories of several shards of an earlier release are merged into one store only at the next start.
    if len(streams) == 1 and (kafka_lost or (serving / serving_start.NOTES).exists()):
        serving_start.begin(streams[0], serving, settings.features.history, backup.created_at_ms)
    else:
        shutil.rmtree(serving, ignore_errors=True)


def _reserve_numbers(registry: Registry, backup: Backup, now_ms: int) -> int:
    """Reserves the version numbers that the lost system may have used; returns the first free one."""
    elapsed_s = max(now_ms - backup.created_at_ms, 0) // 1000
    last = registry.next_number() - 1 + MOST_BETWEEN + MOST_VERSIONS_PER_S * elapsed_s
    registry.reserve_numbers(last)
    return last + 1


def _record(
    registry: Registry, backup: Backup, positions: Mapping[str, Mapping[str, int]], by: By, kafka_lost: bool
) -> tuple[int | None, int]:
    """Writes the generation that records the restore; returns the version to continue from, and the generation's number."""
    who: Any = {"actor": by.actor, "reason": f"restored backup {backup.id}", "now_ms": by.now_ms}
    if not kafka_lost:
        return backup.version, registry.change(lambda now: transitions.restored(now, **who)).generation
    next_offsets = {Source.parse(source): after for shard in positions.values() for source, after in shard.items()}
    version = _not_ahead(registry, backup, next_offsets)
    marks = {} if version is None else registry.manifest(version).marks
    lost = sum(max(0, after - marks.get(source, after)) for source, after in next_offsets.items())
    who["reason"] += "; Kafka's data is lost, the trainer continues in another log"
    control = registry.change(lambda now: transitions.restored_without_log(now, version, lost, **who))
    return version, control.generation


def _not_ahead(registry: Registry, backup: Backup, positions: Mapping[Source, int]) -> int | None:
    """Returns the newest version on the branch that learned no click missing from the histories.

    Such a click cannot be read again.
    """
    if backup.version is None:
        return None
    line = registry.manifest(backup.version).visible
    for number in reversed(registry.versions()):
        if number <= backup.version and sees(line, number):
            marks = registry.manifest(number).marks
            if all(after <= positions.get(source, after) for source, after in marks.items()):
                registry.chain(number)
                return number
    return backup.version


def _move_to_final_paths(aside: list[Path]) -> None:
    for folder in aside:
        durable.sync_tree(folder)
    for folder in aside:
        # Control makes a directory a registry: the trainer creates the first control if it is missing.
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == layout.CONTROL, path.name)):
            final = folder.parent / path.name
            if final.is_dir():
                # Only empty directories exist, as checked before.
                shutil.rmtree(final)
            path.rename(final)
            killpoints.reach("restore.taken")
        durable.sync_directory(folder.parent)


# Erasures made after the backup. The histories and rows of an older backup still hold users who were erased later. The
# newest backup in the same location knows the later erasures, and so does a registry that was not lost. They are
# repeated in order, each in its own control generation. The erased copies then disappear as after any erasure.


def erasures_known_to(backup: Backup, objects: Objects, folder: Path) -> Erased:
    """The erasures that a backup knows; its control is written to `folder`, which must not exist.

    Raises:
        DamagedBackup: An object of the backup is missing or fails its digest.
        CorruptVersion: Control in the backup is damaged.
    """
    for file in backup.files:
        if file.path.startswith(CONTROL_FILES):
            path = folder / file.path.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(objects.read(file)))
    return _erasures_of(Controls(folder))


def erasures_in(path: Path) -> Erased:
    """The erasures recorded in a registry that was not lost.

    Raises:
        BackupError: `path` is not a registry.
        CorruptVersion: The registry's control is damaged.
    """
    if not (path / layout.CONTROL).is_dir():
        raise BackupError(f"{path} is no registry", "name a directory with control/ in it")
    return _erasures_of(Controls(path))


def _erasures_of(controls: Controls) -> Erased:
    """Returns the erasures recorded in control.

    Raises:
        CorruptVersion: Control is damaged.
    """
    control = controls.control()
    return Erased.NOBODY if control is None else control.erased


def _missing(own: Erased, known: Erased) -> tuple[Erasure, ...]:
    """The erasures of `known` that must be repeated, in order; refuses those of another system."""
    # A repeated erasure has another generation, so generations are not compared.
    own_erasures, known_erasures = ([(erasure.users, erasure.until) for erasure in erased] for erased in (own, known))
    shared = min(len(own_erasures), len(known_erasures))
    if own_erasures[:shared] != known_erasures[:shared]:
        raise BackupError(
            "the erasures known elsewhere are not those of this backup and later ones",
            "name the registry of this system",
        )
    return known.entries[shared:]


def _repeat(registry: Registry, erasures: tuple[Erasure, ...], backup_id: str, actor: str, now_ms: int) -> None:
    for erasure in erasures:
        reason = f"erasure {erasure.id}, made after backup {backup_id}, is applied again"

        def decided(control: Control, erasure: Erasure = erasure, reason: str = reason) -> Control:
            return transitions.erase(control, erasure.users, erasure.until, actor=actor, reason=reason, now_ms=now_ms)

        registry.change(decided)
