"""Readers of bucketed sources: two writers interleave, write again in other ranges, divide users otherwise; each row is new once."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from state.accounts import StreamAccount, check_accounts
from state.features.spec import EVENT
from state.history.counts import Counts, advanced
from state.history.rewind import kept
from state.microbatch.batch import ATTRIBUTES, LISTS, SCALARS, Header, gaps, new_ranges, trim
from state.microbatch.codec import decode, encode, split
from state.positions import Range, Source, from_json, split_range, to_json

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
            counts[part.source] = advanced(counts.get(part.source), part, "the reader")
        fresh, marks = trim(batch, marks)
        seen.update(batch.offset[fresh].tolist())
    assert seen == Counter(one for one in range(max(end, moved)) if is_click(one))
    assert all(check_accounts(StreamAccount.of(one)) == () for one in counts.values())
    if first == second and not back:
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
