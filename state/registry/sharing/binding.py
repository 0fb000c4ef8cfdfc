"""Where a registry is shared: the note in its directory of the place, and whether the directory is a copy or the origin.

A registry that is shared lies in a place for files (`state/places`), by the
names that its directory has, and each host has a directory of its own. The
trainer's is the origin: what it publishes is durable there first and goes to
the place behind its back. All others are copies: names of versions are brought
at once, their files when somebody reads them. Control is created in the place,
where only one can, before it counts anywhere.
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
"""The file by which a place shows that it creates exclusively."""


@dataclass(frozen=True)
class Binding:
    """What a registry's directory notes.

    Attributes:
        url: The place.
        claim: The number under which the trainer here owns the versions; 0 where the directory is a copy.
    """

    url: str
    claim: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether another host's trainer makes the versions, or none does yet."""
        return self.claim == 0


def bound(path: Path) -> Binding | None:
    """What the directory notes; None where it is shared with nobody.

    Raises:
        SettingsError: The note is damaged.
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
    """Notes where the registry is shared, durably, where that is new.

    Raises:
        SettingsError: It is shared elsewhere already.
        OSError: The directory cannot be written.
    """
    found = bound(path)
    if found is not None and found.url != url:
        raise _elsewhere(path, found.url, url)
    return found or note(path, Binding(url))


def require_as_set(settings: Settings) -> None:
    """Refuses settings that say otherwise than the note.

    Raises:
        SettingsError: The directory is shared elsewhere, or is shared and the settings do not say so.
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
    """Writes the note, durably.

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
    """The place, which has shown that of two who create a file one is refused.

    Raises:
        UnusablePlace: It cannot be reached, or replaces what is there.
    """
    place = open_place(url)
    if place.create(EXCLUSIVE, b"") and place.create(EXCLUSIVE, b""):
        raise UnusablePlace(
            f"{place.told} replaces a file that was to be created",
            "take a store that heeds `If-None-Match: *`: two operators at once would both win in this one",
        )
    return place
