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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from state.lowering import argument, lower_saved_model
from trainer.model.default_ranker import DefaultRanker
from trainer.model.ranker import Ranker
from trainer.versions.program import check_parity, sample


def build(ranker: Ranker) -> bytes:
    """Lowers a ranker, checks the program and returns it.

    Raises:
        ProgramError: The model does not lower, or the outputs of program and model differ.
    """
    content = lower(ranker)
    check_parity(content, ranker.weights(), partial(answers, ranker), sample(ranker), own(ranker))
    return content


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
        return lower_saved_model(Path(folder), sorted(signatures), f"the model of {own(ranker)}")


def answers(ranker: Ranker, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of `Ranker.predict` for arrays."""
    outputs = ranker.predict({name: tf.constant(value) for name, value in inputs.items()})
    return {name: output.numpy() for name, output in outputs.items()}


def own(ranker: Ranker) -> str:
    """The settings that name the model's functions, for messages."""
    if isinstance(ranker, DefaultRanker):
        return f"model.tower {ranker.settings.tower!r} and model.preprocessing {ranker.settings.preprocessing!r}"
    return ranker.origin or type(ranker).__name__


@contextmanager
def _filled_with_nan(ranker: Ranker) -> Iterator[None]:
    weights = ranker.weights()
    ranker.set_weights({name: np.full_like(weight, np.nan) for name, weight in weights.items()})
    try:
        yield
    finally:
        ranker.set_weights(weights)
