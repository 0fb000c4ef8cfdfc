"""A record of the training log as the noise and the ledger see it: its position, and the conditions it is learned under."""

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
    """A record of the training log, and everything but the records that decides its noised sum.

    Attributes:
        topic_id: Id of the training log's topic.
        partition: Partition of the training log.
        offset: Offset of the record.
        epoch: Control's epoch.
        line: The records of the log that count in this epoch.
        mask: The rows that are left out of the record, those of erased users among them.
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
        """All of it but the offset, as bytes: equal for records that are learned under the same conditions."""
        fields = [FORMAT, self.topic_id, self.partition, self.epoch, log_line.to_json(self.line), self.mask.digest]
        return json.dumps([*fields, self.environment]).encode()


def environment_digest(environment: Mapping[str, str]) -> str:
    """SHA-256 of what the bits of a step depend on beside the log, as a manifest's `environment` lists it.

    It has every setting that decides a step, those of the guard of steps and of the privacy mechanism, the fingerprint
    of the noise key, the number of the model code, and the libraries and instructions that decide how sums are rounded.
    """
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()
