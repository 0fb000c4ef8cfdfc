"""Lowers preprocessing and network to the one LiteRT program that serving runs.

The program has two signatures, made of LiteRT's built-in operations only:

    load(dense_...)   sets the dense weights; one argument per weight `dense.<name>`
                      of a version, with dots written as underscores
    predict(...)      the inputs and outputs of `Model.forward`

Weights are data: each version brings its own, the program stays the same. It
holds NaN until they are loaded, so that a forgotten `load` cannot pass for an
answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.errors import ProgramError
from state.lowering import TOLERANCE, difference, lower_saved_model
from state.ranking.transitions import COLUMNS, SUCCESSORS
from trainer.model.network import Model

F32 = npt.NDArray[np.float32]


def argument(name: str) -> str:
    """The argument of `load` for the weight `dense.<name>`.

    >>> argument("tower.kernel_0")
    'dense_tower_kernel_0'
    """
    return f"dense.{name}".replace(".", "_")


def preprocessing_of(transform: Path) -> Callable[[Any], Any]:
    """The preprocessing that the bootstrap analysed, `[B, D]` to `[B, D']` float32.

    TensorFlow Transform wrote a plain SavedModel: neither it nor Beam is needed here.
    """
    loaded = tf.saved_model.load(str(transform / "transform_fn"))

    class Preprocessing(tf.Module):
        """Holds the loaded graph, so that whoever saves the model saves its constants."""

        def __init__(self) -> None:
            super().__init__(name="preprocessing")
            self.graph = loaded

        def __call__(self, x: Any) -> Any:
            """`[B, D]` float32 raw integers to `[B, D']` float32."""
            return self.graph.transform_fn({"features": x})["features"]

    return Preprocessing()


def lower(model: Model) -> bytes:
    """The LiteRT program of `model`; its weights are as they were when this returns.

    Raises:
        ProgramError: An operation has no LiteRT counterpart; the message names it.
    """
    module = tf.Module()
    module.model = model
    inputs = _inputs(model)
    weights = {
        argument(name): tf.TensorSpec(variable.shape, tf.float32, argument(name))
        for name, variable in model.dense.items()
    }

    def predict(**given: Any) -> Any:
        return model.forward(given)

    def load(**given: Any) -> Any:
        for name, variable in model.dense.items():
            variable.assign(given[argument(name)])
        return {"loaded": tf.constant(len(given))}

    with _filled_with_nan(model), tempfile.TemporaryDirectory(prefix="springtide-program-") as folder:
        signatures = {
            "predict": tf.function(predict, autograph=False).get_concrete_function(**inputs),
            "load": tf.function(load, autograph=False).get_concrete_function(**weights),
        }
        tf.saved_model.save(module, folder, signatures=signatures)
        return lower_saved_model(Path(folder), sorted(signatures), f"the model of {_own(model)}")


def _own(model: Model) -> str:
    """The settings whose functions a model is made of, for messages."""
    return f"model.tower {model.settings.tower!r} and model.preprocessing {model.settings.preprocessing!r}"


class Program:
    """A loaded program; for checks. Serving has its own, without TensorFlow."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_content=content, num_threads=1)
        self._predict = self._interpreter.get_signature_runner("predict")
        self._load = self._interpreter.get_signature_runner("load")

    def load(self, weights: Mapping[str, F32]) -> None:
        """Sets the dense weights, named as in the model."""
        self._load(**{argument(name): weight for name, weight in weights.items()})

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """Scores, as `Model.forward` does."""
        outputs: dict[str, F32] = self._predict(**inputs)
        return outputs


def check_parity(content: bytes, model: Model, inputs: Mapping[str, F32]) -> float:
    """The largest difference between program and model on `inputs`, relative to 1 + the model's value.

    Raises:
        ProgramError: They differ by more than rounding, or the program answers without weights.
    """
    program = Program(content)
    if np.isfinite(program.predict(inputs)["vector"]).all():
        raise ProgramError("the program answers before weights are loaded; report this as a defect")
    program.load(model.weights())
    ours, theirs = program.predict(inputs), model.forward({name: tf.constant(value) for name, value in inputs.items()})
    largest = 0.0
    for name, tensor in theirs.items():
        apart = difference(ours[name], tensor.numpy())
        if apart > TOLERANCE:
            raise ProgramError(
                f"the program's {name} differs from the model's by {apart:.2g} (allowed {TOLERANCE:g}); "
                f"{_own(model)} may use an operation that LiteRT computes otherwise"
            )
        largest = max(largest, apart)
    return largest


def sample(model: Model, rows: int = 32) -> dict[str, F32]:
    """Made-up inputs for the parity check, the same each time, corners included."""
    drawn = np.random.default_rng(7)
    made: dict[str, F32] = {}
    for name, spec in _inputs(model).items():
        shape = [rows if size is None else size for size in spec.shape]
        if name == "features" or name.endswith(("_windows", "_next")):
            values = drawn.integers(0, 300, shape).astype(np.float64)
            values.reshape(rows, -1)[0], values.reshape(rows, -1)[1] = 0, 65535
        elif name.endswith("_mask"):
            values = drawn.integers(0, 2, shape).astype(np.float64)
        else:
            values = drawn.normal(0.0, 0.1, shape)
        made[name] = values.astype(np.float32)
    return made


def build(model: Model) -> bytes:
    """Lowers and checks: the program to publish.

    Raises:
        ProgramError: The model does not lower, or the program answers otherwise than the model.
    """
    content = lower(model)
    check_parity(content, model, sample(model))
    return content


def _inputs(model: Model) -> dict[str, Any]:
    """Types of the inputs of `Model.forward`, by name; B is open."""
    dim, popular = model.settings.dim, model.settings.popular
    shapes: dict[str, list[int | None]] = {
        "features": [None, model.features],
        "user_row": [None, dim],
        "context_row": [None, dim],
        "item_row": [None, dim],
        "category_row": [None, dim],
        "recent_rows": [None, model.recent_categories, dim],
        "category_windows": [None, model.recent_categories, model.window_width],
        "recent_next": [None, model.recent_categories, len(COLUMNS)],
        "recent_mask": [None, model.recent_categories],
        "popular_rows": [popular, dim],
        "popular_mask": [None, popular],
        "popular_next": [None, popular, len(COLUMNS)],
        "successor_rows": [None, SUCCESSORS, dim],
        "successor_mask": [None, SUCCESSORS],
        "successor_next": [None, SUCCESSORS, len(COLUMNS)],
        "cross": [None],
    }
    return {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in shapes.items()}


@contextmanager
def _filled_with_nan(model: Model) -> Iterator[None]:
    held = model.weights()
    model.set_weights({name: np.full_like(weight, np.nan) for name, weight in held.items()})
    try:
        yield
    finally:
        model.set_weights(held)
