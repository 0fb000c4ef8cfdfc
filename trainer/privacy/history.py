"""The keyed digests that determine the noise of a record and the ledger's key.

    history   one digest over every record learned so far and the conditions of each
    line      the history at the record where the conditions last changed, with the new conditions

The noise of a record is a function of the key and of the history that includes the
record. The same noise is therefore added twice only to the same sum. The ledger
charges each period once per line. A restart that reads the same records under the
same conditions repeats history and line; anything else makes new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.microbatch.batch import MicroBatch
from trainer.privacy.place import NoisePlace

NAMES = ("history", "conditions", "line")
_BYTES = 32


class History:
    """The digests of one trainer; part of each version. They are keyed: without the key they reveal nothing about rows.

    Args:
        key: The secret key of the noise.

    Attributes:
        line: `[32]` bytes, the line of the last record; all zero before the first one.
    """

    def __init__(self, key: bytes) -> None:
        # BLAKE2b accepts keys of at most 64 bytes.
        self._key = hashlib.blake2b(key, digest_size=64, person=b"springtide past").digest()
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._history = self._conditions = self.line = bytes(_BYTES)

    def line_at(self, place: NoisePlace) -> bytes:
        """The line of the record that is learned next; has no side effects."""
        conditions = self._digest(place.conditions)
        return self.line if conditions == self._conditions else self._digest(self._history, conditions)

    def take(self, place: NoisePlace, batch: MicroBatch) -> str:
        """Appends a record; returns the name of its noise.

        Args:
            place: The record's position and conditions.
            batch: The rows that are learned from it.
        """
        self.line, self._conditions = self.line_at(place), self._digest(place.conditions)
        content = hashlib.blake2b(repr((batch.header.spec, batch.header.ranges)).encode())
        for name, column in batch.columns.items():
            content.update(f"{name} {column.dtype.str} {column.shape} ".encode())
            content.update(np.ascontiguousarray(column).data)
        self._history = self._digest(self._history, self.line, str(place.offset).encode(), content.digest())
        return self._history.hex()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The whole state, by name: `[32]` uint8 each."""
        values = (self._history, self._conditions, self.line)
        return {name: np.frombuffer(value, np.uint8) for name, value in zip(NAMES, values, strict=True)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; a version of a release without it starts a new history."""
        self.clear()
        if all(name in state for name in NAMES):
            self._history, self._conditions, self.line = (np.asarray(state[name], np.uint8).tobytes() for name in NAMES)

    def _digest(self, *parts: bytes) -> bytes:
        """The keyed digest of parts, which may have any length."""
        made = hashlib.blake2b(key=self._key, digest_size=_BYTES)
        for part in parts:
            made.update(len(part).to_bytes(8, "big") + part)
        return made.digest()
