"""A LiteRT program with the two signatures of the model: `load(weights)` and `predict(inputs)`.

The program is shipped once; weights are data of each version and take some
tens of microseconds to load. No TensorFlow is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from state.errors import CorruptVersion, ProgramError

Arrays = Mapping[str, NDArray[Any]]


def argument(name: str) -> str:
    """The argument of `load` for the weight `dense.<name>` of a version.

    >>> argument("tower.kernel_0")
    'dense_tower_kernel_0'
    """
    return f"dense.{name}".replace(".", "_")


def read_program(path: Path) -> bytes:
    """The bytes of a program file whose name is its SHA-256.

    Raises:
        CorruptVersion: It is missing or fails its digest.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptVersion(f"the program {path} is missing; the applier copies it from the registry") from None
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise CorruptVersion(f"the program {path} fails its digest; remove the file, and the applier copies it again")
    return data


class Program:
    """One interpreter; use it in one thread.

    Args:
        data: The bytes of a `.tflite` file.

    Raises:
        ProgramError: It is no program, or lacks a signature.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._interpreter = Interpreter(model_content=data, num_threads=1)
            self._load = self._interpreter.get_signature_runner("load")
            self._predict = self._interpreter.get_signature_runner("predict")
        except (ValueError, RuntimeError) as error:
            raise ProgramError(
                f"a program of {len(data)} bytes cannot be run ({error}); restart the trainer to lower the model again"
            ) from error
        self._weights = sorted(self._load.get_input_details())
        self.shapes = {
            name: tuple(int(size) for size in details["shape_signature"])
            for name, details in self._predict.get_input_details().items()
        }

    def load(self, weights: Arrays) -> None:
        """Sets the dense weights; `predict` gives NaN before the first load.

        Raises:
            ProgramError: A weight is missing.
        """
        given = {argument(name): value for name, value in weights.items()}
        missing = sorted(name for name in self._weights if name not in given)
        if missing:
            raise ProgramError(f"the version has no dense weights {', '.join(missing)}, which its program wants; roll back")
        try:
            self._load(**{name: given[name] for name in self._weights})
        except (ValueError, RuntimeError) as error:
            raise ProgramError(f"the version's dense weights do not fit its program ({error}); roll back") from error

    def predict(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs `predict`; inputs and outputs by name, float32, batch first."""
        outputs: dict[str, NDArray[np.float32]] = self._predict(**inputs)
        return outputs
