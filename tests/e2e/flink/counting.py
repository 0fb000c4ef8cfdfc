"""A small job of the distributed form's shape: a source that ends its bundles itself, a state by key, a sink that may repeat itself.

Row n goes to key n % KEYS and comes out as "n count", where count is how many
rows of its key have been counted. So each row that is written, however often,
must say n // KEYS + 1: a state that has lost or doubled something says otherwise.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam
from apache_beam.coders import VarIntCoder
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.utils.timestamp import Duration

KEYS = 16
BUNDLE_S = 0.1
ENDLESS = 1 << 60


class Numbers(RestrictionProvider):  # type: ignore[misc]
    """All numbers that there are, read from 0 on."""

    def initial_restriction(self, element: object) -> OffsetRange:
        return OffsetRange(0, ENDLESS)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: object, restriction: OffsetRange) -> int:
        return int(restriction.size())


class Count(beam.DoFn):  # type: ignore[misc]
    """Gives numbers at a rate, by key; each bundle ends after BUNDLE_S."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        begun_s: float,
        tracker: OffsetRestrictionTracker = beam.DoFn.RestrictionParam(Numbers()),  # noqa: B008  # Beam reads the default
    ) -> Iterator[tuple[int, int]]:
        number = tracker.current_restriction().start
        # Without a bound what waited for a restart would be one bundle of minutes.
        end = min(int((time.time() - begun_s) * self._rate), number + int(self._rate))
        while number < end:
            if not tracker.try_claim(number):
                return
            yield number % KEYS, number
            number += 1
        tracker.defer_remainder(Duration(seconds=BUNDLE_S))


class CountByKey(beam.DoFn):  # type: ignore[misc]
    """Counts the rows of each key in its state."""

    COUNTED = ReadModifyWriteStateSpec("counted", VarIntCoder())

    def process(
        self,
        row: tuple[int, int],
        counted: beam.DoFn.StateParam = beam.DoFn.StateParam(COUNTED),  # noqa: B008  # Beam reads the default
    ) -> Iterator[tuple[int, int]]:
        count = (counted.read() or 0) + 1
        counted.write(count)
        yield row[1], count


class WriteBundles(beam.DoFn):  # type: ignore[misc]
    """Writes the rows of each bundle into a file of its own before the bundle ends."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._rows: list[str] = []

    def start_bundle(self) -> None:
        self._rows = []

    def process(self, row: tuple[int, int]) -> None:
        self._rows.append(f"{row[0]} {row[1]}\n")

    def finish_bundle(self) -> None:
        if self._rows:
            made = Path(self._directory) / f".{uuid.uuid4().hex}"
            made.write_text("".join(self._rows))
            made.replace(made.with_name(f"{made.name[1:]}.rows"))


def pipeline(root: beam.Pipeline, directory: str, rate: float, begun_s: float) -> object:
    """The job.

    Args:
        root: What it is added to.
        directory: Where the rows go.
        rate: Rows a second.
        begun_s: When row 0 was due.
    """
    return (
        root
        | "Begin" >> beam.Create([begun_s])
        | "Count numbers" >> beam.ParDo(Count(rate)).with_output_types(tuple[int, int])
        | "Count by key" >> beam.ParDo(CountByKey()).with_output_types(tuple[int, int])
        | "Write bundles" >> beam.ParDo(WriteBundles(directory))
    )


def written(directory: Path) -> Iterator[tuple[int, int]]:
    """The rows that were written so far, with those that came again."""
    for path in directory.glob("*.rows"):
        for line in path.read_text().splitlines():
            number, counted = line.split()
            yield int(number), int(counted)


def faults(rows: Iterable[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Of written rows: how many are missing before the last, how many came again, and those whose count is wrong.

    >>> faults([(0, 1), (1, 1), (1, 1), (16, 2), (17, 3)])
    (14, 1, [(17, 3)])
    """
    listed = list(rows)
    seen = {number for number, _ in listed}
    wrong = sorted({(number, counted) for number, counted in listed if counted != number // KEYS + 1})
    return max(seen, default=-1) + 1 - len(seen), len(listed) - len(seen), wrong
