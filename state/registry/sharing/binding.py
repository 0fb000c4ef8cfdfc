"""Binding of a registry directory to the object store where it is shared, as the origin or as a copy.

A shared registry is in an object store (`state/places`), under the file names of
a registry directory. Each host has a directory of its own. The trainer's is the
origin: what it publishes is durable there first, and is pushed to the object
store in the background. All others are copies: they fetch names of versions at
once, and files when they are read. Control is created exclusively in the object
store before it takes effect anywhere.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from state.config.settings import Settings
from state.disk import files as durable
from state.errors import SettingsError, UnusablePlace
from state.places.opening import open_place
from state.places.place import FilePlace

FILE = "shared.json"
EXCLUSIVE = "exclusive"
"""The file with which a store is tested for exclusive creation."""


@dataclass(frozen=True)
class Binding:
    """Where a registry's directory is shared, as stored in the directory.

    Attributes:
        url: URL of the object store.
        claim: The claim number under which the trainer here owns the versions; 0 for a copy.
    """

    url: str
    claim: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether another host's trainer creates the versions, or none does yet."""
        return self.claim == 0


def bound(path: Path) -> Binding | None:
    """Reads the binding of a directory; None if it is not shared.

    Raises:
        SettingsError: The binding is damaged.
    """
    try:
        return Binding(**json.loads((path / FILE).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"{path / FILE} is damaged: {error}", "remove it; the next start with paths.shared_registry writes it anew"
        ) from error


def bind(path: Path, url: str) -> Binding:
    """Binds a directory to an object store, durably, unless it is bound already.

    Raises:
        SettingsError: The directory is bound to another store.
        OSError: The directory cannot be written.
    """
    found = bound(path)
    if found is not None and found.url != url:
        raise _elsewhere(path, found.url, url)
    return found or note(path, Binding(url))


def require_as_set(settings: Settings) -> None:
    """Refuses settings that contradict the binding.

    Raises:
        SettingsError: The directory is bound to another store, or is bound and the settings name no store.
    """
    found, url = bound(settings.registry_dir), settings.paths.shared_registry
    if found is not None and found.url != url:
        raise _elsewhere(settings.registry_dir, found.url, url)


def _elsewhere(path: Path, url: str, asked: str) -> SettingsError:
    return SettingsError(
        f"{path} belongs to the registry at {url}, and paths.shared_registry is {asked or 'empty'}",
        "put the setting back, or give this host another paths.registry",
    )


def note(path: Path, binding: Binding) -> Binding:
    """Writes the binding, durably.

    Raises:
        OSError: The directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f"{FILE}~{os.getpid()}-{os.urandom(4).hex()}"
    durable.write(temporary, json.dumps(asdict(binding)).encode())
    temporary.replace(path / FILE)
    durable.sync_directory(path)
    return binding


def open_exclusive(url: str) -> FilePlace:
    """Opens the object store after a test that it supports exclusive creation.

    Raises:
        UnusablePlace: It cannot be reached, or replaces existing files.
    """
    place = open_place(url)
    if place.create(EXCLUSIVE, b"") and place.create(EXCLUSIVE, b""):
        raise UnusablePlace(
            f"{place.told} replaces a file that was to be created",
            "take a store that heeds `If-None-Match: *`: two operators at once would both win in this one",
        )
    return place
