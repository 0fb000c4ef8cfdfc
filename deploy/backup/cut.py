"""Selects what of a registry goes into a backup: one consistent cut, while trainer, compactor and operator continue.

Versions are immutable directories. They appear and disappear by one rename, and a version is removed only before
the versions that it depends on. If every listed directory still exists once the list is complete, they all existed
at one moment: the cut. Control is read before and after. Files of a later control generation are not in the cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.backup.places import usable
from state import layout
from state.errors import BackupError
from state.registry import manifest
from state.registry.brought_files import MANIFEST
from state.registry.control import Control
from state.registry.directory import file_bytes
from state.registry.labels import named
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

TRIES = 100
VERSIONED = (layout.VERSIONS, layout.MERGED, layout.BASES)
_LEFT_ALONE = (*VERSIONED, layout.RECENT, layout.TEMPORARY, layout.ERASURES)
"""Folders that `list_files` skips. What processes report about their own copies is not part of the state."""


@dataclass(frozen=True)
class RegistryCut:
    """One consistent cut of a registry.

    Attributes:
        control: The newest control generation.
        parts: The directories of versions, relative to the registry, with their manifests.
        files: All other files in the backup: control, masks, outcomes, gaps, programs, specs.
        damaged: Directories of versions whose manifest cannot be read, with the reason.
    """

    control: Control
    parts: Mapping[str, Manifest]
    files: tuple[str, ...]
    damaged: Mapping[str, str]


def cut(registry: Registry, newest_only: bool = False) -> RegistryCut:
    """Takes one consistent cut of `registry`.

    Args:
        registry: The live registry.
        newest_only: Take only the versions that the trainer needs to continue and those that control names.

    Raises:
        BackupError: There is no control yet, or it never stops changing.
        CorruptVersion: Control is damaged.
    """
    for _ in range(TRIES):
        control = registry.control()
        if control is None:
            raise BackupError(f"{registry.path} has no control yet", "start the system once, then repeat it")
        try:
            folders = list_folders(registry.path)
            parts, damaged = _manifests(registry.path, folders, control)
            if newest_only:
                wanted = _needed(parts, control)
                parts = {name: parts[name] for name in parts if name in wanted}
            files = list_files(registry.path, control.generation)
        except FileNotFoundError:
            # The compactor has replaced a version by a merged one.
            continue
        if set(folders) <= set(list_folders(registry.path)) and registry.control() == control:
            return RegistryCut(control, parts, files, damaged)
    raise BackupError(f"{registry.path} changed while it was listed, {TRIES} times", "repeat it")


def list_folders(path: Path) -> list[str]:
    """Lists the directories of durable versions, relative to the registry at `path`; quarantined ones are left out."""
    with usable(str(path), "be listed"):
        return sorted(
            f"{folder}/{one.name}"
            for folder in VERSIONED
            if (path / folder).is_dir()
            for one in (path / folder).iterdir()
            if one.name.replace("-", "").isdecimal()
        )


def list_files(path: Path, generation: int) -> tuple[str, ...]:
    """Lists all other files, relative to the registry at `path`; control files only up to `generation`."""
    with usable(str(path), "be listed"):
        found = [
            one
            for folder in sorted(path.iterdir())
            if folder.is_dir() and folder.name not in _LEFT_ALONE
            for one in sorted(folder.rglob("*"))
            if one.is_file()
        ]
    # Control's pointer to its newest generation belongs to no generation, and may point to a later one.
    kept = {f"{number:08d}.json" for number in range(generation + 1)}
    left = {one for one in found if one.parent.name == layout.CONTROL and one.name not in kept}
    return tuple(one.relative_to(path).as_posix() for one in found if one not in left)


def chain_of(parts: Mapping[str, Manifest], version: int) -> set[str] | None:
    """Returns the directories in `parts` that make up a version, as a registry with only these parts would read it.

    Args:
        parts: Directories of versions, with their manifests.
        version: The version.

    Returns:
        The directories; None if one is missing.
    """
    bases = {one.version: name for name, one in parts.items() if one.kind == "base"}
    deltas: dict[int, str] = {}
    for name, one in parts.items():
        # A merged version takes precedence over the delta, and among merged ones the one with the oldest parent.
        if one.kind != "base" and (one.version not in deltas or _rank(one) < _rank(parts[deltas[one.version]])):
            deltas[one.version] = name
    newest = deltas.get(version) or bases.get(version)
    if newest is None:
        return None
    line = parts[newest].visible
    base = max((number for number in bases if number <= version and sees(line, number)), default=None)
    at: int | None = version
    chain = set()
    while base is not None and at != base:
        if at not in deltas or at < base:
            return None
        chain.add(deltas[at])
        at = parts[deltas[at]].parent
    return None if base is None else {*chain, bases[base]}


def newest_whole(parts: Mapping[str, Manifest], control: Control) -> Manifest | None:
    """Returns the newest complete version of control's epoch; the epoch's base if the epoch has none."""
    ours = {one.version: one for one in parts.values() if one.epoch == control.epoch or one.version == control.base}
    return next((ours[number] for number in sorted(ours, reverse=True) if chain_of(parts, number)), None)


def _manifests(path: Path, folders: Collection[str], control: Control) -> tuple[dict[str, Manifest], dict[str, str]]:
    parts: dict[str, Manifest] = {}
    damaged: dict[str, str] = {}
    for folder in folders:
        try:
            found = manifest.decode(file_bytes(path / folder / MANIFEST))
        except FileNotFoundError:
            if not (path / folder).is_dir():
                raise
            damaged[folder] = "its manifest is missing"
        except ValueError as error:
            damaged[folder] = f"its manifest is damaged: {error}"
        else:
            if found.epoch <= control.epoch:
                parts[folder] = found
    return parts, damaged


def _needed(parts: Mapping[str, Manifest], control: Control) -> set[str]:
    """Returns the existing directories of the versions that the trainer needs to continue and that control names."""
    newest = newest_whole(parts, control)
    wanted = named(control) if newest is None else named(control) | {newest.version}
    return set().union(*(chain_of(parts, one) or () for one in wanted))


def _rank(part: Manifest) -> tuple[bool, int]:
    return part.kind != "merged", part.parent or 0
