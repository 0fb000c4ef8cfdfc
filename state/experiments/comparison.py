"""Compares an experiment with the live trainer by log loss, for rows that both scored before they learned them.

A difference is the experiment's loss minus the live one's; below 0 the experiment is better. The interval of the mean
is a confidence sequence (`state/statistics/confidence_sequence.py`): it may be checked at any time and stopped early.

A trainer writes its losses only while something reads them, in a new file after each start, so only the last frame of a
file can be torn. The files are not synced; losses that a power failure destroys are left out of the comparison.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptStore
from state.statistics.confidence_sequence import ALPHA, BLOCKS, PLANNED_ROWS, ConfidenceSequence

Blocks = NDArray[np.uint16]
F64 = NDArray[np.float64]

COMPARISON = "comparison.json"

Verdict = Literal["better", "worse", "undecided", "the same"]

SEGMENT_BYTES = 4 << 20
SEGMENTS = 8
"""Number of files that are kept; at 5,000 rows per second, a file is filled in 80 s."""

_HEAD = struct.Struct("<qII")
_ROW_BYTES = 10
_MOST_ROWS = 1 << 20
_WANTED, _SEGMENT = ".wanted", ".losses"


class RowLosses(NamedTuple):
    """Losses of the rows of one record that have a category.

    Attributes:
        blocks: `[n]` uint16, the blocks of their users.
        losses: `[n]` float64, their log losses in nats.
    """

    offset: int
    blocks: Blocks
    losses: F64


def blocks_of(users: NDArray[np.uint64]) -> Blocks:
    """The blocks of `[n]` uint64 pseudonyms.

    >>> blocks_of(np.array([3, BLOCKS + 3], np.uint64)).tolist()
    [3, 3]
    """
    return (users % np.uint64(BLOCKS)).astype(np.uint16)


def want(registry: Path, name: str) -> None:
    """Requests that the trainer of a registry writes its losses; idempotent."""
    mark = registry / layout.LOSSES / f"{name}{_WANTED}"
    if not mark.exists():
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def unwant(registry: Path, name: str) -> None:
    """Withdraws the request; the trainer removes the files once no request is left."""
    (registry / layout.LOSSES / f"{name}{_WANTED}").unlink(missing_ok=True)


def is_wanted(registry: Path) -> bool:
    """Whether the losses of a registry's trainer have a reader."""
    try:
        return any(path.name.endswith(_WANTED) for path in (registry / layout.LOSSES).iterdir())
    except OSError:
        return False


def segments(registry: Path) -> list[int]:
    """Returns the numbers of the files, ascending."""
    try:
        names = [path.name for path in (registry / layout.LOSSES).iterdir()]
    except OSError:
        return []
    return sorted(int(name.removesuffix(_SEGMENT)) for name in names if name.endswith(_SEGMENT))


def path_of(registry: Path, segment: int) -> Path:
    """Returns the path of a file by its number."""
    return registry / layout.LOSSES / f"{segment:08d}{_SEGMENT}"


def remove_all(registry: Path) -> None:
    """Removes all files of losses. Only the trainer calls it."""
    for segment in segments(registry):
        path_of(registry, segment).unlink(missing_ok=True)


class LossWriter:
    """Writes the losses of one start of a trainer, in new files of `segment_bytes`; keeps the newest `kept` files.

    Not thread-safe. The directory `losses` of the registry must exist.
    """

    def __init__(self, registry: Path, segment_bytes: int = SEGMENT_BYTES, kept: int = SEGMENTS) -> None:
        self._registry, self._segment_bytes, self._kept = registry, segment_bytes, kept
        self._handle, self._bytes = -1, 0

    def append(self, record: RowLosses) -> None:
        """Writes a record's frame with one system call, so that readers see it at once.

        Raises:
            OSError: The disk refused; the next frame begins a new file.
        """
        body = record.blocks.astype("<u2").tobytes() + record.losses.astype("<f8").tobytes()
        frame = _HEAD.pack(record.offset, len(record.losses), zlib.crc32(body)) + body
        if self._handle < 0 or self._bytes >= self._segment_bytes:
            self._begin()
        if os.write(self._handle, frame) < len(frame):
            self.close()
            raise OSError(f"{self._registry / layout.LOSSES} took a part of a frame only")
        self._bytes += len(frame)

    def close(self) -> None:
        """Closes the file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _begin(self) -> None:
        self.close()
        before = segments(self._registry)
        for old in before[: max(0, len(before) - self._kept + 1)]:
            path_of(self._registry, old).unlink(missing_ok=True)
        path = path_of(self._registry, (before or [0])[-1] + 1)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._bytes = 0


class LossReader:
    """Reads a trainer's losses, beginning with the oldest kept file. Not thread-safe."""

    def __init__(self, registry: Path) -> None:
        self._registry = registry
        self._segment = self._at = 0

    def read(self) -> list[RowLosses]:
        """Returns the new records of at most one file. Skips a torn frame at the end of an older file."""
        for segment in segments(self._registry):
            if segment < self._segment:
                continue
            if segment > self._segment:
                self._segment, self._at = segment, 0
            data = b""
            # The writer may have removed it just now.
            with suppress(OSError), path_of(self._registry, segment).open("rb") as file:
                file.seek(self._at)
                data = file.read()
            records = list(_frames(data))
            if records:
                self._at += sum(_HEAD.size + _ROW_BYTES * len(record.losses) for record in records)
                return records
        return []


