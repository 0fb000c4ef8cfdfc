"""Micro-batches: what is encoded comes back, and what is damaged is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.accounts import StreamAccount, check_accounts
from state.errors import MicroBatchError
from state.features.spec import EVENT
from state.history.chunks import Counts, advanced_counts
from state.history.rewind import kept
from state.microbatch.batch import (
    ATTRIBUTES,
    LISTS,
    NAMES,
    SCALARS,
    SEQUENCES,
    TOLERANCE_MS,
    WAITING,
    Header,
    Kind,
    MicroBatch,
    counts,
    gaps,
    in_log_time,
    log_times,
    new_ranges,
    trained,
    trim,
)
from state.microbatch.codec import decode, decode_events, encode, split
from state.positions import Range, Source, from_json, merge_ranges, split_range, to_json
from tests.trainer.clicks import START_MS, microbatch

GOLDEN = Path(__file__).parents[2] / "golden"
ZERO, ONE = Source("ab" * 16, 0), Source("ab" * 16, 1)


def made(rows: int, seed: int = 7, contexts: int = 2, random_features: bool = False) -> tuple[Header, dict[str, Any]]:
    """A header and columns of `rows` rows from two partitions, every third offset dead."""
    shapes = {"context": (contexts,), "features": (8,), "recent_categories": (4,), "category_windows": (4, 3)}
    shapes |= {"user_attributes": (2,), "item_attributes": (1,)}
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for name, kind in SCALARS.items():
        columns[name] = np.arange(rows).astype(kind) * 3
    for name, kind in LISTS.items():
        top = 60_000 if random_features else 5
        columns[name] = rng.integers(0, top, (rows, *shapes[name])).astype(kind)
    columns["source"] = (np.arange(rows) % 2).astype("<u2")
    columns["label"] = np.where(np.arange(rows) % 3 == 0, np.nan, 1.0).astype("<f4")
    ranges, offset = [], np.zeros(rows, "<i8")
    for index, source in enumerate((ZERO, ONE)):
        mine = columns["source"] == index
        count = int(mine.sum())
        # Offsets 100, 101, 103, 104, 106, ...: one of three is dead.
        offset[mine] = 100 + np.arange(count) + np.arange(count) // 2
        end = 100 + count + count // 2
        ranges.append(Range(source, 100, end, rows=count, dead=end - 100 - count))
    columns["offset"] = offset
    columns |= {name: np.zeros(rows, SCALARS[name]) for name in WAITING}
    names, attributes = {0xFEED: "shoes", 7: "Schürzen"}, (("age", "city"), ("brand",))
    header = Header("spec", "salt", tuple(ranges), 1_700_000_000_000, 3, names, attributes)
    return header, columns


def with_kinds() -> tuple[Header, dict[str, Any]]:
    """Nine rows of all kinds at the offsets 100, 101, 102, 102, 102, 103, 104, 105, 105 of one partition; 106 is dead."""
    header, columns = made(9)
    columns["source"][:] = 0
    columns["offset"] = np.array([100, 101, 102, 102, 102, 103, 104, 105, 105], "<i8")
    kinds = [Kind.OPENED, Kind.OPENED, Kind.ROW, Kind.EXPIRED, Kind.EXPIRED]
    kinds += [Kind.DROPPED, Kind.OPENED, Kind.FEEDBACK, Kind.JOINED]
    columns["kind"] = np.array(kinds, "u1")
    columns["waited"] = np.array([0, 0, 0, 12, 11, 0, 0, 0, 5], "<i8")
    columns["delay_ms"] = np.array([0, 0, 0, 600, 600, 0, 0, 0, 40], "<i8")
    columns["request"] = np.array([8, 8, 0, 0, 0, 0, 9, 9, 0], "<u8")
    part = Range(ZERO, 100, 107, rows=1, dead=1, opened=4, feedback=1, joined=1, expired=2, dropped=1)
    return Header("spec", "salt", (part,), 1_700_000_000_000, 3, {7: "shoes"}, header.attributes), columns


def with_sequences(rows: int, places: int = 3) -> tuple[Header, dict[str, Any]]:
    """As `made`, whose rows carry the latest events of their users."""
    header, columns = made(rows)
    rng = np.random.default_rng(rows)
    return header, columns | {
        name: rng.integers(0, 50_000, (rows, places)).astype(kind) for name, kind in SEQUENCES.items()
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether the columns hold the same bits."""
    return all(left[name].tobytes() == right[name].tobytes() for name in NAMES)


