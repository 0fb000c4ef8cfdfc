"""Writes a ranker with a version's weights as a SavedModel that TensorFlow Serving loads.

    <folder>/<version>/saved_model.pb, variables/     the signature `raw`, as serving offers it, and, if
                                                      users are named, `serving_default` (`known_answers.py`)
    <folder>/<version>/assets.extra/tf_serving_warmup_requests

A complete version appears by one rename. TensorFlow Serving ignores names that
are not numbers, so it never sees a version that is being written.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from state.disk import files as durable
from trainer.exporting.known_answers import BY_ID, KnownAnswers
from trainer.model.ranker import Ranker
from trainer.versions.program import sample

MODEL, RAW = "profile", "raw"
"""The name of the model in serving, and the signature that takes the program's own inputs."""

WARM_UP = Path("assets.extra") / "tf_serving_warmup_requests"
WARM_UP_ROWS = (1, 16)
F32 = npt.NDArray[np.float32]


def raw_signature(ranker: Ranker, kept: Mapping[str, F32]) -> Any:
    """`Ranker.predict` as a function in which the inputs of `kept` are optional.

    Args:
        ranker: With the version's weights.
        kept: Default values, by name, of inputs that do not depend on the batch row.
    """
    specs = ranker.specs()
    # Inputs with a default come last, as in every Python signature.
    names = [*(name for name in specs if name not in kept), *kept]

    def predict(*given: Any) -> Any:
        return ranker.predict(dict(zip(names, given, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, kind, default=tf.constant(kept[name]) if name in kept else inspect.Parameter.empty)
        for name in names
    ]
    predict.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return tf.function(predict, autograph=False, input_signature=[specs[name] for name in names])


def warm_up_requests(ranker: Ranker, version: int) -> list[bytes]:
    """Requests, on made-up rows, that TensorFlow Serving runs before it reports a version as available."""
    found = []
    for rows in WARM_UP_ROWS:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = MODEL, RAW
        request.model_spec.version.value = version
        for name, value in sample(ranker, max(rows, 2)).items():
            by_row = ranker.specs()[name].shape[0] is None
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value[:rows] if by_row else value))
        log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
        found.append(log.SerializeToString())
    return found


def write(
    folder: Path, version: int, ranker: Ranker, kept: Mapping[str, F32], known: KnownAnswers | None = None
) -> Path:
    """Writes a version to a temporary directory next to the others, and returns that directory.

    Args:
        folder: The directory of all versions.
        version: Its number.
        ranker: With the version's weights.
        kept: As for `raw_signature`.
        known: Answers by id; None for none.
    """
    writing = folder / f".writing-{version}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    module = tf.Module()
    module.model, module.known = ranker, known
    signatures = {RAW: raw_signature(ranker, kept)} | ({BY_ID: known.signature()} if known is not None else {})
    tf.saved_model.save(module, str(writing), signatures=signatures)
    warm_up = writing / WARM_UP
    warm_up.parent.mkdir()
    with tf.io.TFRecordWriter(str(warm_up)) as records:
        for request in warm_up_requests(ranker, version):
            records.write(request)
    return writing


def publish(writing: Path, version: int) -> Path:
    """Makes a written version durable, renames it to its final name, and returns its path."""
    final = writing.with_name(str(version))
    durable.sync_tree(writing)
    writing.rename(final)
    durable.sync_directory(final.parent)
    return final


def sweep(folder: Path) -> None:
    """Removes unfinished writes and removals of a process that died. The caller must hold the folder's lock."""
    for path in (*folder.glob(".writing-*"), *folder.glob(".removed-*")):
        shutil.rmtree(path)


def keep_newest(folder: Path, count: int) -> list[int]:
    """Removes all versions but the newest `count`, each by one rename; returns the removed ones."""
    numbers = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    for number in numbers[count:]:
        remove(folder / str(number))
    return numbers[count:]


class Exported:
    """An exported version, loaded by TensorFlow from its directory."""

    def __init__(self, path: Path) -> None:
        # A signature function does not keep its model alive, so a reference is held here.
        self._model = tf.saved_model.load(str(path))
        self._raw = self._model.signatures[RAW]

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, F32]:
        """The outputs of the signature `raw`."""
        given = {name: tf.constant(value) for name, value in inputs.items()}
        return {name: np.asarray(value.numpy()) for name, value in self._raw(**given).items()}


def bytes_of(path: Path) -> int:
    """The total size of a version's files."""
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def remove(path: Path) -> None:
    """Removes a version; one rename makes it disappear."""
    grave = path.with_name(f".removed-{path.name}")
    path.rename(grave)
    shutil.rmtree(grave)
