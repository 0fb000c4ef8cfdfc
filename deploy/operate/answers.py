"""Estimates when this host serves a given version, at once or after a rebuild from the registry, and waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy.operate.versions import rows_here, served_version
from deploy.watch.scrape import scrape, urls
from state import layout
from state.config.settings import Settings
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, Registry

APPLIED_BYTES_PER_S = 40e6
"""How fast an applier writes rows from the registry to its row store."""
POLL_S = 0.02


@dataclass(frozen=True)
class Turning:
    """How soon this host can serve a version.

    Attributes:
        serves: Whether this host has a row store.
        here: Whether the version is in the row store.
        bytes: How many bytes an applier must read from the registry if it is not.
    """

    serves: bool
    here: bool = False
    bytes: int = 0

    @property
    def seconds(self) -> float:
        """Estimated time until this host serves the version, seconds.

        >>> Turning(True, True).seconds, Turning(True, False, 120_000_000).seconds
        (0.0, 3.0)
        """
        return 0.0 if self.here else self.bytes / APPLIED_BYTES_PER_S

    def line(self) -> str:
        """Describes the estimate in words.

        >>> Turning(True, False, 120_000_000).line()
        'on this host after about 3.0 s: 120 MB are read from the registry, and until then the version of now answers'
        """
        if not self.serves:
            return "nothing serves on this host; a host that has the version in its row store turns at once"
        if self.here:
            return "on this host at once: the version is in its row store"
        return (
            f"on this host after about {self.seconds:.1f} s: {self.bytes / 1e6:.0f} MB are read from the registry, and until "
            "then the version of now answers"
        )

    def document(self) -> dict[str, Any]:
        """Returns the estimate as JSON values."""
        return {
            "serves": self.serves,
            "in_row_store": self.here,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
        }


def turning(settings: Settings, registry: Registry, to: Manifest) -> Turning:
    """Estimates how soon this host can serve the version `to`.

    Raises:
        UnknownVersion, CorruptVersion: A part of the version cannot be read.
    """
    here = versions_here(settings)
    if here is None:
        return Turning(False)
    if to.version in here:
        return Turning(True, True)
    base, deltas = registry.chain(to.version)
    parts = [base, *deltas]
    known = [place for place, part in enumerate(parts) if part.version in here]
    missing = parts[known[-1] + 1 :] if known else parts
    return Turning(True, False, sum(part.files[SERVING].bytes for part in missing if SERVING in part.files))


def versions_here(settings: Settings) -> set[int] | None:
    """Returns the versions in this host's row store; None if there is no row store."""
    with rows_here(settings.serving_dir) as reader:
        return None if reader is None else {one.version for one in reader.versions()}


def serves(settings: Settings) -> bool:
    """Returns whether an applier runs on this host, according to its metrics."""
    if not (settings.serving_dir / layout.ROWS).is_dir():
        return False
    return not scrape({"applier": urls(settings)["applier"]})["applier"].problem


def wait(settings: Settings, version: int, limit_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
    """Waits up to `limit_s` until this host serves `version`; returns whether it does."""
    until = clock() + limit_s
    while served_version(settings.serving_dir) != version:
        if clock() >= until:
            return False
        time.sleep(POLL_S)
    return True
