"""What a restore refuses before it writes anything: state that is there already, and the salt of other users."""

from __future__ import annotations

from pathlib import Path

from deploy.backup.documents import Backup
from state import layout
from state.config.settings import Settings
from state.errors import BackupError, MissingSalt, SaltMismatch
from state.events.identity import load_salt

RESTORING = "restoring"
"""The directory in which a restore builds; what is left in it is worthless."""

_MAY_BE_THERE = {layout.LOCK, layout.SALT, layout.KAFKA, layout.LOGS, layout.REPLAY, layout.REGISTRY, RESTORING}
_MAY_BE_IN_REGISTRY = {layout.TRAINER_LOCK, layout.COMPACTOR_LOCK, RESTORING}


def require_restorable(settings: Settings, backup: Backup) -> None:
    """Refuses where a backup cannot be restored; writes nothing.

    Raises:
        BackupError: State is there already; the message names it.
        MissingSalt, SaltMismatch, SettingsError: See `_require_salt`.
    """
    _require_empty(settings)
    _require_salt(settings, backup)


def _require_empty(settings: Settings) -> None:
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


def _require_salt(settings: Settings, backup: Backup) -> None:
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


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _has_files(path: Path) -> bool:
    return not path.is_dir() or any(not one.is_dir() for one in path.rglob("*"))
