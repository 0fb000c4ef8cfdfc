"""A LiteRT program with the two signatures of the model: `load(weights)` and `predict(inputs)`.

The program is shipped once; weights are data of each version and take some
tens of microseconds to load. No TensorFlow is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from state.errors import ProgramError
from state.lowering import argument
from state.process.quiet_stderr import quiet_stderr

BATCHES = (1, 4, 16)
PAIRS = 256
"""One more size of a batch, for many items of one user; its interpreter is made at its first use."""

_spoken: list[bool] = []

RENAMED = {
    "label_rows": "recent_rows",
    "label_windows": "category_windows",
    "label_next": "recent_next",
    "label_mask": "recent_mask",
    "label_logits": "recent_logits",
}
"""Inputs and outputs of programs that release 0.1.0 lowered, and what they are called."""

Arrays = Mapping[str, NDArray[Any]]


class LoadedProgram:
    """A program for batches of some fixed sizes; use it in one thread.

    A change of the batch's size costs more than an answer, so that each size
    has an interpreter of its own and smaller batches are filled up with zeros.

    Args:
        data: The bytes of a `.tflite` file.

    Raises:
        ProgramError: It is no program, or lacks a signature.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._given = data, dict[str, NDArray[Any]]()
        try:
            # A runner does not keep its interpreter alive.
            self._interpreters = {rows: Interpreter(model_content=data, num_threads=1) for rows in BATCHES}
            self._loads = [each.get_signature_runner("load") for each in self._interpreters.values()]
            self._predicts = {rows: each.get_signature_runner("predict") for rows, each in self._interpreters.items()}
        except (ValueError, RuntimeError) as error:
            raise ProgramError(
                f"a program of {len(data)} bytes cannot be run ({error})",
                "restart the trainer to lower the model again",
            ) from error
        self._weights = sorted(self._loads[0].get_input_details())
        inputs, outputs = self._predicts[1].get_input_details(), self._predicts[1].get_output_details()
        self._names = {RENAMED.get(name, name): name for name in inputs}
        self._outputs = {name: RENAMED.get(name, name) for name in outputs}
        self._renames = any(name in RENAMED for name in (*inputs, *outputs))
        self.shapes = {
            name: tuple(int(size) for size in inputs[theirs]["shape_signature"]) for name, theirs in self._names.items()
        }
        self.outputs = {
            name: tuple(int(size) for size in outputs[theirs]["shape_signature"])
            for theirs, name in self._outputs.items()
        }
        # Any input with a row for each question tells how many there are.
        self._by_row = next(name for name, shape in self.shapes.items() if shape[0] < 0)

    def load(self, weights: Arrays) -> None:
        """Sets the dense weights; `predict` gives NaN before the first load.

        Raises:
            ProgramError: A weight is missing or of another shape.
        """
        given = {argument(name): value for name, value in weights.items()}
        missing = [name for name in self._weights if name not in given]
        if missing:
            raise ProgramError(
                f"the version has no dense weights {', '.join(missing)}, which its program wants", "roll back"
            )
        try:
            # LiteRT says once a process, past its log, what it computes with.
            with nullcontext() if _spoken else quiet_stderr():
                for load in self._loads:
                    load(**{name: given[name] for name in self._weights})
            _spoken[:] = [True]
            self._given = given
        except (ValueError, RuntimeError) as error:
            raise ProgramError(f"the version's dense weights do not fit its program ({error})", "roll back") from error

    def predict(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs `predict`; inputs and outputs by name, float32, as many rows as `batch_of` gave."""
        outputs: dict[str, NDArray[np.float32]]
        rows = len(inputs[self._by_row])
        if rows == PAIRS and rows not in self._predicts:
            self._add_pairs()
        run = self._predicts[rows]
        if not self._renames:
            outputs = run(**inputs)
            return outputs
        outputs = run(**{self._names[name]: value for name, value in inputs.items()})
        return {self._outputs[name]: value for name, value in outputs.items()}

    def _add_pairs(self) -> None:
        made = self._interpreters[PAIRS] = Interpreter(model_content=self._data, num_threads=1)
        load = made.get_signature_runner("load")
        load(**{name: self._given[name] for name in self._weights})
        self._loads.append(load)
        self._predicts[PAIRS] = made.get_signature_runner("predict")


def batch_of(rows: int) -> int:
    """The smallest batch that holds so many rows, at most `PAIRS`.

    >>> [batch_of(rows) for rows in (1, 2, 4, 5, 17)]
    [1, 4, 4, 16, 256]
    """
    return next((size for size in BATCHES if size >= rows), PAIRS)