def _frames(data: bytes) -> Iterator[RowLosses]:
    at = 0
    while at + _HEAD.size <= len(data):
        offset, rows, checksum = _HEAD.unpack_from(data, at)
        begin, end = at + _HEAD.size, at + _HEAD.size + _ROW_BYTES * rows
        if rows > _MOST_ROWS or end > len(data) or zlib.crc32(data[begin:end]) != checksum:
            return
        blocks = np.frombuffer(data, "<u2", rows, begin).astype(np.uint16)
        yield RowLosses(offset, blocks, np.frombuffer(data, "<f8", rows, begin + 2 * rows).astype(np.float64))
        at = end


class ComparisonFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of a comparison; None for those that are not known yet.

    Attributes:
        alone: Records that one side has and the other skipped.
        unlike: Records for which the sides have different rows.
        live_log_loss: Mean log loss of the live trainer, nats.
        trial_log_loss: Mean log loss of the experiment's trainer, nats.
        difference: `trial_log_loss` minus `live_log_loss`.
        alpha: Probability that equal trainers are ever reported as different.
    """

    rows: int
    records: int
    alone: int
    unlike: int
    differing: int
    live_log_loss: float | None
    trial_log_loss: float | None
    difference: float | None
    low: float | None
    high: float | None
    alpha: float
    verdict: Verdict

    @property
    def difference_text(self) -> str:
        """The mean difference with its interval, as text."""
        if self.difference is None:
            return "-"
        mean = f"{self.difference:+.4f}"
        return mean if self.low is None else f"{mean} ({self.low:+.4f} to {self.high:+.4f})"


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures, and the sums from which a restart continues: those of the losses before offset `next`."""

    figures: ComparisonFigures
    next: int
    live: float
    trial: float
    sequence: dict[str, Any]


