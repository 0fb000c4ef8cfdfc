"""Lowers preprocessing and network to the LiteRT program that serving runs.

The program has two signatures, made of LiteRT's built-in operations only:

    load(dense_...)   sets the dense weights; one argument per weight `dense.<name>`
                      of a version, with dots written as underscores
    predict(...)      the inputs of a ranker without those of training, and the outputs of `Ranker.predict`

Weights are data: each version has its own, and the program stays the same. It holds
NaN until weights are loaded, so that a forgotten `load` is noticed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.config.settings import Settings
from state.errors import CorruptVersion, ProgramError
from state.features.spec import FeatureSpec
from state.lowering import TOLERANCE, argument, difference, lower_saved_model
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.specs import Specs
from trainer import device
from trainer.engine.making import trainer_of
from trainer.engine.step import Trainer
from trainer.group import Group
from trainer.model.default_ranker import DefaultRanker
from trainer.model.ranker import Ranker

F32 = npt.NDArray[np.float32]


def preprocessing_of(transform: Path) -> Callable[[Any], Any]:
    """The preprocessing that the bootstrap analysed, `[B, D]` to `[B, D']` float32.

    TensorFlow Transform wrote a plain SavedModel, so neither it nor Beam is needed here.
    """
    loaded = tf.saved_model.load(str(transform / "transform_fn"))

    class Preprocessing(tf.Module):
        """Holds the loaded graph, so that a saved model includes its constants."""

        def __init__(self) -> None:
            super().__init__(name="preprocessing")
            self.graph = loaded

        def __call__(self, x: Any) -> Any:
            """`[B, D]` float32 raw integers to `[B, D']` float32."""
            return self.graph.transform_fn({"features": x})["features"]

    return Preprocessing()


def bootstrapped_trainer(settings: Settings, specs: Specs, group: Group | None) -> Trainer:
    """See `trainer_of`; behind the preprocessing that the bootstrap of the settings' feature spec analysed."""
    # Threads are fixed before TensorFlow's first operation, which loading the graph is.
    device.prepare(settings.trainer.device, settings.trainer.threads)
    spec = FeatureSpec.from_settings(settings)
    name = specs.bootstrapped(spec.digest, settings.model) or spec.digest
    return trainer_of(settings, spec, preprocessing_of(specs.transform(name)), group)


def lower(ranker: Ranker) -> bytes:
    """The LiteRT program of `ranker`."""
    module = tf.Module()
    module.model = ranker
    inputs = ranker.specs()
    weights = {
        argument(name): tf.TensorSpec(variable.shape, tf.float32, argument(name))
        for name, variable in ranker.dense.items()
    }

    def predict(**inputs: Any) -> Any:
        return ranker.predict(inputs)

    def load(**weights: Any) -> Any:
        for name, variable in ranker.dense.items():
            variable.assign(weights[argument(name)])
        return {"loaded": tf.constant(len(weights))}

    with _filled_with_nan(ranker), tempfile.TemporaryDirectory(prefix="springtide-program-") as folder:
        signatures = {
            "predict": tf.function(predict, autograph=False).get_concrete_function(**inputs),
            "load": tf.function(load, autograph=False).get_concrete_function(**weights),
        }
        tf.saved_model.save(module, folder, signatures=signatures)
        return lower_saved_model(Path(folder), sorted(signatures), f"the model of {_own(ranker)}")


def _own(ranker: Ranker) -> str:
    """The settings that name the model's functions, for messages."""
    if isinstance(ranker, DefaultRanker):
        return f"model.tower {ranker.settings.tower!r} and model.preprocessing {ranker.settings.preprocessing!r}"
    return ranker.origin or type(ranker).__name__


class Program:
    """A loaded program, of which `predict` runs one signature, for checks. Serving has its own class, without TensorFlow."""

    def __init__(self, content: bytes, signature: str = "predict") -> None:
        from ai_edge_litert.interpreter import Interpreter

        # A runner does not keep its interpreter alive, so a reference is held here.
        self._interpreter = Interpreter(model_content=content, num_threads=1)
        self._predict = self._interpreter.get_signature_runner(signature)

    def load(self, weights: Mapping[str, F32]) -> None:
        """Sets the dense weights, named as in the model."""
        load = self._interpreter.get_signature_runner("load")
        load(**{argument(name): weight for name, weight in weights.items()})

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, F32]:
        """Computes the outputs of `Ranker.predict`."""
        outputs: dict[str, F32] = self._predict(**inputs)
        return outputs


def check_parity(content: bytes, ranker: Ranker, inputs: Mapping[str, F32]) -> float:
    """The largest difference between program and model on `inputs`, relative to 1 + the ranker's value.

    Raises:
        ProgramError: They differ by more than rounding, or the program gives finite outputs without weights.
    """
    program = Program(content)
    if np.isfinite(program.predict(inputs)["vector"]).all():
        raise ProgramError("the program answers before weights are loaded", "report this as a defect")
    program.load(ranker.weights())
    lowered = program.predict(inputs)
    expected = ranker.predict({name: tf.constant(value) for name, value in inputs.items()})
    largest = 0.0
    for name, tensor in expected.items():
        error = difference(lowered[name], tensor.numpy())
        if error > TOLERANCE:
            raise ProgramError(
                f"the program's {name} differs from the model's by {error:.2g} (allowed {TOLERANCE:g})",
                f"{_own(ranker)} may use an operation that LiteRT computes otherwise",
            )
        largest = max(largest, error)
    return largest


def sample(ranker: Ranker, rows: int = 32, training: bool = False) -> dict[str, F32]:
    """Made-up inputs of serving, or of training: the same each time, with edge cases."""
    drawn = np.random.default_rng(7)
    inputs: dict[str, F32] = {}
    whole_inputs = {input_.name for input_ in ranker.inputs if input_.whole}
    for name, spec in ranker.specs(training).items():
        shape = [rows if size is None else size for size in spec.shape]
        if name in whole_inputs:
            values = drawn.integers(0, 300, shape).astype(np.float64)
            values.reshape(rows, -1)[0], values.reshape(rows, -1)[1] = 0, 65535
        elif name.endswith("_mask"):
            values = drawn.integers(0, 2, shape).astype(np.float64)
        else:
            values = drawn.normal(0.0, 0.1, shape)
        inputs[name] = values.astype(np.float32)
    return inputs


def build(ranker: Ranker) -> bytes:
    """Lowers a ranker, checks the program and returns it.

    Raises:
        ProgramError: The model does not lower, or the outputs of program and model differ.
    """
    content = lower(ranker)
    check_parity(content, ranker, sample(ranker))
    return content


def program_of(
    registry: Registry, version: Manifest | None, spec: str, environment: Mapping[str, str], ranker: Ranker
) -> str:
    """The name of the ranker's program in the registry.

    Lowering takes seconds, so the program of `version` is reused where possible: that version was trained with this
    feature spec and in this environment, and its program still computes the ranker's outputs.
    """
    if version is not None and (version.spec, version.environment) == (spec, environment):
        with suppress(ProgramError, CorruptVersion):
            check_parity(registry.specs.program(version.program), ranker, sample(ranker))
            return version.program
    return registry.specs.add_program(build(ranker))


@contextmanager
def _filled_with_nan(ranker: Ranker) -> Iterator[None]:
    weights = ranker.weights()
    ranker.set_weights({name: np.full_like(weight, np.nan) for name, weight in weights.items()})
    try:
        yield
    finally:
        ranker.set_weights(weights)