@pytest.mark.parametrize(("rows", "contexts"), [(0, 0), (0, 2), (1, 0), (5, 1), (2048, 3)])
def test_what_is_encoded_comes_back(rows: int, contexts: int) -> None:
    header, columns = made(rows, contexts=contexts)
    batch = decode(encode(header, columns))
    assert batch.header == header
    assert len(batch) == rows
    assert same(batch.columns, columns)
    assert {name: column.shape for name, column in batch.columns.items()} == {n: c.shape for n, c in columns.items()}


@pytest.mark.parametrize("rows", [0, 300])
def test_only_the_wanted_columns_are_decoded(rows: int) -> None:
    header, columns = with_sequences(rows)
    value = encode(header, columns)
    events = decode_events(value)
    assert events.header == header
    assert all(getattr(events, name).tobytes() == columns[name].tobytes() for name in SCALARS)
    assert all(getattr(events, name).size == 0 and len(getattr(events, name)) == rows for name in (*LISTS, *SEQUENCES))
    features = decode(value, ("user", "source", "features"))
    assert features.features.tobytes() == columns["features"].tobytes()
    assert not features.offset.any() and features.category_windows.size == 0


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_sequences_come_back_in_a_format_of_their_own(rows: int) -> None:
    header, columns = with_sequences(rows)
    value = encode(header, columns)
    batch = decode(value)
    assert same(batch.columns, columns)
    assert {name: batch.columns[name].tobytes() for name in SEQUENCES} == {
        name: columns[name].tobytes() for name in SEQUENCES
    }
    assert encode(batch.header, batch.columns) == value
    assert b'"format":3' in value
    assert b'"format":2' in encode(*made(rows))
    for part in map(decode, split(header, columns, 900_000, max_rows=100)):
        assert part.sequence_items.tobytes() in columns["sequence_items"].tobytes()


def test_a_micro_batch_without_sequences_has_the_bytes_of_format_2() -> None:
    header, columns = with_kinds()
    golden = decode((GOLDEN / "microbatch-v2.arrow").read_bytes())
    assert not set(SEQUENCES) & set(golden.columns)
    assert golden.sequence_items.shape == (len(golden), 0)
    assert encode(golden.header, golden.columns) == encode(header, columns)


@pytest.mark.parametrize("change", [{"sequence_ages": None}, {"sequence_items": np.zeros((4, 2), "<u8")}])
def test_sequences_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    header, columns = with_sequences(4)
    columns = {name: column for name, column in (columns | change).items() if column is not None}
    with pytest.raises(MicroBatchError, match="together, of one width"):
        encode(header, columns)


def test_the_golden_micro_batch_still_decodes() -> None:
    header, columns = with_kinds()
    batch = decode((GOLDEN / "microbatch-v2.arrow").read_bytes())
    assert batch.header == header
    assert same(batch.columns, columns)


def test_the_rows_of_one_place_are_never_parted() -> None:
    header, columns = with_kinds()
    parts = [decode(value) for value in split(header, columns, 900_000, max_rows=1)]
    assert [part.offset.tolist() for part in parts] == [[100], [101], [102, 102, 102], [103], [104], [105, 105]]
    for before, after in pairwise(parts):
        assert before.header.ranges[0].next == after.header.ranges[0].first
    whole = parts[0].header.ranges[0]
    for part in parts[1:]:
        whole = merge_ranges(whole, part.header.ranges[0])
    assert whole == header.ranges[0]
    marks: dict[Source, int] = {}
    for part in parts:
        keep, marks = trim(part, marks)
        assert keep.all()


@pytest.mark.parametrize("mark", range(100, 108))
def test_what_a_range_counts_beyond_a_mark_is_what_the_rows_say(mark: int) -> None:
    batch = decode(encode(*with_kinds()))
    keep, _ = trim(batch, {ZERO: mark})
    (part,) = new_ranges(batch, {ZERO: mark})[0] or [Range(ZERO, 107, 107)]
    assert {name: getattr(part, name) for name in counts(batch.kind)} == counts(batch.kind[keep])


@given(st.data())
def test_damage_is_a_micro_batch_error_or_changes_no_shape(data: st.DataObject) -> None:
    value = bytearray(encode(*made(5)))
    place = data.draw(st.integers(0, len(value) - 1))
    if data.draw(st.booleans()):
        value = value[:place]
    else:
        value[place] ^= data.draw(st.integers(1, 255))
    try:
        batch = decode(bytes(value))
    except MicroBatchError:
        return
    assert int(trained(batch.kind).sum()) == sum(part.rows + part.joined + part.expired for part in batch.header.ranges)


