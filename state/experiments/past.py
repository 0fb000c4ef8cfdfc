"""Past clicks that an experiment's trainer learns before it follows the training log, and the cut between the two.

The cut is a durable version of the live trainer. A past row is learned if the live trainer would drop it after the cut
as a duplicate (`state.microbatch.batch.trim`). Other rows are learned from the log, so each click of the topic is
learned once. Files have no offsets, so for them the cut is in log time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from state import layout
from state.config.sections import RetrainSettings
from state.disk import documents
from state.disk import files as durable
from state.errors import RegistryError
from state.features.arrays import DAY_MS
from state.microbatch.batch import MicroBatch, trim
from state.positions import Source
from state.registry.manifest import LogRange, Manifest


@dataclass(frozen=True)
class Past:
    """The clicks to learn from, and the cut.

    Attributes:
        files: Paths or globs of recorded clicks; if empty, the clicks topic.
        begin_ms: Log time from which rows are learned; earlier ones only fill histories.
        until_ms: Log time of the cut.
        version: The live version at the cut.
        log: That version's range of the training log, whose `next` is the cut.
        sources: That version's next offset of each source.
    """

    files: tuple[str, ...]
    begin_ms: int
    until_ms: int
    version: int
    log: LogRange
    sources: tuple[tuple[Source, int], ...]

    @property
    def marks(self) -> dict[Source, int]:
        """Next offset of each source at the cut."""
        return dict(self.sources)

    def has(self, batch: MicroBatch) -> NDArray[np.bool_]:
        """Returns which rows of a micro-batch are to be learned, `[n]` bool."""
        since: NDArray[np.bool_] = batch.at_ms >= self.begin_ms
        if self.files:
            return since & (batch.at_ms <= self.until_ms)
        behind, _ = trim(batch, self.marks)
        return since & ~behind


def past_until(version: Manifest | None, settings: RetrainSettings) -> Past:
    """Returns the past of an experiment that begins now.

    Raises:
        RegistryError: There is no cut, because `version`, the newest durable version of the live trainer, is None or
            has learned nothing.
    """
    if version is None or not version.sources or not version.event_time_ms:
        raise RegistryError(
            "the live trainer has no version that learned anything yet, at which the training log could continue past clicks",
            "wait for one (`springtide versions`), then repeat it",
        )
    begin_ms = version.event_time_ms - round(settings.days * DAY_MS)
    return Past(settings.files, begin_ms, version.event_time_ms, version.version, version.log, version.sources)


def write_past(registry: Path, past: Past) -> None:
    """Writes the past into an experiment's registry under construction; durable when this returns."""
    durable.write(registry / layout.PAST, documents.encode_sealed(past))


def read_past(registry: Path) -> Past | None:
    """Reads the past that a registry's trainer learns first; None for a trainer without one.

    Raises:
        RegistryError: It is damaged.
    """
    path = registry / layout.PAST
    try:
        return documents.decode_sealed(path.read_bytes(), Past)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"{path} cannot be read: {error}",
            "stop the experiment, and start another: `springtide experiment stop NAME --reason TEXT`",
        ) from error
