"""Which rows of a training record are learned from: those of the right kind, new, and not masked. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from state.errors import MicroBatchError, SaltMismatch, SpecMismatch
from state.features.mask import Mask
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.microbatch.cutting import gaps, trim
from state.microbatch.log_time import in_log_time
from state.microbatch.row_kinds import Kind, trained
from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, counts

MaskAt = Callable[[int], Mask]
"""What is left out of a record that the stream wrote under the mask of a control generation."""


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of the rows of one record.

    Attributes:
        batch: The rows to learn from, in log time, perhaps none.
        marks: The next offset of each source afterwards.
        rows: Rows of the record to learn from; others are for histories.
        duplicate: Rows written again by a stream that crashed.
        masked: New rows that the mask leaves out.
        gaps: Positions that no record covered: (source, expected, found).
    """

    batch: MicroBatch
    marks: dict[Source, int]
    rows: int
    duplicate: int
    masked: int
    gaps: list[tuple[Source, int, int]]


def always(mask: Mask) -> MaskAt:
    """The same mask for every record."""
    return lambda _: mask


def take_in(
    value: bytes | None,
    marks: Mapping[Source, int],
    mask_at: MaskAt,
    spec: str,
    salt: str,
    where: str,
    line: LogLine = WHOLE,
    offset: int = 0,
) -> Intake:
    """Decodes a record, drops what is known by `marks`, leaves out what is masked; nothing is left of one off the line.

    Args:
        value: The record's value.
        marks: The next offset of each source.
        mask_at: The rows to leave out; they count as seen.
        spec: Digest of the feature spec that the trainer learns.
        salt: Fingerprint of the salt of its user ids.
        where: The record's place, for messages.
        line: The records that count.
        offset: The record's.

    Raises:
        MicroBatchError: The value is no micro-batch.
        SpecMismatch: It has other features.
        SaltMismatch: Its users have other pseudonyms.
    """
    try:
        whole = decode(value or b"")
    except MicroBatchError as error:
        raise MicroBatchError(f"{where}: {error.what}", error.do) from error
    if not counts(line, whole.header.log_epoch, offset):
        nothing = whole.take(np.zeros(len(whole), np.bool_))
        return Intake(replace(nothing, header=replace(whole.header, ranges=())), dict(marks), 0, 0, 0, [])
    if whole.header.spec != spec:
        raise SpecMismatch(
            f"{where} has feature spec {whole.header.spec[:12]}, this trainer has {spec[:12]}",
            "give stream and trainer the same release, [features] and events.actions, or start a new state directory",
        )
    if whole.header.salt != salt:
        raise SaltMismatch.between(where, whole.header.salt, salt)
    unseen, after = trim(whole, marks)
    ours = trained(whole.kind)
    fresh = ours & unseen
    mask = mask_at(whole.header.mask_generation)
    allowed = unseen & ~masked(whole, mask) if mask else unseen
    keep = ours & allowed
    return Intake(
        # Rows that are not learned from say what time it was, too.
        batch=in_log_time(whole.take(allowed)).take(ours[allowed]),
        marks=after,
        rows=int(ours.sum()),
        duplicate=int((ours & ~unseen).sum()),
        masked=int(fresh.sum()) - int(keep.sum()),
        gaps=gaps(whole.header, marks),
    )


def masked(batch: MicroBatch, mask: Mask) -> NDArray[np.bool_]:
    """Which rows (`[n]` bool) the mask leaves out: those of a masked event, and those labelled by one."""
    ranges = batch.header.ranges
    out = mask.rows(batch.user, batch.at_ms, batch.source, batch.opened, ranges)
    # An event that only ended a wait is not the row's business.
    if len(joined := np.flatnonzero(batch.kind == Kind.JOINED)):
        known_ms = (batch.at_ms + batch.delay_ms)[joined]
        out[joined] |= mask.rows(batch.user[joined], known_ms, batch.source[joined], batch.offset[joined], ranges)
    return out
