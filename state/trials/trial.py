"""Trials and their directories, each with a document of the trial's desired state.

    trials/lock                  of the process that runs them
    trials/<name>/trial.json     the desired state; replaced as a whole, under its `lock`
    trials/<name>/registry/      of its own trainer; removed once nobody needs its weights
    trials/<name>/comparison.json    see `state/trials/comparison.py`

Commands write the desired state. The process that runs trials converges to it,
also after an outage. A trial belongs to the epoch of the live trainer in which it
began. If the live trainer is rolled back, it learns other rows, so the trial ends.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from state import layout
from state.disk import files as durable
from state.disk.lock import DirectoryLock
from state.errors import RegistryError, SettingsError
from state.registry import sealed

DOCUMENT = "trial.json"
MOST_RUNNING = 4
"""Trials at once. Each has a trainer, which needs as much memory as the live one."""

Wanted = Literal["running", "promoting", "promoted", "stopped", "ended"]
"""Desired state of a trial.

promoting  its trainer is shutting down
promoted   the live trainer continues from it
ended      it ended without a command
"""
Origin = Literal["live", "nothing", "clicks"]

_GONE = ".gone."
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Trial:
    """A trial and its desired state.

    Attributes:
        name: Its name.
        wanted: The desired state.
        actor: Who requested that state.
        reason: Why.
        at_ms: When, wall clock.
        begun_by: Who began the trial.
        begun_for: Why.
        begun_at_ms: When.
        origin: What its trainer started from: the live version, nothing, or past clicks (`state/trials/past.py`).
        version: That version; None for the other origins.
        epoch: Epoch of the live trainer when the trial began.
        overrides: Settings that differ from the live ones, by name, as text.
        promoted_epoch: Epoch in which the live trainer continues from it; 0 for none.
    """

    name: str
    wanted: Wanted
    actor: str
    reason: str
    at_ms: int
    begun_by: str
    begun_for: str
    begun_at_ms: int
    origin: Origin
    version: int | None
    epoch: int
    overrides: Mapping[str, str] = field(default_factory=dict)
    promoted_epoch: int = 0

    @property
    def runs(self) -> bool:
        """Whether its trainer should run."""
        return self.wanted == "running"

    def wants(self, wanted: Wanted, *, actor: str, reason: str, now_ms: int, promoted_epoch: int = 0) -> Trial:
        """The trial with another desired state."""
        changes: dict[str, Any] = {"actor": actor, "reason": reason, "at_ms": now_ms, "promoted_epoch": promoted_epoch}
        return replace(self, wanted=wanted, **changes)


def require_name(name: str) -> None:
    """Refuses an invalid name of a trial. It names a directory, a log and a label too.

    Raises:
        SettingsError: The name is invalid.

    >>> require_name("wider-rows")
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for a trial", "take up to 32 small letters, digits and hyphens, such as wider-rows"
        )


class Trials:
    """The trials under a state directory.

    Args:
        state: The state directory.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / layout.TRIALS

    def folder(self, name: str) -> Path:
        """The directory of a trial."""
        return self.path / name

    def registry(self, name: str) -> Path:
        """The registry of a trial; it exists as long as somebody may need what it learned."""
        return layout.trial_registry(self.path.parent, name)

    def all(self) -> list[Trial]:
        """All trials, by name.

        Raises:
            RegistryError: A document is damaged.
        """
        return [self.read(path.parent.name) for path in sorted(self.path.glob(f"[!.]*/{DOCUMENT}"))]

    def open(self) -> list[str]:
        """The names of trials with a registry or a part of one: there is something to run or to remove."""
        left = (path for name in (layout.REGISTRY, f"{_GONE}*") for path in self.path.glob(f"[!.]*/{name}"))
        return sorted({path.parent.name for path in left})

    def read(self, name: str) -> Trial:
        """One trial.

        Raises:
            RegistryError: There is no such trial, or its document is damaged.
        """
        path = self.folder(name) / DOCUMENT
        try:
            return sealed.decode(path.read_bytes(), Trial)
        except FileNotFoundError:
            known = ", ".join(one.parent.name for one in sorted(self.path.glob(f"[!.]*/{DOCUMENT}"))) or "there is none"
            raise RegistryError(f"there is no trial {name}", f"take one of `springtide trial list`: {known}") from None
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{path} cannot be read: {error}", f"remove {path.parent}: what the trial learned goes with it"
            ) from error

    def has(self, name: str) -> bool:
        """Whether a trial of this name exists or existed."""
        return (self.folder(name) / DOCUMENT).exists()

    def add(self, trial: Trial, fill: Callable[[Path], None]) -> None:
        """Adds a trial, completely or not at all.

        1. It is built under a temporary name, and synced.
        2. One rename makes it visible.

        Args:
            trial: The trial.
            fill: Fills its registry's directory, which exists.

        Raises:
            RegistryError: A trial of that name exists.
            OSError: The disk refused.
        """
        final, aside = self.folder(trial.name), self.path / f".{trial.name}~{durable.owner_mark()}"
        if final.exists():
            raise RegistryError(
                f"there was a trial {trial.name} before",
                f"take another name, or remove {final}, where its comparison lies",
            )
        try:
            # 1.
            (aside / layout.REGISTRY).mkdir(parents=True)
            fill(aside / layout.REGISTRY)
            durable.write(aside / DOCUMENT, sealed.encode(trial))
            durable.sync_tree(aside)
            # 2.
            aside.rename(final)
            durable.sync_directory(self.path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def change(self, name: str, transition: Callable[[Trial], Trial]) -> Trial:
        """Applies a pure transition to a trial; durable when this returns.

        Raises:
            RegistryError: There is no such trial.
            LockHeld: Another process is changing it.
            SpringtideError: Raised by the transition.
        """
        with self._changing(name):
            before = self.read(name)
            after = transition(before)
            if after != before:
                durable.replace(self.folder(name) / DOCUMENT, sealed.encode(after))
            return after

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        self.read(name)
        with DirectoryLock(self.folder(name)):
            yield

    def drop_registry(self, name: str) -> None:
        """Removes the registry of a trial; its document and its comparison stay.

        Raises:
            OSError: The disk refused.
        """
        registry, folder = self.registry(name), self.folder(name)
        if registry.is_dir():
            # One rename, so that a half-removed registry is never taken for one.
            registry.rename(folder / f"{_GONE}{os.urandom(4).hex()}")
        for gone in folder.glob(f"{_GONE}*"):
            shutil.rmtree(gone)

    def sweep(self) -> None:
        """Removes what killed commands left of trials that they were adding.

        Raises:
            OSError: The disk refused.
        """
        for aside in self.path.glob(".*~*"):
            if durable.is_dead(aside.name.rpartition("~")[2]):
                shutil.rmtree(aside)
