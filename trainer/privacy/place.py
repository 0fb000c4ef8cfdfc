"""The position of a record of the training log and the conditions under which it is learned, for noise and ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from state.features.mask import Mask
from state.registry import log_line
from state.registry.log_line import LogLine

FORMAT = 1
"""Raise it when the code adds noise to another sum than before, for the same records and settings."""


@dataclass(frozen=True, slots=True)
class NoisePlace:
    """The position of a record, and everything but the records that determines its noised sum.

    Attributes:
        topic_id: Id of the training log's topic.
        partition: Partition of the training log.
        offset: Offset of the record.
        epoch: Control's epoch.
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
    """SHA-256 of what the bits of a step depend on besides the log, as a manifest's `environment` lists it.

    It covers every setting that affects a step, including those of the guard of steps and of the privacy mechanism. It
    also covers the fingerprint of the noise key, the model code number, and the libraries and CPU instructions that
    affect rounding.
    """
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()