def test_another_format_is_named() -> None:
    value = encode(*made(1)).replace(b'"format":2', b'"format":4')
    with pytest.raises(MicroBatchError, match="format 4"):
        decode(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": np.zeros(4, "<i8")}, "column user is int64"),
        ({"offset": np.zeros(3, "<i8")}, "with 4 rows"),
        ({"source": np.full(4, 2, "<u2")}, "names range 2"),
        ({"source": np.zeros(4, "<u2")}, "counts 2 rows"),
        ({"kind": np.full(4, Kind.OPENED, "u1")}, "counts 2 rows"),
        ({"kind": np.full(4, 9, "u1")}, "of kind 9"),
        ({"offset": np.zeros(4, "<i8")}, "outside of its source"),
        ({"category_windows": np.zeros((4, 12), "<u2")}, "3 dimensions"),
        ({"item_attributes": np.zeros((4, 2), "<u8")}, "has 2 attributes, the header names 1"),
    ],
)
def test_columns_that_contradict_the_header_are_refused(change: dict[str, Any], words: str) -> None:
    header, columns = made(4)
    with pytest.raises(MicroBatchError, match=words):
        encode(header, columns | change)


def test_a_missing_column_is_named() -> None:
    header, columns = made(4)
    del columns["item"]
    with pytest.raises(MicroBatchError, match="without the columns item"):
        encode(header, columns)


@pytest.mark.parametrize("limit", [6_000, 20_000])
def test_a_split_batch_has_the_same_rows_and_adjacent_ranges(limit: int) -> None:
    header, columns = made(1000, random_features=True)
    names = {1: "of no row"} | {one: f"name of {one}" for one in np.unique(columns["item"]).tolist()}
    header = replace(header, names=names)
    values = split(header, columns, limit)
    parts = [decode(value) for value in values]
    assert len(parts) > 1
    assert max(map(len, values)) <= limit
    for name in set(NAMES) - {"source"}:
        assert np.concatenate([part.columns[name] for part in parts]).tobytes() == columns[name].tobytes()
    for whole in header.ranges:
        merged = None
        for part in parts:
            for piece in part.header.ranges:
                if piece.source == whole.source:
                    merged = piece if merged is None else merge_ranges(merged, piece)
        assert merged == whole
    sources = [part.header.ranges[index].source for part in parts for index in part.source]
    assert sources == [header.ranges[index].source for index in columns["source"]]
    given = [one for part in parts for one in part.header.names]
    assert sorted(given) == sorted(names) and parts[0].header.names[1] == "of no row"
    for part in parts:
        here = {*part.item.tolist(), *part.category.tolist()}
        assert {one for one in part.header.names if one != 1} <= here


def test_a_row_that_exceeds_the_record_is_refused() -> None:
    with pytest.raises(MicroBatchError, match="more than the 100 of a record"):
        split(*made(1), 100)


def test_trim_drops_what_is_below_the_marks_and_moves_no_mark_back() -> None:
    header, columns = made(8)
    batch = decode(encode(header, columns))
    keep, marks = trim(batch, {ZERO: 103})
    assert columns["offset"][keep & (columns["source"] == 0)].min() == 103
    assert keep[columns["source"] == 1].all()
    assert marks == {part.source: part.next for part in header.ranges}
    for known in (marks, {ZERO: 10_000, ONE: 10_000}):
        keep, again = trim(batch, known)
        assert not keep.any() and again == known
    empty = decode(encode(replace(header, ranges=()), made(0)[1]))
    assert trim(empty, {ZERO: 3})[1] == {ZERO: 3}


def test_a_gap_is_named_and_a_new_source_is_none() -> None:
    header, _ = made(8)
    assert gaps(header, {ZERO: 90}) == [(ZERO, 90, 100)]
    assert gaps(header, {ZERO: 100}) == []


FAR_MS = 10 * TOLERANCE_MS


def told(times: list[int], delays: list[int], clocks: tuple[tuple[int, int], ...]) -> MicroBatch:
    """A batch of one micro-batch's first rows, with times and clocks after the start."""
    whole = decode(microbatch(0))
    batch = whole.take(np.arange(len(whole)) < len(times))
    header = replace(batch.header, clocks=tuple((START_MS + begin, START_MS + end) for begin, end in clocks))
    at_ms, delay_ms = START_MS + np.array(times, np.int64), np.array(delays, np.int64)
    return replace(batch, header=header, at_ms=at_ms, delay_ms=delay_ms)


