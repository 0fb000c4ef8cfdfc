"""Reads every file that a version is put together from, and compares the digests, before the system goes back to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from state.errors import CorruptVersion, UnfitVersion
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

THREADS = 4  # a digest is computed without the interpreter's lock


def total_bytes(registry: Registry, version: int) -> int:
    """The bytes of all files that a version is put together from.

    Raises:
        UnknownVersion, CorruptVersion: One of its parts cannot be read.
    """
    base, deltas = registry.chain(version)
    return sum(file.bytes for part in (base, *deltas) for file in part.files.values())


def require_sound(registry: Registry, version: Manifest) -> None:
    """Refuses a version of which a file fails its digest.

    Raises:
        UnknownVersion: A part is not kept any more.
        UnfitVersion: A file is damaged; the version before the damage is named.
    """
    base, deltas = registry.chain(version.version)
    parts = [base, *deltas]
    with ThreadPoolExecutor(THREADS) as pool:
        for part, problem in zip(parts, pool.map(lambda part: _problem(registry, part), parts), strict=True):
            if problem is not None:
                raise UnfitVersion(
                    f"version {version.version} cannot be put together: {problem.what}",
                    _before(registry, version, part),
                )


def _problem(registry: Registry, part: Manifest) -> CorruptVersion | None:
    try:
        registry.verify(part)
    except CorruptVersion as error:
        return error
    return None


def _before(registry: Registry, version: Manifest, bad: Manifest) -> str:
    """What to take in place of a version whose part `bad` is damaged."""
    if bad.kind == "delta" and bad.parent is not None:
        return f"take {bad.parent}, the version before the damage"
    older = [one for one in registry.bases() if one < bad.version and sees(version.visible, one)]
    if older:
        return f"take {older[-1]}, the base before it"
    return "no older base is kept: restore the file from a copy"
