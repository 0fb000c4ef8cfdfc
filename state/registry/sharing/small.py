"""Syncs the small immutable files of a shared registry: each host pushes and fetches what the other side lacks.

These are specs of bootstraps, outcomes of rollbacks, accepted baselines and
accepted losses. Each is created in the directory of one host first. The file
that marks a folder as complete is copied last, in both directions.
"""

from __future__ import annotations

import json
from pathlib import Path

from state import layout
from state.places.place import FilePlace
from state.process import killpoints
from state.registry.directory import sharing, usable
from state.registry.erasing import ErasureReport, reports
from state.registry.registry import Registry

FOLDERS = (layout.SPECS, layout.OUTCOMES, layout.BASELINES, layout.GAPS)
_WHOLE = ("spec.json", "baseline.json")


def exchange_small(registry: Registry, place: FilePlace) -> int:
    """Pushes and fetches; returns how many files were copied.

    Raises:
        UnusableRegistry: The object store cannot be reached, or the disk refused.
    """
    count = 0
    for folder in FOLDERS:
        with sharing():
            theirs = {name for name in place.names(folder) if _is_small(name)}
        ours = _own(registry.path / folder)
        for name in sorted(ours - theirs, key=_whole_last):
            with usable("be read"), sharing():
                place.create(f"{folder}/{name}", (registry.path / folder / name).read_bytes())
            killpoints.reach("share.small")
            count += 1
        for name in sorted(theirs - ours, key=_whole_last):
            path = registry.path / folder / name
            if (data := registry.from_shared(path)) is None:
                continue
            with usable(f"take {folder}"):
                path.parent.mkdir(parents=True, exist_ok=True)
            registry.keep_copy(path, data)
            killpoints.reach("copy.small")
            count += 1
    return count


def all_reports(registry: Registry) -> list[ErasureReport]:
    """The erasure reports of the processes of all hosts, by name. For processes of this host, the local report counts.

    Raises:
        UnusableRegistry: The object store of the shared registry cannot be reached.
    """
    found = {one.part: one for one in reports(registry.path)}
    if (place := registry.shared) is not None:
        with sharing():
            for name in place.names(layout.ERASURES):
                if name.removesuffix(".json") in found:
                    continue
                try:
                    told = ErasureReport(**json.loads(place.read(f"{layout.ERASURES}/{name}")))
                except (FileNotFoundError, ValueError, TypeError):
                    continue
                found[told.part] = told
    return [found[part] for part in sorted(found)]


def _own(folder: Path) -> set[str]:
    with usable("be listed"):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if _is_small(name)}


def _is_small(name: str) -> bool:
    """Whether it is a permanent file: neither being written nor set aside."""
    return "~" not in name and ".bad" not in name


def _whole_last(name: str) -> tuple[bool, str]:
    return name.rpartition("/")[2] in _WHOLE, name
