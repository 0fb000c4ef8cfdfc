"""Tracks which versions in a host's rows may serve answers: those that did not fail their probe.

Before a version serves, its program answers the probe: the questions that its trainer asked the model. A version
whose answers differ stays in the rows, because later versions build on it. A note next to the rows excludes it from
serving, also after a restart. A version without a probe has the verdict of the version it builds on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.notes import REFUSED_NOTE, refused_versions
from deploy.serving.version_files import read_program
from state import probe
from state.errors import ProgramError
from state.metrics import ApplierMetrics
from state.registry.manifest import Manifest
from state.rows.reader import Served
from state.rows.store import RowStore

if TYPE_CHECKING:
    from deploy.serving.answers.program import LoadedProgram

_AT_ONCE = 16
_DENSE = "dense."


class Probing:
    """Probes versions with this host's copies of programs; used by the thread that writes the rows."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._loaded: tuple[str, LoadedProgram] | None = None

    def check(self, version: int, program: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Compares the program's answers with these weights to the probe; a version of a release without probes passes.

        `program` is the SHA-256 of the version's program, which is on this host.

        Raises:
            ProgramError: It cannot be run with these weights, or its answers differ from the trainer's.
            CorruptVersion: The program's file is missing or damaged.
        """
        trained = probe.answers_in(tensors)
        if not trained:
            return
        loaded = self._program(program)
        loaded.load({name.removeprefix(_DENSE): tensor for name, tensor in tensors.items() if name.startswith(_DENSE)})
        probe.check(version, trained, _answers(loaded))

    def _program(self, digest: str) -> LoadedProgram:
        if self._loaded is None or self._loaded[0] != digest:
            from deploy.serving.answers.program import LoadedProgram

            self._loaded = (digest, LoadedProgram(read_program(self._programs, digest)))
        return self._loaded[1]


def _answers(program: LoadedProgram) -> dict[str, NDArray[np.float32]]:
    """Answers the probe in batches, as queries are."""
    inputs = probe.inputs(program.shapes)
    by_row = {name for name, shape in program.shapes.items() if shape[0] < 0}
    outputs: dict[str, list[NDArray[np.float32]]] = {}
    for first in range(0, probe.ROWS, _AT_ONCE):
        part = {name: value[first : first + _AT_ONCE] if name in by_row else value for name, value in inputs.items()}
        for name, values in program.predict(part).items():
            outputs.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


class FitVersions:
    """All versions except those that failed; used by the thread that writes the rows.

    `refuse` is called with `probe`, the number of a version that fails, and the reason.
    """

    def __init__(
        self, rows: RowStore, programs: Path, metrics: ApplierMetrics, refuse: Callable[[str, int, Exception], None]
    ) -> None:
        self._rows, self._metrics, self._refuse = rows, metrics, refuse
        self._probing = Probing(programs)
        with rows.reader() as reader:
            self._refused = refused_versions(reader.note(REFUSED_NOTE))

    def __contains__(self, version: int | None) -> bool:
        return version not in self._refused

    def admit(self, manifest: Manifest, tensors: Mapping[str, NDArray[Any]]) -> bool:
        """Whether a version that is about to be applied may serve; if not, that is recorded when this returns.

        Its program must be on this host, and `tensors` has all of it.
        """
        version = manifest.version
        if version not in self._refused:
            if manifest.parent in self._refused and not probe.answers_in(tensors):
                self._note({**self._refused, version: self._refused[manifest.parent]})
                return False
            try:
                self._probing.check(version, manifest.program, tensors)
            except ProgramError as error:
                self._metrics.failed_probes.inc()
                self._note({**self._refused, version: str(error)})
                self._refuse("probe", version, error)
        return version in self

    def keep(self, present: Container[int]) -> None:
        """Removes versions that are no longer in the rows."""
        remaining = {version: why for version, why in self._refused.items() if version in present}
        if remaining != self._refused:
            self._note(remaining)

    def show(self, served: Served | None) -> None:
        """Shows in the metrics which version would serve now if it had not failed."""
        newer = [version for version in self._refused if served is None or version > served.version]
        self._metrics.refused_version.set(max(newer, default=0))

    def _note(self, refused: dict[int, str]) -> None:
        self._rows.steer({REFUSED_NOTE: json.dumps(refused).encode()})
        self._refused = refused
