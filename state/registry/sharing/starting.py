"""How a trainer comes to own the versions of a shared registry, and how a host joins one.

the directory here       the place           what happens
empty, or a copy         anything            claimed; what the place has is brought, numbers begin far beyond it
with versions, unbound   empty               claimed; what is here is given to the place
with versions, unbound   of this registry    likewise
with versions, unbound   of another one      refused
the origin               claimed by nobody   goes on under its own claim
else
the origin               claimed by another  refused: two would train
"""

from __future__ import annotations

from pathlib import Path

from state import layout
from state.disk import files as durable
from state.errors import SettingsError
from state.places.place import FilePlace
from state.process import killpoints
from state.registry.directory import file_bytes, sharing
from state.registry.recent import MOST_BETWEEN
from state.registry.registry import Registry
from state.registry.sharing import catalog as catalogs
from state.registry.sharing import claims
from state.registry.sharing.binding import Binding, bind, bound, note, open_exclusive
from state.registry.sharing.taking import Copier


def own(path: Path, url: str, now_ms: int) -> tuple[FilePlace, int]:
    """Makes the directory the origin of what the place has, or finds that it is.

    1. What is here goes there, where the directory was shared with nobody: masks, then control.
    2. The versions are claimed.
    3. What is there comes here: control, the names of versions, programs, what is small.
    4. Numbers that the trainer before may have used are passed over.
    5. The directory is the origin.

    Args:
        path: The registry's directory, with the trainer's lock held.
        url: The place.
        now_ms: Wall clock.

    Returns:
        The place, and the claim.

    Raises:
        SettingsError: The directory is of another registry.
        LockHeld: Another trainer owns the versions.
        RegistryError: The place cannot be reached, or the disk refused.
    """
    with sharing():
        place = open_exclusive(url)
    before = bound(path)
    if before is not None and not before.is_copy:
        bind(path, url)
        with sharing():
            claims.require_newest(place, before.claim)
        return place, before.claim
    # 1.
    if before is None:
        give_control(Registry(path), place)
    bind(path, url)
    killpoints.reach("share.bound")
    # 2.
    with sharing():
        claim = claims.take(place, now_ms)
    killpoints.reach("share.claimed")
    # 3.
    Copier(path, place).step()
    with sharing():
        there = catalogs.at_place(place)
    registry = Registry(path)
    registry.shared = place
    for digest in there.programs:
        registry.program(digest)
    # 4.
    pass_over(registry, there.last)
    # 5.
    note(path, Binding(url, claim))
    return place, claim


def give_control(registry: Registry, place: FilePlace) -> None:
    """Gives an empty place the control of a registry that was shared with nobody, all generations in their order.

    Raises:
        SettingsError: The place has another registry's.
        UnusableRegistry: The place cannot be reached.
    """
    newest = registry.control()
    if newest is None:
        return
    with sharing():
        for path in sorted((registry.path / layout.MASKS).iterdir()):
            place.write(f"{layout.MASKS}/{path.name}", file_bytes(path))
        for generation in range(1, newest.generation + 1):
            name = f"{layout.CONTROL}/{generation:08d}.json"
            data = file_bytes(registry.path / name)
            if not place.create(name, data) and place.read(name) != data:
                raise SettingsError(
                    f"{registry.path} and {place.told} are two registries: control generation {generation} differs",
                    "name an empty place in paths.shared_registry, or give this host another paths.registry",
                )


def pass_over(registry: Registry, last: int) -> None:
    """Begins the numbers of versions here beyond all that the trainer before may have used.

    Raises:
        OSError: The disk refused.
    """
    keeper = registry.path / layout.RECENT / f"{last + MOST_BETWEEN:012d}.last"
    if last and not keeper.exists():
        durable.write(keeper, b"")
        durable.sync_directory(keeper.parent)
