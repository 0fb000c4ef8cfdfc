"""The signature `serving_default` of a SavedModel: serving's answers about named users and items at one moment.

The model holds answers only; histories and the salt of the users' pseudonyms are not exported.
`deploy/serving/answers/known_answers.py` asks serving for the answers and writes them. Any other user gets the answer
for an unknown user. Requests that the model cannot answer (another time, an item or a category that was not named) fail.
"""

from __future__ import annotations

import inspect
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

BY_ID = "serving_default"
NOW = -1

Tensor = Any


class KnownAnswers(tf.Module):
    """Looks up answers by raw id.

    Args:
        content: An `.npz` file with `user_ids` `[U]` and `item_ids` `[I]` (bytes), `at_ms`, `engagements` `[U + 1, I]`
            float32, and as `outputs.<name>` `[U + 1, ...]` serving's outputs without an item. Row 0 is an unknown user.

    Attributes:
        users: The number of users.
        items: The number of items.
        at_ms: The time that all answers are for.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(name="known_answers")
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            users, items = held["user_ids"], held["item_ids"]
            self.users, self.items, self.at_ms = len(users), len(items), int(held["at_ms"])
            nothing = np.full((self.users + 1, 1), np.nan, np.float32)
            self._engagements = tf.constant(np.concatenate([nothing, held["engagements"]], 1))
            self._outputs = {
                name.removeprefix("outputs."): tf.constant(_plain(held[name]))
                for name in held.files
                if name.startswith("outputs.")
            }
        self._user_places, self._item_places = _places(users, 1, 0), _places(np.append(items, b""), 1, -1, last=0)

    def signature(self) -> Any:
        """The function of `user_id`, with optional `item`, `category` and `at`, one value a row."""
        optional = {"item": tf.constant([b""]), "category": tf.constant([b""]), "at": tf.constant([NOW], tf.int64)}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("user_id", kind)]
        parameters += [inspect.Parameter(name, kind, default=value) for name, value in optional.items()]

        def answer(*given: Tensor) -> dict[str, Tensor]:
            return self._answer(*given)

        answer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        specs = [tf.TensorSpec([None], tf.string, "user_id")]
        specs += [tf.TensorSpec([None], value.dtype, name) for name, value in optional.items()]
        return tf.function(answer, autograph=False, input_signature=specs)

    def _answer(self, user: Tensor, item: Tensor, category: Tensor, at: Tensor) -> dict[str, Tensor]:
        rows = tf.shape(user)
        # An omitted input has one value for all rows.
        item, at = tf.broadcast_to(item, rows), tf.broadcast_to(at, rows)
        place, column = self._user_places.lookup(user), self._item_places.lookup(item)
        checks = [
            tf.debugging.Assert(tf.reduce_all((at == NOW) | (at == self.at_ms)), [f"this model answers for {self.at_ms} ms only, at =", at]),
            tf.debugging.Assert(tf.reduce_all(column >= 0), ["this model knows the items that it was exported with only, item =", item]),
            tf.debugging.Assert(tf.reduce_all(category == b""), ["this model takes each item's own category, category =", category]),
        ]  # fmt: skip
        with tf.control_dependencies(checks):
            found = {name: tf.gather(value, place) for name, value in self._outputs.items()}
            engaged = tf.gather_nd(self._engagements, tf.stack([place, column], 1))
            return found | {"engagement": engaged, "at": tf.fill(rows, tf.constant(self.at_ms, tf.int64))}


def _plain(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Converts byte strings to the object arrays that TensorFlow accepts."""
    return values.astype(np.object_) if values.dtype.kind == "S" else values


def _places(keys: npt.NDArray[np.bytes_], first: int, other: int, last: int | None = None) -> Any:
    """A lookup table from keys to consecutive indices.

    Args:
        keys: `[n]` bytes, each once.
        first: The index of the first key.
        other: The value for every other key.
        last: The index of the last key, if it is out of order.
    """
    places = np.arange(first, first + len(keys), dtype=np.int64)
    if last is not None:
        places[-1] = last
    # TensorFlow cannot create a table without keys.
    given = (keys, places) if len(keys) else (np.array([b"\0"]), np.array([other], np.int64))
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(_plain(given[0])), tf.constant(given[1]))
    return tf.lookup.StaticHashTable(initializer, other)
