"""Asks the program of a version what its trainer asked the model, before anybody is answered with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.program_files import path_of, read_program
from state import probe

if TYPE_CHECKING:
    from deploy.serving.program import LoadedProgram

_AT_ONCE = 16
_DENSE = "dense."


class Probing:
    """Probes versions; used by the thread that writes the rows.

    Args:
        programs: Directory with the host's copies of programs.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._loaded: tuple[str, LoadedProgram] | None = None

    def check(self, version: int, program: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Compares what the program answers with these weights; a version of a release without probes passes.

        Args:
            version: Its number, for the error.
            program: SHA-256 of its program, which is on this host.
            tensors: Of the version.

        Raises:
            ProgramError: It cannot be run with these weights, or it answers otherwise than the trainer did.
            CorruptVersion: The program's file is missing or damaged.
        """
        trained = probe.answers_in(tensors)
        if not trained:
            return
        loaded = self._program(program)
        loaded.load({name.removeprefix(_DENSE): one for name, one in tensors.items() if name.startswith(_DENSE)})
        probe.check(version, trained, _answers(loaded))

    def _program(self, digest: str) -> LoadedProgram:
        if self._loaded is None or self._loaded[0] != digest:
            from deploy.serving.program import LoadedProgram

            self._loaded = (digest, LoadedProgram(read_program(path_of(self._programs, digest))))
        return self._loaded[1]


def _answers(program: LoadedProgram) -> dict[str, NDArray[np.float32]]:
    """What a program answers to the probe, in batches as questions come in."""
    given = probe.inputs(program.shapes)
    by_row = {name for name, shape in program.shapes.items() if shape[0] < 0}
    found: dict[str, list[NDArray[np.float32]]] = {}
    for first in range(0, probe.ROWS, _AT_ONCE):
        some = {name: one[first : first + _AT_ONCE] if name in by_row else one for name, one in given.items()}
        for name, values in program.predict(some).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}
