"""The LiteRT program that serving runs, loaded to check it; `trainer/versions/lowering.py` describes and makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.errors import ProgramError
from state.lowering import TOLERANCE, difference, load_arguments
from trainer.model.model import Model

F32 = npt.NDArray[np.float32]
Predict = Callable[[Mapping[str, F32]], Mapping[str, Any]]
"""The outputs of `Ranker.predict` by name, from inputs of serving."""


class Program:
    """A loaded program, of which `predict` runs one signature, for checks. Serving has its own class, without TensorFlow."""

    def __init__(self, content: bytes, signature: str = "predict") -> None:
        from ai_edge_litert.interpreter import Interpreter

        # A runner does not keep its interpreter alive, so a reference is held here.
        self._interpreter = Interpreter(model_content=content, num_threads=1)
        self._predict = self._interpreter.get_signature_runner(signature)

    def load(self, weights: Mapping[str, F32]) -> None:
        """Sets the dense weights, named as in the model. Raises ProgramError if they do not fit."""
        load = self._interpreter.get_signature_runner("load")
        load(**load_arguments(weights, load.get_input_details()))

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, F32]:
        """Computes the outputs of `Ranker.predict`."""
        outputs: dict[str, F32] = self._predict(**inputs)
        return outputs


def check_parity(
    content: bytes, weights: Mapping[str, F32], predict: Predict, inputs: Mapping[str, F32], subject: str
) -> float:
    """The largest difference between program and model on `inputs`, relative to 1 + the model's value.

    Args:
        content: The program.
        weights: The model's dense weights, by name.
        predict: The model.
        inputs: Inputs of serving, by name.
        subject: The source of the model, for the message.

    Raises:
        ProgramError: They differ by more than rounding, or the program gives finite outputs without weights.
    """
    program = Program(content)
    if np.isfinite(program.predict(inputs)["vector"]).all():
        raise ProgramError("the program answers before weights are loaded", "report this as a defect")
    program.load(weights)
    lowered = program.predict(inputs)
    largest = 0.0
    for name, expected in predict(inputs).items():
        error = difference(lowered[name], np.asarray(expected))
        if error > TOLERANCE:
            raise ProgramError(
                f"the program's {name} differs from the model's by {error:.2g} (allowed {TOLERANCE:g})",
                f"{subject} may use an operation that LiteRT computes otherwise",
            )
        largest = max(largest, error)
    return largest


def sample(model: Model, rows: int = 32, training: bool = False) -> dict[str, F32]:
    """Made-up inputs of serving, or of training: the same each time, with edge cases."""
    drawn = np.random.default_rng(7)
    inputs: dict[str, F32] = {}
    whole_inputs = {input_.name for input_ in model.inputs if input_.whole}
    for name, sizes in model.shapes(training).items():
        shape = [rows if size is None else size for size in sizes]
        if name in whole_inputs:
            values = drawn.integers(0, 300, shape).astype(np.float64)
            values.reshape(rows, -1)[0], values.reshape(rows, -1)[1] = 0, 65535
        elif name.endswith("_mask"):
            values = drawn.integers(0, 2, shape).astype(np.float64)
        else:
            values = drawn.normal(0.0, 0.1, shape)
        inputs[name] = values.astype(np.float32)
    return inputs
