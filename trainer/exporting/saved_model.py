"""Writes a ranker with a version's weights as a SavedModel that TensorFlow Serving loads.

    <folder>/<version>/saved_model.pb, variables/     the signature `raw`, as serving offers it, and, if
                                                      users are named, `serving_default` (`known_answers.py`)
    <folder>/<version>/assets.extra/tf_serving_warmup_requests

A complete version appears by one rename. TensorFlow Serving ignores names that
are not numbers, so it never sees a version that is being written.
"""

from __future__ import annotations

import inspect
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from state.disk import files as durable
from trainer.model.ranker import Ranker
from trainer.versions.program import sample

MODEL, RAW = "profile", "raw"
"""The name of the model in serving, and the signature that takes the program's own inputs."""

WARM_UP = Path("assets.extra") / "tf_serving_warmup_requests"
WARM_UP_ROWS = (1, 16)
F32 = npt.NDArray[np.float32]


def raw_signature(ranker: Ranker, kept: Mapping[str, F32]) -> Any:
    """`Ranker.predict` as a function in which the inputs of `kept`, which do not depend on the batch row, are optional."""
    specs = ranker.specs()
    # Inputs with a default come last, as in every Python signature.
    names = [*(name for name in specs if name not in kept), *kept]

    def predict(*values: Any) -> Any:
        return ranker.predict(dict(zip(names, values, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, kind, default=tf.constant(kept[name]) if name in kept else inspect.Parameter.empty)
        for name in names
    ]
    predict.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return tf.function(predict, autograph=False, input_signature=[specs[name] for name in names])


def _warm_up_requests(ranker: Ranker, version: int) -> list[bytes]:
    """Requests, on made-up rows, that TensorFlow Serving runs before it reports a version as available."""
    requests = []
    for rows in WARM_UP_ROWS:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = MODEL, RAW
        request.model_spec.version.value = version
        for name, value in sample(ranker, max(rows, 2)).items():
            by_row = ranker.specs()[name].shape[0] is None
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value[:rows] if by_row else value))
        log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
        requests.append(log.SerializeToString())
    return requests


def write(
    folder: Path, version: int, ranker: Ranker, kept: Mapping[str, F32], known: KnownAnswers | None = None
) -> Path:
    """Writes a version to a temporary directory next to the others, and returns that directory.

    `kept` are the default values of optional inputs, and `known` the answers by id.
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
        for request in _warm_up_requests(ranker, version):
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
        removed = folder / f".removed-{number}"
        (folder / str(number)).rename(removed)
        shutil.rmtree(removed)
    return numbers[count:]


BY_ID = "serving_default"
NOW = -1

Tensor = Any


class KnownAnswers(tf.Module):
    """Looks up answers by raw id.

    Args:
        content: An `.npz` file with `user_ids` `[U]` and `item_ids` `[I]` (bytes), `at_ms`, `engagements` `[U + 1, I]`
            float32, and as `outputs.<name>` `[U + 1, ...]` serving's outputs without an item. Row 0 is an unknown user.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(name="known_answers")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            users, items = arrays["user_ids"], arrays["item_ids"]
            self.users, self.items, self.at_ms = len(users), len(items), int(arrays["at_ms"])
            nothing = np.full((self.users + 1, 1), np.nan, np.float32)
            self._engagements = tf.constant(np.concatenate([nothing, arrays["engagements"]], 1))
            self._outputs = {
                name.removeprefix("outputs."): tf.constant(_plain(arrays[name]))
                for name in arrays.files
                if name.startswith("outputs.")
            }
        self._user_places, self._item_places = _places(users, 1, 0), _places(np.append(items, b""), 1, -1, last=0)

    def signature(self) -> Any:
        """The function of `user_id`, with optional `item`, `category` and `at`, one value a row."""
        optional = {"item": tf.constant([b""]), "category": tf.constant([b""]), "at": tf.constant([NOW], tf.int64)}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("user_id", kind)]
        parameters += [inspect.Parameter(name, kind, default=value) for name, value in optional.items()]

        def answer(*inputs: Tensor) -> dict[str, Tensor]:
            return self._answer(*inputs)

        answer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        specs = [tf.TensorSpec([None], tf.string, "user_id")]
        specs += [tf.TensorSpec([None], value.dtype, name) for name, value in optional.items()]
        return tf.function(answer, autograph=False, input_signature=specs)

    def _answer(self, user: Tensor, item: Tensor, category: Tensor, at: Tensor) -> dict[str, Tensor]:
        rows = tf.shape(user)
        # An omitted input has one value for all rows.
        item, at = tf.broadcast_to(item, rows), tf.broadcast_to(at, rows)
        row, column = self._user_places.lookup(user), self._item_places.lookup(item)
        checks = [
            tf.debugging.Assert(tf.reduce_all((at == NOW) | (at == self.at_ms)), [f"this model answers for {self.at_ms} ms only, at =", at]),
            tf.debugging.Assert(tf.reduce_all(column >= 0), ["this model knows the items that it was exported with only, item =", item]),
            tf.debugging.Assert(tf.reduce_all(category == b""), ["this model takes each item's own category, category =", category]),
        ]  # fmt: skip
        with tf.control_dependencies(checks):
            outputs = {name: tf.gather(value, row) for name, value in self._outputs.items()}
            engaged = tf.gather_nd(self._engagements, tf.stack([row, column], 1))
            return outputs | {"engagement": engaged, "at": tf.fill(rows, tf.constant(self.at_ms, tf.int64))}


def _plain(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Converts byte strings to the object arrays that TensorFlow accepts."""
    return values.astype(np.object_) if values.dtype.kind == "S" else values


def _places(keys: npt.NDArray[np.bytes_], first: int, other: int, last: int | None = None) -> Any:
    """A lookup table from keys to consecutive indices from `first` on; `other` for every other key.

    `last` is the index of the last key, if it is out of order.
    """
    indices = np.arange(first, first + len(keys), dtype=np.int64)
    if last is not None:
        indices[-1] = last
    # TensorFlow cannot create a table without keys.
    entries = (keys, indices) if len(keys) else (np.array([b"\0"]), np.array([other], np.int64))
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(_plain(entries[0])), tf.constant(entries[1]))
    return tf.lookup.StaticHashTable(initializer, other)


class Exported:
    """An exported version, loaded by TensorFlow from its directory."""

    def __init__(self, path: Path) -> None:
        # A signature function does not keep its model alive, so a reference is held here.
        self._model = tf.saved_model.load(str(path))
        self._raw = self._model.signatures[RAW]

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, F32]:
        """The outputs of the signature `raw`."""
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        return {name: np.asarray(value.numpy()) for name, value in self._raw(**tensors).items()}
