"""The signatures of the TensorFlow Serving API: inputs and outputs as tensors with types and shapes.

serving_default   users by id: serving looks up histories, windows and rows
raw               the program's own inputs, with the names in the version's graph
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.candidates import KINDS
from deploy.serving.loaded_version import LoadedVersion
from state.errors import BadRequest

BY_ID, RAW = "serving_default", "raw"
CONTEXT = "context."
NOW = -1
"""The default value of `at`: the current time."""

Tensor = NDArray[Any]
Tensors = Mapping[str, Tensor]
"""Tensors by name; strings are bytes in object arrays."""


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of one input or output.

    Attributes:
        dtype: The NumPy type string; `O` for strings.
        shape: The shape, with -1 for any size; the first dimension is the number of rows.
        default: The value for each row if an optional input is missing; None for a required input.
    """

    dtype: str
    shape: tuple[int, ...]
    default: bytes | int | None = None


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one signature.

    Attributes:
        inputs: The inputs by name, required ones first.
        outputs: The outputs by name.
        kept: Inputs without a row dimension for which the version has a value, by name.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    kept: Tensors = field(default_factory=dict)

    def required(self) -> list[str]:
        """Returns the names of required inputs."""
        return [name for name, one in self.inputs.items() if one.default is None and name not in self.kept]


def signatures_of(version: LoadedVersion, context_fields: Sequence[str]) -> dict[str, Signature]:
    """Returns the signatures of a version by name."""
    return {BY_ID: _by_id(version, context_fields), RAW: _raw(version)}


def _by_id(version: LoadedVersion, context_fields: Sequence[str]) -> Signature:
    shapes = version.program.shapes
    candidates = sum(shapes[f"{kind}_mask"][1] for kind in KINDS if f"{kind}_mask" in shapes)
    text, optional = TensorSpec("O", (-1,)), TensorSpec("O", (-1,), b"")
    inputs = {"user_id": text, "item": optional, "category": optional, "at": TensorSpec("<i8", (-1,), NOW)}
    outputs = {
        "interest_labels": TensorSpec("O", (-1, candidates)),
        "interest_ids": TensorSpec("O", (-1, candidates)),
        "interest_probabilities": TensorSpec("<f4", (-1, candidates)),
        "engagement": TensorSpec("<f4", (-1,)),
        "vector": TensorSpec("<f4", version.program.outputs["vector"]),
        "known": TensorSpec("|b1", (-1,)),
        "at": TensorSpec("<i8", (-1,)),
    }
    return Signature(inputs | {CONTEXT + name: optional for name in context_fields}, outputs)


def _raw(version: LoadedVersion) -> Signature:
    program = version.program
    kept = {"popular_rows": version.popular_rows, **version.own_popular}
    return Signature(
        {name: TensorSpec("<f4", shape) for name, shape in sorted(program.shapes.items(), key=lambda one: one[1][0])},
        {name: TensorSpec("<f4", shape) for name, shape in sorted(program.outputs.items())},
        {name: value for name, value in kept.items() if name in program.shapes},
    )


def require(signature: Signature, inputs: Tensors) -> int:
    """Checks inputs against a signature, and returns their number of rows.

    Raises:
        BadRequest: A name is unknown or missing, a tensor has a wrong type, shape or number of rows, or there are no
            rows.
    """
    known = ", ".join(signature.inputs)
    rows: int | None = None
    for name, given in inputs.items():
        spec = signature.inputs.get(name)
        if spec is None:
            raise BadRequest(f"there is no input {name[:100]!r}", f"give {known}")
        if np.dtype(spec.dtype) != given.dtype:
            raise BadRequest(f"the input {name!r} is of type {given.dtype}", f"give {np.dtype(spec.dtype)}")
        fits = len(given.shape) == len(spec.shape) and all(
            wanted in (-1, size) for wanted, size in zip(spec.shape, given.shape, strict=True)
        )
        if not fits:
            raise BadRequest(f"the input {name!r} has the shape {list(given.shape)}", f"give {list(spec.shape)}")
        if spec.shape[0] < 0:
            if rows not in (None, len(given)):
                raise BadRequest(f"the input {name!r} has {len(given)} rows and others have {rows}", "give as many")
            rows = len(given)
    missing = [name for name in signature.required() if name not in inputs]
    if missing:
        raise BadRequest(f"the input {missing[0]!r} is missing", f"give it; the inputs are {known}")
    if not rows:
        raise BadRequest("the request asks for no row", "give at least one")
    return rows
