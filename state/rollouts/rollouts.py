"""Stores the generations of rollouts in a registry; a new generation is one exclusively created file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from state import layout
from state.disk import files as durable
from state.errors import ControlConflict, CorruptVersion
from state.registry import sealed
from state.registry.directory import usable
from state.rollouts.rollout import Rollout

FIGURES = "figures.json"
_TRIES = 8


class Rollouts:
    """The rollouts of one registry, one open at a time. Use one object per thread.

    Args:
        registry: The registry's directory.
    """

    def __init__(self, registry: Path) -> None:
        self._folder = registry / layout.ROLLOUTS
        self._newest: Rollout | None = None

    def newest(self) -> Rollout | None:
        """The newest generation; None before the first. Cheap enough to poll: it checks for one file name.

        Raises:
            CorruptVersion: The file fails its digest.
            UnusableRegistry: It cannot be read.
        """
        with usable("be read"):
            if self._newest is None:
                numbers = self._numbers()
                self._newest = self._read(numbers[-1]) if numbers else None
            while self._path((0 if self._newest is None else self._newest.generation) + 1).exists():
                self._newest = self._read((0 if self._newest is None else self._newest.generation) + 1)
        return self._newest

    def history(self, name: str) -> list[Rollout]:
        """The generations of the newest rollout of one trial, in order; empty if there is none.

        Raises:
            CorruptVersion: A file fails its digest.
            UnusableRegistry: They cannot be read.
        """
        with usable("be read"):
            found = [one for number in self._numbers() if (one := self._read(number)).name == name]
        return [one for one in found if one.started_ms == found[-1].started_ms]

    def propose(self, rollout: Rollout) -> Rollout:
        """Makes a generation the newest one, durably.

        1. It is written to a temporary file.
        2. A hard link with its number is created, which only one process can do. The generation is in force from here.
        3. The directory is synced.

        Raises:
            ControlConflict: Another process was faster.
            UnusableRegistry: The disk refused; nothing changed.
        """
        with usable(f"take generation {rollout.generation} of rollouts"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # 1.
            temporary = self._folder / f".{rollout.generation}-{os.urandom(4).hex()}"
            durable.write(temporary, sealed.encode(rollout))
            try:
                # 2.
                os.link(temporary, self._path(rollout.generation))
            except FileExistsError:
                other = self._read(rollout.generation)
                raise ControlConflict(
                    f"generation {rollout.generation} of rollouts was just created by {other.actor} ({other.phase}: {other.reason})",
                    f"look at `springtide trial report {other.name}`, then repeat the command",
                ) from None
            finally:
                temporary.unlink()
            # 3.
            durable.sync_directory(self._folder)
        return rollout

    def keep_figures(self, rollout: Rollout, figures: Mapping[str, Any], now_ms: int) -> None:
        """Stores the figures of a rollout's arms for reports, replacing earlier ones; durable when this returns.

        They are for display only. The process that drives a rollout reads its topics again.

        Args:
            rollout: A generation of it.
            figures: JSON values.
            now_ms: Wall clock.

        Raises:
            OSError: The disk refused; the earlier figures stay.
        """
        document = {"started_ms": rollout.started_ms, "judged_ms": now_ms, **figures}
        durable.replace(self._folder / FIGURES, msgspec.json.encode(document))

    def figures(self, rollout: Rollout) -> dict[str, Any] | None:
        """The figures of a rollout's arms; None if there are none yet or they cannot be read."""
        try:
            found: dict[str, Any] = msgspec.json.decode((self._folder / FIGURES).read_bytes())
            return found if found["started_ms"] == rollout.started_ms else None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
            return None

    def change(self, transition: Callable[[Rollout], Rollout], name: str = "") -> Rollout:
        """Applies a pure transition to the newest rollout; retries with the new one if another process was faster.

        Args:
            transition: Maps a generation to the next, or to itself if nothing changes.
            name: Trial whose rollout must be the newest one; empty for any.

        Raises:
            ControlConflict: There is none, it is another trial's, the transition refuses, or others kept being faster.
        """
        for _ in range(_TRIES):
            newest = self.newest()
            if newest is None or name not in ("", newest.name):
                there = "there is none" if newest is None else f"the newest one is that of {newest.name}"
                raise ControlConflict(
                    f"no rollout of {name or 'any trial'}: {there}", "start it first: `springtide rollout NAME`"
                )
            wanted = transition(newest)
            if wanted is newest:
                return newest
            try:
                return self.propose(wanted)
            except ControlConflict as error:
                conflict = error
        raise conflict

    def _numbers(self) -> list[int]:
        if not self._folder.exists():
            return []
        stems = (path.name.removesuffix(".json") for path in self._folder.iterdir() if path.name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _path(self, generation: int) -> Path:
        return self._folder / f"{generation:08d}.json"

    def _read(self, generation: int) -> Rollout:
        path = self._path(generation)
        try:
            return sealed.decode(path.read_bytes(), Rollout)
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "remove it: users are answered as the generation before says"
            ) from error