@pytest.mark.parametrize(
    ("times", "delays", "expected"),
    [
        ([5, 3, 8], [0, 0, 0], [5, 3, 8]),
        # Ahead of what is believed, and far behind what was reached.
        ([5, FAR_MS, 7, -FAR_MS, 8], [0] * 5, [5, 5, 7, 7, 8]),
        # The first row is judged by what the partition had reached before.
        ([-FAR_MS, 5], [0, 0], [2, 5]),
        # An impression whose label came later is of its own time; of a wrong clock, as long before as it waited.
        ([-FAR_MS, FAR_MS, 7], [FAR_MS + 6, 4, 0], [-FAR_MS, 2, 7]),
        # One that waits is of the time at which its wait began.
        ([FAR_MS, 7], [4 - FAR_MS, 0], [4, 7]),
        # In a replay at full speed a record spans hours.
        ([0, FAR_MS, 2 * FAR_MS], [0, 0, 0], [0, FAR_MS, 2 * FAR_MS]),
    ],
)
def test_the_log_time_of_rows(times: list[int], delays: list[int], expected: list[int]) -> None:
    end = 2 * FAR_MS if max(times) > FAR_MS else 8
    batch = told(times, delays, ((2, end), (0, 0)))
    assert (log_times(batch) - START_MS).tolist() == expected
    assert in_log_time(batch).at_ms.tolist() == log_times(batch).tolist()


def test_without_clocks_it_is_the_rows_own_time() -> None:
    batch = decode(microbatch(0))
    assert in_log_time(batch) is batch
    assert batch.header.clocks == ()


def test_clocks_are_written_read_and_split_with_their_ranges() -> None:
    whole = decode(microbatch(0))
    header = replace(whole.header, clocks=((1, 2), (3, 4)))
    assert decode(encode(header, whole.columns)).header == header
    # The first half of the rows is of the first source, the second of the other.
    parts = [decode(value).header for value in split(header, whole.columns, 900_000, max_rows=len(whole) // 2)]
    assert [part.clocks for part in parts] == [((1, 2),), ((3, 4),)]
    with pytest.raises(MicroBatchError, match="2 ranges and 1 clocks"):
        encode(replace(header, clocks=((1, 2),)), whole.columns)


TOPIC = "ab" * 16


def user_at(offset: int) -> int:
    """Whose click an offset is; each fifth is nobody's."""
    return (offset * 2654435761) % 97


def is_click(offset: int) -> bool:
    return offset % 5 != 4


def range_of(bucket: int, buckets: int, first: int, after: int) -> Range:
    """What a bucket counts of `[first, after)`."""
    source, span = Source(TOPIC, 0, bucket, buckets), range(first, after)
    rows = sum(is_click(one) and source.has(user_at(one)) for one in span)
    dead = 0 if bucket else sum(not is_click(one) for one in span)
    return Range(source, first, after, rows=rows, dead=dead, elsewhere=after - first - rows - dead)


def record(parts: list[Range]) -> tuple[Header, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]]:
    """A micro-batch of these ranges."""
    rows = [
        (number, one)
        for number, part in enumerate(parts)
        for one in range(part.first, part.next)
        if is_click(one) and part.source.has(user_at(one))
    ]
    columns = {name: np.zeros(len(rows), kind) for name, kind in SCALARS.items()}
    columns |= {name: np.zeros((len(rows), 1), kind) for name, kind in LISTS.items()}
    columns["category_windows"] = np.zeros((len(rows), 1, 1), LISTS["category_windows"])
    columns |= {name: np.empty((len(rows), 0), LISTS[name]) for name in ATTRIBUTES}
    columns["source"] = np.array([number for number, _ in rows], np.uint16)
    columns["offset"] = np.array([one for _, one in rows], np.int64)
    columns["user"] = np.array([user_at(one) for _, one in rows], np.uint64)
    return Header("spec", "salt", tuple(parts), 0), columns


class Job:
    """A job that divides users into so many buckets: each has a mark in its checkpoint and one where it is."""

    def __init__(self, buckets: int, at: int) -> None:
        self.buckets = buckets
        self.at, self.kept, self.most = [at] * buckets, [at] * buckets, at

    def write(self, chosen: list[int], lengths: list[int]) -> bytes | None:
        """One record of a task that has some of the buckets."""
        parts = []
        for bucket, length in zip(chosen, lengths, strict=False):
            first = self.at[bucket]
            self.at[bucket] = first + length
            self.most = max(self.most, first + length)
            parts.append(range_of(bucket, self.buckets, first, first + length))
        return encode(*record(parts)) if parts else None

    def crash(self) -> None:
        self.at = list(self.kept)

    def stop(self) -> int:
        """Where it ends: it goes on at least as far as it ever was."""
        return self.most


acts = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "keep", "crash"]),
        st.lists(st.integers(0, 63), min_size=1, max_size=6),
        st.lists(st.integers(0, 9), min_size=6, max_size=6),
    ),
    max_size=12,
)


