"""Runs a LiteRT program with the model's two signatures: `load(weights)` and `predict(inputs)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, SignatureRunner
from numpy.typing import NDArray

from state.errors import ProgramError
from state.lowering import load_arguments
from state.process.part import quiet_stderr

BATCHES = (1, 4, 16)
PAIRS = 256
"""An additional batch size, for many items of one user; its interpreter is created on first use."""

_spoken: list[bool] = []

RENAMED = {
    "label_rows": "recent_rows",
    "label_windows": "category_windows",
    "label_next": "recent_next",
    "label_mask": "recent_mask",
    "label_logits": "recent_logits",
}
"""Old to current names of inputs and outputs in programs lowered by release 0.1.0."""

Arrays = Mapping[str, NDArray[Any]]


class _FixedBatch:
    """Runs `predict` on inputs of one shape; `inputs` and `outputs` translate the program's own names.

    A `SignatureRunner` resizes and allocates all tensors in each call, which costs as much as computing a row. This
    class does so once, through the wrapper's methods, because LiteRT has no public API for it.
    """

    def __init__(
        self,
        runner: SignatureRunner,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._runner = runner
        self._wrapper, self._subgraph = runner._interpreter_wrapper, runner._subgraph_index
        self._inputs = [(name, runner._inputs[own]) for name, own in inputs.items()]
        self._outputs = [(outputs[own], index) for own, index in runner._outputs]
        for name, index in self._inputs:
            self._wrapper.ResizeInputTensor(index, np.array(shapes[name], np.int32), False, self._subgraph)
        self._wrapper.AllocateTensors(self._subgraph)

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs the program, and copies each output; raises ValueError if a number, shape or type of inputs is wrong."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"the program has {len(self._inputs)} inputs, not {len(inputs)}")
        wrapper, subgraph = self._wrapper, self._subgraph
        for name, index in self._inputs:
            wrapper.SetTensor(index, inputs[name], subgraph)
        wrapper.Invoke(subgraph)
        return {name: wrapper.GetTensor(index, subgraph) for name, index in self._outputs}


class LoadedProgram:
    """A program for a few fixed batch sizes. Used by one thread.

    Each size has its own interpreter, because a change of size costs more than an answer. Smaller batches are padded
    with zeros.

    Raises:
        ProgramError: The data is not a program, or lacks a signature.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._tensors = data, dict[str, NDArray[Any]]()
        try:
            # A runner does not keep its interpreter alive.
            self._interpreters = {rows: Interpreter(model_content=data, num_threads=1) for rows in BATCHES}
            self._loads = {rows: model.get_signature_runner("load") for rows, model in self._interpreters.items()}
            runners = {rows: model.get_signature_runner("predict") for rows, model in self._interpreters.items()}
        except (ValueError, RuntimeError) as error:
            raise ProgramError(
                f"a program of {len(data)} bytes cannot be run ({error})",
                "restart the trainer to lower the model again",
            ) from error
        self._stale: set[int] = set()
        inputs, outputs = runners[1].get_input_details(), runners[1].get_output_details()
        self._names = {RENAMED.get(name, name): name for name in inputs}
        self._outputs = {name: RENAMED.get(name, name) for name in outputs}
        self.shapes = {
            name: tuple(int(size) for size in inputs[inner]["shape_signature"]) for name, inner in self._names.items()
        }
        self.outputs = {
            name: tuple(int(size) for size in outputs[inner]["shape_signature"])
            for inner, name in self._outputs.items()
        }
        by_query = {name: shape[1:] for name, shape in self.shapes.items() if shape[0] < 0}
        self._by_query = {
            rows: [(name, (rows, *shape)) for name, shape in by_query.items()] for rows in (*BATCHES, PAIRS)
        }
        with _quiet():
            self._predicts = {rows: self._fixed(runner, rows) for rows, runner in runners.items()}
        # Any input with one row per query gives the number of queries.
        self._by_row = next(iter(by_query))

    def load(self, weights: Arrays) -> None:
        """Sets the dense weights; `predict` gives NaN before. Raises ProgramError if one is missing or of a wrong
        shape.
        """
        self._tensors = load_arguments(weights, self._loads[1].get_input_details())
        self._stale = {*self._loads}
        # The other batch sizes load the weights at their next use; under low load that never happens.
        self._set_weights(1)

    def _set_weights(self, rows: int) -> None:
        try:
            with _quiet():
                self._loads[rows](**self._tensors)
        except (ValueError, RuntimeError) as error:
            raise ProgramError(f"the version's dense weights do not fit its program ({error})", "roll back") from error
        self._stale.discard(rows)

    def zeros(self, rows: int) -> dict[str, NDArray[np.float32]]:
        """Returns zeros for each input with one row per query, by name; `rows` is from `batch_of`."""
        return {name: np.zeros(shape, np.float32) for name, shape in self._by_query[rows]}

    def predict(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs `predict`; inputs and outputs are by name, float32, with the number of rows from `batch_of`."""
        rows = len(inputs[self._by_row])
        if rows == PAIRS and rows not in self._predicts:
            self._add_pairs()
        if rows in self._stale:
            self._set_weights(rows)
        return self._predicts[rows].run(inputs)

    def _fixed(self, runner: SignatureRunner, rows: int) -> _FixedBatch:
        shapes = {name: tuple(rows if size < 0 else size for size in shape) for name, shape in self.shapes.items()}
        return _FixedBatch(runner, self._names, self._outputs, shapes)

    def _add_pairs(self) -> None:
        interpreter = self._interpreters[PAIRS] = Interpreter(model_content=self._data, num_threads=1)
        self._loads[PAIRS] = interpreter.get_signature_runner("load")
        self._stale.add(PAIRS)
        self._predicts[PAIRS] = self._fixed(interpreter.get_signature_runner("predict"), PAIRS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences stderr at its first use: LiteRT writes its backend there once per process."""
    with nullcontext() if _spoken else quiet_stderr():
        yield
    _spoken[:] = [True]


def batch_of(rows: int) -> int:
    """Returns the smallest batch size that holds `rows` rows; `rows` is at most `PAIRS`.

    >>> [batch_of(rows) for rows in (1, 2, 4, 5, 17)]
    [1, 4, 4, 16, 256]
    """
    return next((size for size in BATCHES if size >= rows), PAIRS)
