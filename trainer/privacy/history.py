"""The secret key of the noise, and the keyed digests that determine a record's noise and the ledger's charges.

    history   one digest over every record learned so far and the conditions of each
    line      the history at the record where the conditions last changed, with the new conditions

The noise of a record is a function of the key and of the history that includes the record. The same noise is therefore
added twice only to the same sum. The ledger charges each period once per line. A restart that reads the same records
under the same conditions repeats history and line; anything else makes new ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from state.config.settings import Settings
from state.errors import SettingsError
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.process import private_files
from state.registry import log_line
from state.registry.log_line import LogLine

NAMES = ("history", "conditions", "line")
_BYTES = 32
logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the code adds noise to another sum than before, for the same records and settings."""


@dataclass(frozen=True, slots=True)
class NoisePlace:
    """The position of a record, and everything but the records that determines its noised sum.

    Attributes:
        line: The branch of the log: the records that count in this epoch.
        mask: The rows of the record that are excluded, those of erased users among them.
        environment: `environment_digest` of the trainer: settings, code and machine.
    """

    topic_id: str
    partition: int
    offset: int
    epoch: int
    line: LogLine
    mask: Mask
    environment: str

    @property
    def conditions(self) -> bytes:
        """All fields but the offset, as bytes: equal for records that are learned under the same conditions."""
        fields = [FORMAT, self.topic_id, self.partition, self.epoch, log_line.to_json(self.line), self.mask.digest]
        return json.dumps([*fields, self.environment]).encode()


def environment_digest(environment: Mapping[str, str]) -> str:
    """SHA-256 of what the bits of a step depend on besides the log, as a manifest's `environment` lists it."""
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()


class History:
    """The digests of one trainer; part of each version. They are keyed: without the key they reveal nothing about rows."""

    def __init__(self, key: bytes) -> None:
        # BLAKE2b accepts keys of at most 64 bytes.
        self._key = hashlib.blake2b(key, digest_size=64, person=b"springtide past").digest()
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._history = self._conditions = self.line = bytes(_BYTES)

    def line_at(self, record: NoisePlace) -> bytes:
        """The line of the record that is learned next; has no side effects."""
        conditions = self._digest(record.conditions)
        return self.line if conditions == self._conditions else self._digest(self._history, conditions)

    def take(self, record: NoisePlace, batch: MicroBatch) -> str:
        """Appends a record with the rows `batch`; returns the name of its noise."""
        self.line, self._conditions = self.line_at(record), self._digest(record.conditions)
        content = hashlib.blake2b(repr((batch.header.spec, batch.header.ranges)).encode())
        for name, column in batch.columns.items():
            content.update(f"{name} {column.dtype.str} {column.shape} ".encode())
            content.update(np.ascontiguousarray(column).data)
        self._history = self._digest(self._history, self.line, str(record.offset).encode(), content.digest())
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
        digest = hashlib.blake2b(key=self._key, digest_size=_BYTES)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()


def own_key(settings: Settings) -> bytes:
    """The key of a state directory. Only its fingerprint may be shown.

    Raises:
        SettingsError: It is missing, cannot be read, or is too short.
    """
    path = settings.privacy_key_path
    if not path.exists():
        if settings.privacy_ledger_path.exists():
            raise SettingsError(
                f"there is no key of the noise at {path}, and versions were learned with one",
                "restore the file",
            )
        if private_files.make_key(path):
            logger.warning(
                "made a new key of the noise at %s: keep a copy, for without it no version can be verified", path
            )
    return private_files.read_key(path, "the key of the noise")
