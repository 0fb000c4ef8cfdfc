"""The signature `serving_default` of a SavedModel: what serving answered about named users and items at one moment.

Histories, and the salt that users' ids are hidden with, stay where they are:
the model holds answers, each of them serving's own (`deploy/serving/known_answers.py`
writes them). Everybody else is answered as a user of whom nothing is known.
What it cannot know (another time, an item or a category that was not named) is
refused and not guessed.
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
    """Answers by id.

    Args:
        content: An `.npz` file with `user_ids` `[U]` and `item_ids` `[I]` (bytes), `at_ms`, `engagements` `[U + 1, I]`
            float32, and as `outputs.<name>` `[U + 1, ...]` what serving says without an item; row 0 is of nobody.

    Attributes:
        users: How many there are.
        items: Likewise.
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
        """The function of `user_id`, and where wanted `item`, `category` and `at`, each one a row."""
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
        # One that is left out has one value for all rows.
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
    """Strings as TensorFlow takes them."""
    return values.astype(np.object_) if values.dtype.kind == "S" else values


def _places(keys: npt.NDArray[np.bytes_], first: int, other: int, last: int | None = None) -> Any:
    """A table from keys to places in their order.

    Args:
        keys: `[n]` bytes, each once.
        first: The place of the first one.
        other: The place of every key that is not there.
        last: The place of the last one, where it is out of order.
    """
    places = np.arange(first, first + len(keys), dtype=np.int64)
    if last is not None:
        places[-1] = last
    # A table of no key cannot be made.
    given = (keys, places) if len(keys) else (np.array([b"\0"]), np.array([other], np.int64))
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(_plain(given[0])), tf.constant(given[1]))
    return tf.lookup.StaticHashTable(initializer, other)
