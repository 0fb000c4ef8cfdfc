"""The pieces of the distributed form: what travels is what was sent, what a bucket counts adds up, and who is late waits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from apache_beam.options.pipeline_options import PortableOptions, StandardOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from state.config.settings import Settings
from state.errors import SettingsError
from state.events.dead_letters import DeadLetter, Reason
from state.events.event_batch import EventBatch
from state.features.spec import EVENT
from state.history.appends import Appends
from state.positions import SHARES, Range
from streaming.distributed.bucket import IDLE_S, BucketCore, Cache
from streaming.distributed.bucket_store import Delta
from streaming.distributed.bucket_store import decode as delta_of
from streaming.distributed.bucket_store import encode as bytes_of
from streaming.distributed.buckets import Portion, decode, divide, encode, gathered, pack, unpack
from streaming.distributed.engine import FLINK, PRISM, beam_options, take_runner
from streaming.distributed.handing_in import Account
from streaming.distributed.steps import of_source
from streaming.event_clock import Moves, OffClock, Told, moves_of
from tests.streaming.pieces import ONE, ZERO, piece

SOURCES = [ZERO, ONE]


def told(events: EventBatch, clock_ms: list[int] | None = None) -> Told:
    """What time it was, made up."""
    clocks = tuple((one, one + 5) for one in range(len(events.ranges)))
    after = np.arange(len(events), dtype=np.int64) if clock_ms is None else np.array(clock_ms, np.int64)
    moves = moves_of(events.ranges, np.full(len(clocks), -3), events, after)
    return Told(after, moves, clocks, {"clock:all": b"x"}, (OffClock("ahead", 0, 3, 70),))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=6), st.sampled_from([1, 2, 8, 64])
)
@settings(deadline=None)
def test_the_parts_of_a_bundle_have_each_event_once_and_each_offset_has_one_outcome(
    read: list[tuple[int, int]], buckets: int
) -> None:
    at, parts = [0, 0], []
    for source, rows in read:
        parts.append((SOURCES[source], at[source], rows))
        at[source] += rows + 2
    events = gathered(piece(*parts, dead=2).batch)
    found = divide(events, told(events), buckets)
    assert len(found) == buckets
    assert sorted(int(one) for batch, _ in found for one in batch.offset) == sorted(events.offset.tolist())
    for bucket, (batch, clock) in enumerate(found):
        assert all(one % buckets == bucket for one in batch.user.tolist())
        assert len(clock.clock_ms) == len(batch)
        assert {part.source for part in batch.ranges} == {
            part.source._replace(bucket=bucket, buckets=buckets) for part in events.ranges
        }
    account = Account()
    for batch, _ in found:
        account.take(batch.ranges)
    assert account.faults() == ()
    assert account.totals["positions"] == sum(part.next - part.first for part in events.ranges)
    assert account.reached(ZERO.topic_id) == {part.source.partition: part.next for part in events.ranges}


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 9), max_size=9),
    st.integers(0, 99),
    st.sampled_from([1, 2, 8, 64]),
)
@settings(deadline=None)
def test_where_it_is_its_turn_a_bucket_knows_what_time_it_is(
    zero: list[int], one: list[int], first: int, buckets: int
) -> None:
    events = piece((ZERO, first, len(zero)), (ONE, 2 * first, len(one)), dead=70).batch
    whole = told(events, [*zero, *one])
    for bucket, (batch, clock) in enumerate(divide(events, whole, buckets)):
        for number, part in enumerate(batch.ranges):
            for offset in range(part.first, part.next):
                if offset % SHARES % buckets == bucket:
                    assert time_at(clock.moves, number, offset) == time_at(whole.moves, number, offset)
        assert (clock.moves.offset % SHARES % buckets == bucket).all()


def test_in_a_gap_it_is_no_time() -> None:
    events = replace(piece((ZERO, 5, 3)).batch, ranges=(Range(ZERO, 0, 8, rows=3, gap=5),))
    assert told(events).moves.offset.tolist() == [5, 5, 6, 7]


def time_at(moves: Moves, source: int, offset: int) -> int:
    """What time it is in a range at an offset."""
    return int(moves.clock_ms[(moves.source == source) & (moves.offset <= offset)][-1])


def test_a_bucket_that_lags_holds_back_what_was_reached_and_one_that_is_missing_too() -> None:
    account = Account()
    first, second = (ZERO._replace(bucket=bucket, buckets=2) for bucket in (0, 1))
    account.take([Range(first, 0, 9, rows=9)])
    assert account.reached(ZERO.topic_id) == {}
    account.take([Range(second, 0, 4, elsewhere=4)])
    assert (account.reached(ZERO.topic_id), account.faults()) == ({0: 4}, ())
    account.take([Range(second, 5, 9, elsewhere=4)])
    assert account.faults()[0] == "1 ranges did not begin where their bucket was"


def test_an_offset_that_two_buckets_count_is_a_fault() -> None:
    account = Account()
    account.take(Range(ZERO._replace(bucket=bucket, buckets=2), 0, 1, rows=1) for bucket in (0, 1))
    (fault,) = account.faults()
    assert "1 offsets, and its buckets have 2 of their own" in fault


def test_a_portion_arrives_as_it_was_sent() -> None:
    batch = piece((ZERO, 5, 3), dead=1).batch
    letter = DeadLetter(ZERO, 8, Reason.TOO_LARGE, b"ada", b"secret")
    sent = Portion(
        type(batch)(
            **{name: getattr(batch, name) for name in batch.__slots__} | {"dead": (letter,), "names": {7: "x"}}
        ),
        told(batch),
        9,
        2,
        77,
    )
    came = decode(encode(sent))
    assert b"ada" not in encode(sent) and b"secret" not in encode(sent)
    assert came.batch.dead == (letter._replace(key=None, value=None),)
    assert (came.control, came.log_epoch, came.appended_ms, came.batch.names) == (9, 2, 77, {7: "x"})
    assert (came.batch.ranges, came.told.clocks, came.told.off) == (batch.ranges, sent.told.clocks, sent.told.off)
    for name in Moves._fields:
        np.testing.assert_array_equal(getattr(came.told.moves, name), getattr(sent.told.moves, name))
    for name in ("user", "offset", "label", "context", "request"):
        np.testing.assert_array_equal(getattr(came.batch, name), getattr(batch, name))
        # Numba compiles once more for arrays that cannot be written.
        assert getattr(came.batch, name).flags.writeable


@given(
    st.dictionaries(st.binary(min_size=1, max_size=30), st.none() | st.binary(max_size=20), max_size=5),
    st.dictionaries(st.text("abc", min_size=1), st.none() | st.binary(max_size=9), max_size=3),
    st.lists(st.integers(0, 2**64 - 1), max_size=9),
)
@settings(deadline=None)
def test_a_delta_comes_out_of_the_state_as_it_went_in(
    waiting: dict[bytes, bytes | None], extra: dict[str, bytes | None], users: list[int]
) -> None:
    events = np.zeros(len(users), EVENT)
    events["offset"] = np.arange(len(users))
    appends = Appends.of(np.array(users, np.uint64), events)
    number, found = delta_of(bytes_of(Delta(appends, waiting, extra), 7))
    assert (number, dict(found.waiting), dict(found.extra)) == (7, waiting, extra)
    for name in ("users", "starts", "lengths", "events"):
        np.testing.assert_array_equal(getattr(found.appends, name), getattr(appends, name))


def test_what_is_packed_may_be_of_any_shape() -> None:
    arrays = {"a": np.arange(6, dtype=np.uint16).reshape(2, 3), "b": np.empty((0, 4)), "c": np.float32(3).reshape(1)}
    head, found = unpack(pack({"x": [1, None]}, arrays))
    assert head == {"x": [1, None]}
    for name, one in arrays.items():
        np.testing.assert_array_equal(found[name], one)
        assert found[name].dtype == one.dtype


def test_a_cache_gives_a_bucket_only_at_the_token_that_the_state_has_and_to_one_alone() -> None:
    now_s = 0.0
    cache, core = Cache(lambda: now_s), object.__new__(BucketCore)
    cache.keep(3, "ab", core)
    assert cache.take(3, "cd") is None
    assert cache.take(3, "ab") is None, "a bucket that the engine took back is never right again"
    cache.keep(3, "ab", core)
    assert cache.take(3, "ab") is core
    assert cache.take(3, "ab") is None
    cache.keep(3, "ab", core)
    now_s = IDLE_S + 1
    cache.keep(4, "ef", core)
    assert cache.take(3, "ab") is None, "it moved elsewhere"


def test_each_partition_is_read_by_one_source() -> None:
    assert sorted(one for source in range(3) for one in of_source(source, 3, 7)) == list(range(7))
    assert of_source(2, 3, 2) == []


def test_flink_and_prism_are_told_what_a_job_needs_there_and_what_is_given_wins() -> None:
    runner, words = take_runner(["--runner", "flink", "--parallelism=2", "--environment_type=DOCKER"])
    options = beam_options(runner, words, Settings())
    said = options.get_all_options(drop_default=True)
    assert (runner, said["runner"], said["streaming"]) == (FLINK, "PortableRunner", True)
    assert said["environment_type"] == "DOCKER"
    assert "--parallelism=2" in words and options.view_as(StandardOptions).streaming
    assert options.view_as(PortableOptions).job_endpoint == "127.0.0.1:8099"
    prism = beam_options(PRISM, [], Settings())
    assert prism.view_as(StandardOptions).runner == "PrismRunner"
    with pytest.raises(SettingsError, match="unknown argument --parallelism"):
        take_runner(["--parallelism", "2"])
