"""What a trial's trainer learns before it follows the training log: past clicks up to a cut, where the log goes on.

    <its registry>/past.json    this; sealed as a manifest is, written once

The cut is a durable version of the live trainer: the offset at which the
training log goes on from it, and of each source of clicks the mark below which
its rows are in the log before that offset. A row of a past click is learned
where the live trainer would drop it behind the cut, as one that it has
(`state.microbatch.cutting.trim`); what it would not drop comes with the log. So
each click of the topic is learned once. Of files nobody knows the offsets: the
cut is in log time there, and a click that reached the log late, with a time
before the cut, is learned twice where a file has it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from state import layout
from state.config.sections import RetrainSettings
from state.disk import files as durable
from state.errors import RegistryError
from state.features.ages import DAY_MS
from state.microbatch.batch import MicroBatch
from state.microbatch.cutting import trim
from state.positions import Source
from state.registry import sealed
from state.registry.manifest import LogRange, Manifest


@dataclass(frozen=True)
class Past:
    """The clicks to learn from, and the cut.

    Attributes:
        files: Paths or globs of recorded clicks; empty: the clicks topic.
        begin_ms: Log time from which on rows are learned; those before only fill histories.
        until_ms: Log time of the cut.
        version: The live version at the cut.
        log: Its part of the training log, whose `next` is the cut.
        sources: Its marks.
    """

    files: tuple[str, ...]
    begin_ms: int
    until_ms: int
    version: int
    log: LogRange
    sources: tuple[tuple[Source, int], ...]

    @property
    def marks(self) -> dict[Source, int]:
        """The next offset of each source at the cut."""
        return dict(self.sources)

    def has(self, batch: MicroBatch) -> NDArray[np.bool_]:
        """`[n]` bool: which rows of a micro-batch in log time are to be learned."""
        since: NDArray[np.bool_] = batch.at_ms >= self.begin_ms
        if self.files:
            return since & (batch.at_ms <= self.until_ms)
        behind, _ = trim(batch, self.marks)
        return since & ~behind


def past_until(version: Manifest | None, settings: RetrainSettings) -> Past:
    """The past of a trial that begins now.

    Args:
        version: The newest durable version of the live trainer; None for none.
        settings: How far back, and from where.

    Raises:
        RegistryError: Nothing was learned yet, so that there is no place at which the log could go on.
    """
    if version is None or not version.sources or not version.event_time_ms:
        raise RegistryError(
            "the live trainer has no version that learned anything yet: past clicks end, and the training log goes on, where one is",
            "wait for one (`springtide versions`), then repeat it",
        )
    begin_ms = version.event_time_ms - round(settings.days * DAY_MS)
    return Past(settings.files, begin_ms, version.event_time_ms, version.version, version.log, version.sources)


def write_past(registry: Path, past: Past) -> None:
    """Writes it into a trial's registry, which is being made; durable when this returns.

    Raises:
        OSError: The disk refused.
    """
    durable.write(registry / layout.PAST, sealed.encode(past))


def read_past(registry: Path) -> Past | None:
    """The past that a trainer of a registry learns first; None for all but such trials.

    Raises:
        RegistryError: It is damaged.
    """
    path = registry / layout.PAST
    try:
        return sealed.decode(path.read_bytes(), Past)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"{path} cannot be read: {error}",
            "stop the trial, and start another: `springtide trial stop NAME --reason TEXT`",
        ) from error
