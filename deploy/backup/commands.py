"""The commands `springtide backup` and `springtide restore`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from deploy.backup import location, making, restoring
from deploy.backup.location import Backup, Objects
from deploy.formats import age, iso
from deploy.operate.control import Say
from deploy.operate.versions import table
from state.config.settings import Settings
from state.errors import DamagedBackup
from state.features.erased import Erased
from state.features.spec import FeatureSpec
from state.file_store import FileStore, open_store
from state.process.environment import actor
from state.process.log_lines import ProgressLine

LINE_EVERY_S = 10.0
SALT_IN = "the salt is in this backup: anyone who reads it can link pseudonyms to users; restrict access to it"
SALT_OUT = "the salt is not in it: keep a copy of {path} elsewhere, without it nothing can be restored"


def backup(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Makes a backup, lists those of a location, or verifies one."""
    store = open_store(args.to)
    if args.list:
        show(store, args, now_ms, say)
        return
    progress = _Amount("read")
    if args.check:
        checked = location.read_backup(store, args.at)
        location.verify(store, checked, progress)
        _print(args, {"checked": summary(checked)}, f"backup {checked.id} is whole: {size(checked.bytes)} read", say)
        return
    scope = making.Scope(with_salt=args.with_salt, newest_only=args.versions == "newest")
    new_backup = making.make(settings, store, scope, now_ms, progress)
    lines = [
        f"backup {new_backup.id} at {store.name}: {described(new_backup)}; {size(new_backup.bytes)}, of which {size(new_backup.sent_bytes)} were "
        f"sent, in {progress.took_s:.1f} s",
        SALT_IN if new_backup.with_salt else SALT_OUT.format(path=settings.salt_path),
        *(
            ["training cannot continue from any version in it: see `springtide versions`"]
            if new_backup.versions and new_backup.version is None
            else []
        ),
        *(f"left out, it is damaged: {part}" for part in new_backup.left_out),
    ]
    result: dict[str, Any] = {"made": summary(new_backup) | {"seconds": round(progress.took_s, 3)}}
    if args.keep:
        pruned = location.prune(store, args.keep)
        result["pruned"] = pruned._asdict()
        lines.append(f"removed {pruned.backups} older backups and {pruned.objects:,} objects that none needs any more")
    _print(args, result, "\n".join(lines), say)


def restore(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Restores a backup."""
    store, progress = open_store(args.source), _Amount("written")
    backup = location.read_backup(store, args.at)
    spec = FeatureSpec.from_settings(settings).digest
    by = restoring.By(actor(), now_ms)
    erasures, unknown = _later_erasures(store, backup, args.erasures_from)
    restored = restoring.restore(settings, store, backup, by, progress, restoring.Since(erasures, args.kafka_lost))
    lines = [
        f"restored backup {backup.id} of {iso(backup.created_at_ms)}, {age((now_ms - backup.created_at_ms) / 1000)} old: "
        f"{described(backup)}, histories of {restored.users:,} users; {size(backup.bytes)} in {progress.took_s:.1f} s",
        f"control generation {restored.generation} records it; versions continue from {restored.first_number}",
        *([f"{restored.erasures} erasures that were made after it are applied again"] if restored.erasures else []),
        *unknown,
    ]
    if backup.spec and backup.spec != spec:
        lines.append(
            f"its version is of feature spec {backup.spec[:12]}, the settings here make {spec[:12]}: use its settings, or upgrade"
        )
    if args.kafka_lost:
        lines.append(
            f"the trainer continues from version {restored.version} in another training log, from its beginning"
        )
    lines.append(
        "start it with `springtide up`: what Kafka has had since then is read again. The old one must not run any more."
    )
    result = {
        "restored": summary(backup)
        | {
            "users": restored.users,
            "positions": restored.positions,
            "generation": restored.generation,
            "first_number": restored.first_number,
            "erasures_again": restored.erasures,
            "goes_on_from": restored.version,
            "fits": not backup.spec or backup.spec == spec,
        }
    }
    _print(args, result, "\n".join(lines), say)


def _later_erasures(store: FileStore, backup: Backup, registry: Path | None) -> tuple[Erased, list[str]]:
    erasures, messages = [Erased.NOBODY], []
    if registry is not None:
        erasures.append(restoring.erasures_in(registry))
    try:
        newest = location.read_backup(store)
        if newest.id != backup.id:
            with tempfile.TemporaryDirectory() as folder:
                erasures.append(restoring.erasures_known_to(newest, Objects(store, listed=False), Path(folder)))
    except DamagedBackup as error:
        messages.append(f"erasures that later backups know may be missing, repeat them: {error.what}")
    return max(erasures, key=lambda erased: erased.last), messages


def show(store: FileStore, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lists the backups of a location, oldest first."""
    backups = [location.read_backup(store, entry) for entry in location.ids(store)]
    head = ["backup", "age", "version", "versions", "size", "sent", "salt"]
    rows = [
        [
            entry.id,
            age((now_ms - entry.created_at_ms) / 1000),
            "none" if entry.version is None else str(entry.version),
            str(entry.versions),
            size(entry.bytes),
            size(entry.sent_bytes),
            "in it" if entry.with_salt else entry.salt,
        ]
        for entry in backups
    ]
    text = table([head, *rows]) if rows else f"{store.name} has no backup"
    _print(args, {"backups": [summary(entry) for entry in backups]}, text, say)


def _print(args: argparse.Namespace, document: dict[str, Any], text: str, say: Callable[[str], None]) -> None:
    say(json.dumps(document, indent=2) if args.output == "json" else text)


def summary(backup: Backup) -> dict[str, Any]:
    """A backup as JSON values, without its files."""
    fields: dict[str, Any] = msgspec.to_builtins(backup)
    del fields["files"]
    return {**fields, "bytes": backup.bytes, "with_salt": backup.with_salt}


def described(backup: Backup) -> str:
    """The content of a backup, in words."""
    newest = "no version yet" if backup.version is None else f"version {backup.version}"
    return f"{newest} of {backup.versions}, control generation {backup.generation}"


def size(bytes: int) -> str:
    """A number of bytes for people.

    >>> size(1_234_567), size(4_200_000_000)
    ('1.2 MB', '4.20 GB')
    """
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"


class _Amount:
    """Shows progress in bytes from time to time; `verb` names the operation."""

    def __init__(self, verb: str) -> None:
        self._verb, self._bytes, self._begun_s = verb, 0, time.monotonic()
        self._line = ProgressLine(sys.stderr, LINE_EVERY_S)

    @property
    def took_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun_s

    def __call__(self, count: int) -> None:
        """Adds to the number of bytes."""
        self._bytes += count
        self._line.show(lambda: f"{size(self._bytes)} {self._verb} after {self.took_s:.0f} s")