def ran(log: list[bytes], buckets: int, begin: int, acts: list[tuple[str, list[int], list[int]]]) -> int:
    """Lets a job run from `begin` on; returns where all its buckets end."""
    job = Job(buckets, begin)
    for act, chosen, lengths in acts:
        if act == "write":
            value = job.write(sorted({one % buckets for one in chosen}), lengths)
            log += [] if value is None else [value]
        elif act == "keep":
            job.kept = list(job.at)
        else:
            job.crash()
    end = job.stop()
    value = job.write(list(range(buckets)), [end - at for at in job.at])
    log += [] if value is None else [value]
    return end


@given(
    first=st.sampled_from([1, 2, 4]),
    second=st.sampled_from([1, 4, 8]),
    acts=st.tuples(acts, acts),
    back=st.integers(0, 9),
)
def test_each_row_is_new_once_whoever_writes_again_and_however_users_are_divided(
    first: int,
    second: int,
    acts: tuple[list[tuple[str, list[int], list[int]]], list[tuple[str, list[int], list[int]]]],
    back: int,
) -> None:
    log: list[bytes] = []
    moved = ran(log, first, 0, acts[0])
    # The second job begins at an older savepoint: what lies between is written again, divided otherwise.
    end = ran(log, second, max(0, moved - back), acts[1])
    marks: dict[Source, int] = {}
    counts: dict[Source, Counts] = {}
    seen: Counter[int] = Counter()
    for value in log:
        batch = decode(value)
        assert gaps(batch.header, marks) == []
        parts, missing = new_ranges(batch, marks)
        assert missing == 0
        for part in parts:
            counts[part.source] = advanced_counts(counts.get(part.source), part, "the reader")
        fresh, marks = trim(batch, marks)
        seen.update(batch.offset[fresh].tolist())
    assert seen == Counter(one for one in range(max(end, moved)) if is_click(one))
    assert all(check_accounts(StreamAccount.of(one)) == () for one in counts.values())
    # After a crash, a record may end between two of an earlier one: which of its positions were dead is then not known.
    if first == second and not back and all(act != "crash" for act, *_ in (*acts[0], *acts[1])):
        assert sum(StreamAccount.of(one).positions for one in counts.values()) == end


def test_a_record_with_buckets_is_split_and_each_part_adds_up() -> None:
    header, columns = record([range_of(bucket, 4, 10, 60) for bucket in range(4)])
    parts = [decode(value).header.ranges for value in split(header, columns, 900_000, max_rows=7)]
    assert len(parts) > 4
    totals = Counter[str]()
    for one in (part for ranges in parts for part in ranges):
        totals.update(one.outcomes)
        assert from_json(to_json(one)) == one
    assert totals["rows"] + totals["dead"] == 50
    assert totals["elsewhere"] == 3 * 50


def test_a_range_without_others_is_written_as_before() -> None:
    assert "elsewhere" not in to_json(Range(Source(TOPIC, 0), 0, 1, rows=1))
    before, after = split_range(range_of(1, 2, 0, 20), 10, range_of(1, 2, 0, 10).rows)
    assert (before.elsewhere + after.elsewhere, before.gap, after.gap) == (range_of(1, 2, 0, 20).elsewhere, 0, 0)


def test_going_back_leaves_a_users_events_alone_that_lie_before_its_own_bucket() -> None:
    events = np.zeros(4, EVENT)
    events["topic"], events["offset"] = Source(TOPIC, 0).topic, [1, 5, 9, 12]
    marks = {Source(TOPIC, 0, 0, 2): 3, Source(TOPIC, 0, 1, 2): 10}
    assert kept(events, 7, marks, marks).tolist() == [True, True, True, False]
    assert kept(events, 8, marks, marks).tolist() == [True, False, False, False]
