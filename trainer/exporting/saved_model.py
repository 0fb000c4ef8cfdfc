"""A ranker with the weights of a version as TensorFlow Serving loads it.

    <folder>/<version>/saved_model.pb, variables/     the signature `raw`, as serving offers it, and, where
                                                      users are named, `serving_default` (`known_answers.py`)
    <folder>/<version>/assets.extra/tf_serving_warmup_requests

A version appears by one rename, whole; TensorFlow Serving passes over names
that are no numbers, so that it never sees one that is being written.
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
"""What serving calls the model, and the signature that takes the program's own inputs."""

WARM_UP = Path("assets.extra") / "tf_serving_warmup_requests"
WARM_UP_ROWS = (1, 16)
F32 = npt.NDArray[np.float32]


def raw_signature(ranker: Ranker, kept: Mapping[str, F32]) -> Any:
    """`Ranker.predict` as a function whose inputs of `kept` may be left out.

    Args:
        ranker: With the version's weights.
        kept: Values of inputs that are no row's own, by name.
    """
    specs = ranker.specs()
    # What has a default comes last, as in every signature of Python.
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
    """Requests that TensorFlow Serving asks before it says that a version is there, of made-up rows."""
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
    """Writes a version beside the others, under a name that nobody loads; returns that directory.

    Args:
        folder: Of all versions.
        version: Its number.
        ranker: With its weights.
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
    """Gives what was written its place, durable and complete; returns it."""
    final = writing.with_name(str(version))
    durable.sync_tree(writing)
    writing.rename(final)
    durable.sync_directory(final.parent)
    return final


def sweep(folder: Path) -> None:
    """Removes what was being written, or removed, by a process that died; only for the one that holds the folder's lock."""
    for path in (*folder.glob(".writing-*"), *folder.glob(".removed-*")):
        shutil.rmtree(path)


def keep_newest(folder: Path, count: int) -> list[int]:
    """Removes all versions but the newest ones, each by one rename; returns those that went.

    Args:
        folder: Of all versions.
        count: How many stay.
    """
    numbers = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    for number in numbers[count:]:
        remove(folder / str(number))
    return numbers[count:]


class Exported:
    """A version as TensorFlow loads it.

    Args:
        path: Its directory.
    """

    def __init__(self, path: Path) -> None:
        # A function does not keep its model alive.
        self._model = tf.saved_model.load(str(path))
        self._raw = self._model.signatures[RAW]

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, F32]:
        """The outputs of `raw`."""
        given = {name: tf.constant(value) for name, value in inputs.items()}
        return {name: np.asarray(value.numpy()) for name, value in self._raw(**given).items()}


def bytes_of(path: Path) -> int:
    """The size of all files of a version."""
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def remove(path: Path) -> None:
    """Takes a version away, by one rename."""
    grave = path.with_name(f".removed-{path.name}")
    path.rename(grave)
    shutil.rmtree(grave)
