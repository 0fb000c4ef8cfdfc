"""The registry's directory: what each part of it is written and read with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.errors import UnusableRegistry, reason_of


class Directory:
    """A directory with a folder for what is being written, whose names carry their writer.

    Args:
        path: The registry's directory.
        folders: The names of the folders that this part of the registry uses.
    """

    def __init__(self, path: Path, *folders: str) -> None:
        self.path = path
        # Whoever only reads may do without, and an applier waits for its registry: the first use says what is wrong.
        with suppress(OSError):
            for name in (*folders, layout.TEMPORARY):
                (path / name).mkdir(parents=True, exist_ok=True)

    def sweep(self) -> list[str]:
        """Deletes what dead writers left under `tmp/`; returns the names."""
        with usable("be swept"):
            left = [
                path
                for path in (self.path / layout.TEMPORARY).iterdir()
                if durable.is_dead(path.name.rpartition("~")[2])
            ]
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in left]

    def temporary(self, what: str) -> Path:
        """A path for what is written next, by this process alone."""
        path = self.path / layout.TEMPORARY / f"{what}~{durable.owner_mark()}"
        shutil.rmtree(path, ignore_errors=True)
        return path


@contextmanager
def usable(doing: str) -> Iterator[None]:
    """Turns what the operating system refuses into an error of ours.

    A file that cannot be read is not a damaged one: nothing is set aside, and
    nothing older is taken in its place.

    Raises:
        UnusableRegistry: The disk is full or read-only, or rights are missing.
    """
    try:
        yield
    except OSError as error:
        raise UnusableRegistry(
            f"the registry cannot {doing} ({reason_of(error)})",
            "free space or correct its access rights, and start again",
        ) from error


def file_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: There is none.
        UnusableRegistry: It is there and cannot be read.
    """
    with usable("be read"):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            missing = error
    raise missing