class PairedComparison:
    """Pairs the records of an experiment and the live trainer, and compares them. Not thread-safe.

    Each side arrives in the order of the log, except for records learned again after a crash. A side may begin later,
    lag or stop. A record is paired once, if both sides have it with the same rows. Rows that one side lacks are counted
    and not compared, for example if only one side has applied a mask yet.

    Args:
        alpha: Probability that equal trainers are ever reported as different.
        planned_rows: The number of rows for which the interval is tuned to be narrowest.

    Attributes:
        next: Records before this offset were paired or skipped.
        alone: Records that one side has and the other skipped.
        unlike: Records for which the sides have different rows.
        records: Records that were paired.

    >>> def record(offset, *losses):
    ...     return RowLosses(offset, np.zeros(len(losses), np.uint16), np.array(losses))
    >>> compared = PairedComparison(0.05, 10_000)
    >>> compared.add([record(4, 1.0), record(6, 2.0)], [record(6, 1.5)])
    >>> compared.figures().difference, compared.records, compared.next, compared.alone
    (-0.5, 1, 7, 1)
    """

    def __init__(self, alpha: float = ALPHA, planned_rows: int = PLANNED_ROWS) -> None:
        self.next = self.alone = self.unlike = self.records = 0
        self._sequence = ConfidenceSequence(alpha, planned_rows)
        self._differing, self._live, self._trial = 0, 0.0, 0.0
        self._sides: tuple[dict[int, RowLosses], dict[int, RowLosses]] = ({}, {})
        self._newest = [-1, -1]

    @property
    def behind(self) -> tuple[bool, bool]:
        """Whether to read more of the live side, and of the other side.

        The side that is ahead waits, which bounds the number of waiting records.
        """
        live, trial = self._newest
        return live <= trial, trial <= live

    def add(self, live: Iterable[RowLosses] = (), trial: Iterable[RowLosses] = ()) -> None:
        """Adds records of both sides and compares those that both have; a repeated record replaces the earlier copy."""
        for side, records in enumerate((live, trial)):
            for record in records:
                self._newest[side] = max(self._newest[side], record.offset)
                if record.offset >= self.next:
                    self._sides[side][record.offset] = record
        lives, trials = self._sides
        common = sorted(lives.keys() & trials.keys())
        for offset in common:
            self._compare(lives.pop(offset), trials.pop(offset))
        if common:
            self.next = common[-1] + 1
        # Both sides are in order, so the other side skipped records that are older than all of its own.
        for waiting, other in ((lives, trials), (trials, lives)):
            bound = max(self.next, min(other, default=0))
            skipped = [offset for offset in waiting if offset < bound]
            self.alone += len(skipped)
            for offset in skipped:
                del waiting[offset]

    def _compare(self, live: RowLosses, trial: RowLosses) -> None:
        if not np.array_equal(live.blocks, trial.blocks):
            self.unlike += 1
            return
        differences = trial.losses - live.losses
        self.records += 1
        self._differing += int(np.count_nonzero(differences))
        self._live += float(live.losses.sum())
        self._trial += float(trial.losses.sum())
        self._sequence.add(differences, live.blocks.astype(np.uint64))

    def figures(self) -> ComparisonFigures:
        """Returns the current figures."""
        rows, (low, high) = self._sequence.rows, self._sequence.interval()
        return ComparisonFigures(
            rows=rows,
            records=self.records,
            alone=self.alone,
            unlike=self.unlike,
            differing=self._differing,
            live_log_loss=self._live / rows if rows else None,
            trial_log_loss=self._trial / rows if rows else None,
            difference=self._sequence.mean if rows else None,
            low=low if math.isfinite(low) else None,
            high=high if math.isfinite(high) else None,
            alpha=self._sequence.alpha,
            verdict=_verdict(rows, self._differing, low, high),
        )

    def encode(self) -> bytes:
        """Encodes the state from which a restart continues, exact to the last bit."""
        sequence = self._sequence.document()
        return documents.encode_sealed(_Document(self.figures(), self.next, self._live, self._trial, sequence))

    @classmethod
    def decode(cls, data: bytes) -> PairedComparison:
        """Restores what `encode` wrote.

        Raises:
            ValueError: It is damaged.
        """
        document = documents.decode_sealed(data, _Document)
        figures = document.figures
        try:
            sequence = ConfidenceSequence.from_json(document.sequence)
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        comparison = cls(sequence.alpha, sequence.planned_rows)
        comparison._sequence, comparison.next = sequence, document.next
        comparison.alone, comparison.unlike = figures.alone, figures.unlike
        comparison.records, comparison._differing = figures.records, figures.differing
        comparison._live, comparison._trial = document.live, document.trial
        return comparison


def _verdict(rows: int, differing: int, low: float, high: float) -> Verdict:
    """The verdict on the experiment.

    >>> _verdict(9, 9, -0.3, -0.1), _verdict(9, 9, 0.1, 0.3), _verdict(9, 9, -0.1, 0.1), _verdict(9, 0, -1, 1)
    ('better', 'worse', 'undecided', 'the same')
    """
    if rows and not differing:
        return "the same"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"


def write(folder: Path, comparison: PairedComparison) -> None:
    """Replaces the stored comparison of an experiment; durable when this returns."""
    durable.replace(folder / COMPARISON, comparison.encode())


def read(folder: Path) -> PairedComparison | None:
    """Reads the comparison of an experiment; None before anything was compared.

    Raises:
        CorruptStore: It is damaged.
    """
    path = folder / COMPARISON
    try:
        return PairedComparison.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorruptStore(
            f"{path} cannot be read: {error}",
            "if it is damaged, remove it: the comparison starts again with the next rows",
        ) from error


def read_figures(folder: Path) -> ComparisonFigures | None:
    """Reads the figures of an experiment's comparison; None before anything was compared.

    Raises:
        CorruptStore: It is damaged.
    """
    comparison = read(folder)
    return None if comparison is None else comparison.figures()
