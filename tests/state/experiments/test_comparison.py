"""Each record is paired once, with the same rows, whoever lags, stops, or learns again after a crash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from state.errors import CorruptStore
from state.experiments import comparison
from state.experiments.comparison import (
    LossReader,
    LossWriter,
    PairedComparison,
    RowLosses,
    is_wanted,
    remove_all,
    segments,
    unwant,
    want,
)


def record(offset: int, shift: float = 0.0, rows: int = 3) -> RowLosses:
    """The rows of a record; the same offset always gives the same ones."""
    drawn = np.random.default_rng(offset)
    return RowLosses(offset, drawn.integers(0, 512, rows).astype(np.uint16), drawn.random(rows) + shift)


def records(offsets: Iterable[int], shift: float = 0.0) -> list[RowLosses]:
    return [record(offset, shift) for offset in offsets]


def comparing() -> PairedComparison:
    return PairedComparison(0.05, 10_000)


def test_a_side_that_lags_is_waited_for() -> None:
    one = comparing()
    one.add(live=records(range(10)))
    assert one.records == 0 and one.behind == (False, True)
    one.add(trial=records(range(4)))
    assert (one.records, one.next) == (4, 4)
    one.add(trial=records(range(4, 12)))
    assert (one.records, one.next, one.behind) == (10, 10, (True, False))
    one.add(live=records(range(10, 12)))
    assert (one.records, one.next, one.alone, one.unlike) == (12, 12, 0, 0)


def test_records_that_a_side_learns_again_after_a_crash_are_paired_once() -> None:
    one = comparing()
    one.add(records(range(8)), records(range(5)))
    # The experiment's trainer dies and continues from its last durable version; then the live one does.
    one.add(trial=records(range(2, 9)))
    assert one.next == 8
    one.add(live=records(range(6, 11)))
    one.add(trial=records(range(9, 11)))
    assert (one.records, one.next, one.alone, one.unlike) == (11, 11, 0, 0)


def test_records_of_one_side_alone_are_counted_and_later_ones_are_paired() -> None:
    one = comparing()
    # The experiment began from nothing, the live trainer is far ahead.
    one.add(live=records(range(1000, 1010)))
    for first in range(0, 1000, 100):
        one.add(trial=records(range(first, first + 100)))
    assert (one.records, one.alone) == (0, 1000)
    one.add(trial=records([1000, 1002]))
    assert (one.records, one.alone) == (2, 1001)


def test_records_with_different_rows_are_not_compared() -> None:
    one = comparing()
    masked = RowLosses(1, record(1).blocks[:2], record(1).losses[:2])
    one.add(records(range(3)), [record(0), masked, record(2)])
    assert (one.records, one.unlike, one.figures().rows) == (2, 1, 6)


def test_a_restart_goes_on_with_the_sums_to_the_last_bit(tmp_path: Path) -> None:
    whole, parted = PairedComparison(0.05, 10_000), PairedComparison(0.05, 10_000)
    for first in range(0, 300, 50):
        for one in (whole, parted):
            one.add(records(range(first, first + 50)), records(range(first, first + 50), -0.5))
        comparison.write(tmp_path, parted)
        kept = comparison.read(tmp_path)
        assert kept is not None
        parted = kept
        # The files of losses are read again from their beginning.
        parted.add(records(range(first + 50)), records(range(first + 50), -0.5))
    assert parted.encode() == whole.encode()
    figures = comparison.read_figures(tmp_path)
    assert figures == whole.figures() and figures is not None and figures.high is not None
    assert (figures.rows, figures.differing, figures.verdict) == (900, 900, "better")
    assert figures.high < 0 and figures.difference == pytest.approx(-0.5)
    (tmp_path / comparison.COMPARISON).write_text("{}")
    with pytest.raises(CorruptStore, match="remove it"):
        comparison.read(tmp_path)


def test_the_same_losses_are_told_to_be_the_same() -> None:
    one = PairedComparison(0.05, 10_000)
    one.add(records(range(100)), records(range(100)))
    figures = one.figures()
    assert (figures.differing, figures.difference, figures.verdict) == (0, 0.0, "the same")


def equal(found: list[RowLosses], expected: list[RowLosses]) -> bool:
    return [(one.offset, one.blocks.tolist(), one.losses.tolist()) for one in found] == [
        (one.offset, one.blocks.tolist(), one.losses.tolist()) for one in expected
    ]


def test_what_is_written_is_read_once_and_in_order_over_many_files(tmp_path: Path) -> None:
    want(tmp_path, "wider")
    writer, reader = LossWriter(tmp_path, segment_bytes=200, kept=4), LossReader(tmp_path)
    made, found = records(range(40)), list[RowLosses]()
    for one in made:
        writer.append(one)
        found += reader.read()
    assert equal(found, made) and reader.read() == []
    assert len(segments(tmp_path)) == 4
    # Who comes late finds the newest ones alone.
    late, more = LossReader(tmp_path), list[RowLosses]()
    while some := late.read():
        more += some
    assert equal(more, made[-len(more) :]) and 8 <= len(more) < 40


def test_a_frame_that_a_crash_tore_is_passed_over(tmp_path: Path) -> None:
    want(tmp_path, "wider")
    first = LossWriter(tmp_path)
    for one in records(range(3)):
        first.append(one)
    first.close()
    (number,) = segments(tmp_path)
    path = tmp_path / "losses" / f"{number:08d}.losses"
    path.write_bytes(path.read_bytes()[:-5])
    reader = LossReader(tmp_path)
    assert equal(reader.read(), records(range(2)))
    assert reader.read() == []
    again = LossWriter(tmp_path)
    for one in records(range(1, 5)):
        again.append(one)
    assert equal(reader.read(), records(range(1, 5)))


def test_losses_are_wanted_until_the_last_reader_is_gone(tmp_path: Path) -> None:
    assert not is_wanted(tmp_path)
    want(tmp_path, "a")
    want(tmp_path, "b")
    LossWriter(tmp_path).append(record(1))
    unwant(tmp_path, "a")
    assert is_wanted(tmp_path)
    unwant(tmp_path, "b")
    assert not is_wanted(tmp_path) and segments(tmp_path)
    remove_all(tmp_path)
    assert segments(tmp_path) == []
