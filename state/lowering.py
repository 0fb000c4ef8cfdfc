"""Lowers a TensorFlow SavedModel to a LiteRT program of built-in operations, and compares outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from state.errors import ProgramError

F32 = npt.NDArray[np.float32]
Quantize = Literal["none", "float16", "int8"]
TOLERANCE = 1e-4
"""Largest difference between two ways to compute a score, relative to 1 + its value: LiteRT and TensorFlow, or a row alone
and in a batch. CPUs sum in different orders: 2e-5 was measured."""


def argument(name: str) -> str:
    """The argument name for the weight `dense.<name>` in a program's signature `load`."""
    return f"dense.{name}".replace(".", "_")


def load_arguments(weights: Mapping[str, F32], details: Mapping[str, Mapping[str, Any]]) -> dict[str, F32]:
    """The arguments of a program's signature `load`, by name.

    LiteRT does not check shapes: a wrong one ends the process.

    Args:
        weights: Dense weights, by name.
        details: What LiteRT says of the inputs of `load`.

    Raises:
        ProgramError: A weight is missing, or has another shape than the program's.
    """
    arguments = {argument(name): weight for name, weight in weights.items()}
    missing = sorted(name for name in details if name not in arguments)
    if missing:
        raise ProgramError(
            f"the version has no dense weights {', '.join(missing)}, which its program wants", "roll back"
        )
    for name, detail in details.items():
        wanted, shape = tuple(int(size) for size in detail["shape"]), np.shape(arguments[name])
        if shape != wanted:
            raise ProgramError(
                f"the version's dense weights {name} have shape {list(shape)}, and its program wants {list(wanted)}",
                "roll back",
            )
    return {name: arguments[name] for name in details}


def lower_saved_model(
    folder: Path, signatures: Sequence[str], subject: str, frozen: bool = False, quantize: Quantize = "none"
) -> bytes:
    """The LiteRT program of a SavedModel's signatures.

    Args:
        folder: The SavedModel.
        signatures: Names of signatures.
        subject: The source of the model, for the message, such as `model.tower 'shop:build'`.
        frozen: Whether variables become constants; otherwise they stay variables that a signature sets.
        quantize: How constants are stored: `none` unchanged, `float16` with half the bits, `int8` as integers where the
            operation that reads them computes with integers.

    Raises:
        ProgramError: An operation has no LiteRT counterpart; the message names it.
    """
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=sorted(signatures))
    converter.experimental_enable_resource_variables = not frozen
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantize != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    try:
        return bytes(converter.convert())
    # The converter raises several types, none of them public.
    except Exception as error:
        text = str(error).strip()
        named = re.findall(r"'(tf\.[A-Z]\w+)' op is neither", text) or re.findall(r"\btf\.[A-Z]\w+", text)
        missing = ", ".join(sorted(set(named))) or text.partition("\n")[0] or "counterpart of some operation"
        raise ProgramError(
            f"{subject} does not lower to LiteRT: it has no {missing}", "use operations that LiteRT has built in"
        ) from error


def run_lowered(content: bytes, signature: str, inputs: Mapping[str, Any]) -> dict[str, F32]:
    """Runs one signature of a program once; returns its outputs."""
    from ai_edge_litert.interpreter import Interpreter

    # A runner does not keep its interpreter alive, so this holds a reference.
    interpreter = Interpreter(model_content=content, num_threads=1)
    outputs: dict[str, F32] = interpreter.get_signature_runner(signature)(**inputs)
    return outputs


def difference(actual: F32, expected: F32) -> float:
    """The largest difference, relative to 1 + the expected value; infinite if a value is NaN."""
    error = np.abs(actual.astype(np.float64) - expected) / (1.0 + np.abs(expected))
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
