"""Garbage collection of a registry by age. The compactor calls it under its lock.

| files | deleted when old and |
|---|---|
| `versions/`, `merged/`, `bases/`: `*.bad` | a version with a higher number is kept, so that no number is reused |
| `programs/`, `specs/` (shared registry: only `programs/`) | no kept version names it, and it is not the newest one |
| `outcomes/` (shared registry: never) | neither a kept version nor control is of its epoch |
| `tmp/` | its writer is dead, or on another machine |

The newest program or spec is kept because the trainer may be about to use it. Control and `masks/` are never deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.registry.directory import usable
from state.registry.registry import Registry

DAY_MS = 86_400_000
TEMPORARY_MS = DAY_MS


def collect(registry: Registry, keep_ms: int, now_ms: int, in_use: Collection[str] = ()) -> list[str]:
    """Removes garbage older than `keep_ms`; returns the paths, relative to the registry.

    Specs whose digests are `in_use` stay. Files in `tmp/` are kept for a day. The caller holds the compactor's lock.

    Raises:
        CorruptVersion: A manifest or control is damaged: nothing was removed.
        UnusableRegistry: The disk refused.
    """
    with usable("delete unused files"):
        removed = [*_garbage(registry, keep_ms, now_ms, frozenset(in_use)), *_left_by_writers(registry, now_ms)]
        for path in removed:
            # Uses one rename, as for versions, so that a crash leaves no half-deleted folder.
            grave = registry.directory.temporary(f"garbage-{path.name.partition('~')[0]}")
            path.rename(grave)
            shutil.rmtree(grave) if grave.is_dir() else grave.unlink()
    return [path.relative_to(registry.path).as_posix() for path in removed]


def _garbage(registry: Registry, keep_ms: int, now_ms: int, in_use: frozenset[str]) -> list[Path]:
    manifests = [registry.manifest(number) for number in registry.versions()]
    control = registry.control()
    newest_version = max((version.version for version in manifests), default=0)
    epochs = {version.epoch for version in manifests} | ({control.epoch} if control else set())
    garbage: list[Path] = []
    for folder in (layout.VERSIONS, layout.MERGED, layout.BASES):
        if not (registry.path / folder).is_dir():
            continue
        aside = [path for path in _older(registry.path / folder, keep_ms, now_ms) if ".bad" in path.name]
        garbage += [path for path in aside if int(path.name.partition(".")[0].partition("-")[0]) < newest_version]
    # A copy fetches small shared files again if they are missing, so specs and outcomes stay.
    shared = registry.directory.binding is not None
    named_by = {
        layout.PROGRAMS: {version.program for version in manifests},
        layout.SPECS: {version.spec for version in manifests},
    }
    for folder, named in named_by.items():
        if shared and folder == layout.SPECS:
            continue
        every = list((registry.path / folder).iterdir())
        newest = max(every, key=_age_of, default=None)
        old = [path for path in _older(registry.path / folder, keep_ms, now_ms) if path != newest]
        garbage += [path for path in old if path.name.removesuffix(".tflite") not in named | in_use]
    if shared:
        return garbage
    garbage += [
        path
        for path in _older(registry.path / layout.OUTCOMES, keep_ms, now_ms)
        if path.name.split("-")[0].isdecimal() and int(path.name.split("-")[0]) not in epochs
    ]
    return garbage


def _left_by_writers(registry: Registry, now_ms: int) -> list[Path]:
    """Files in `tmp/` of writers that are gone: dead ones of this machine, and others after a day."""
    abandoned = []
    for path in (registry.path / layout.TEMPORARY).iterdir():
        owner = path.name.rpartition("~")[2]
        foreign = owner.count("@") != 2 or not owner.startswith(f"{durable.HOST}@")
        if (foreign and _age_of(path) < now_ms - TEMPORARY_MS) or (not foreign and durable.is_dead(owner)):
            abandoned.append(path)
    return abandoned


def _older(folder: Path, keep_ms: int, now_ms: int) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _age_of(path) < now_ms - keep_ms)


def _age_of(path: Path) -> float:
    """Modification time, ms."""
    return path.stat().st_mtime * 1000
