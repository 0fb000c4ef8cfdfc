"""Empties a directory and becomes a program: `python -m deploy.flink.emptied DIRECTORY PROGRAM ARGUMENT...`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def empty(directory: Path) -> None:
    """Leaves a directory with nothing in it, made where it is missing.

    Raises:
        OSError: Something in it cannot be removed.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Does it; the process id stays."""
    directory, program, *arguments = sys.argv[1:] if argv is None else argv
    empty(Path(directory))
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
