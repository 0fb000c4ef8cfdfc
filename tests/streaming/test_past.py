"""Rows of past clicks are the rows that the stream made of them, and the cut divides them: each row once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from state.config.sections import Attributes, RetrainSettings
from state.config.settings import Settings
from state.errors import UnknownTopic
from state.events.identity import load_salt
from state.experiments.past import Past, write_past
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import Topics
from state.metrics import StreamMetrics
from state.microbatch.batch import in_log_time, trained, trim
from state.microbatch.codec import Frames, decode
from state.positions import Source
from state.registry.control import start
from state.registry.controls import Controls
from state.registry.manifest import LogRange
from state.registry.registry import Registry
from streaming.attributes import Join
from streaming.context import open_job
from streaming.past import PastRows, of_topic, run, segment_of
from tests import forked
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.streaming.distributed.shop import (
    ACTIONS,
    BASE_MS,
    TOPIC,
    Click,
    Place,
    clicks,
    known_attributes,
    local_form,
    mask_one_user,
    rows_of,
    settings_of,
    written,
)
from tests.streaming.streams import FOREVER, click, following, next_offsets, running, send, settings_for, until

HOUR_MS = 3_600_000
LOG = LogRange("microbatches", "cd" * 16, 0, 0, 7)


def past_of(marks: dict[Source, int], begin_ms: int = 0, files: tuple[str, ...] = (), until_ms: int = 1 << 60) -> Past:
    return Past(files, begin_ms, until_ms, 40, LOG, tuple(marks.items()))


@contextmanager
def maker(folder: Path, wanted: Settings, join: Join | None, mask: Mask, begin_ms: int = 0) -> Iterator[PastRows]:
    """What makes rows of past clicks, over a store of its own."""
    spec, salt = FeatureSpec.from_settings(wanted), load_salt(wanted.salt_path)
    store = HistoryStore(folder, spec.history, 16 << 20)
    job = replace(open_job(wanted, store, salt, TOPIC, mask), join=join)
    yield PastRows(job, StreamMetrics(CollectorRegistry()), salt.fingerprint, begin_ms)
    store.close()


def made_of(rows: PastRows, wanted: Settings, past: Past, log: MemoryLog) -> list[bytes]:
    """The micro-batches of the past."""
    with log.topics() as topics:
        segment = segment_of(wanted, past, topics)
    made = [value for batches in of_topic(wanted, segment, log, rows.reached) for value in rows.take(batches)]
    return made + rows.flush()


def learned(past: Past, values: list[bytes]) -> set[Place]:
    """The places of the rows of micro-batches that a trainer learns as the past."""
    found = set()
    for value in values:
        batch = in_log_time(decode(value))
        for row in np.flatnonzero(past.has(batch) & trained(batch.kind)).tolist():
            source = batch.header.ranges[int(batch.source[row])].source
            found.add((*source[:2], int(batch.offset[row]), int(batch.kind[row]), int(batch.opened[row])))
    return found


def comes_with_the_log(marks: dict[Source, int], place: Place) -> bool:
    """Whether the trainer takes a row of the log behind the cut: that of `trim`, by its place."""
    return place[2] >= marks.get(Source(place[0], place[1]), 0)


@given(
    log=clicks,
    partitions=st.integers(1, 3),
    batch_events=st.integers(1, 20),
    cut=st.integers(0, 40),
    cut_rows=st.integers(1, 50),
    masks=st.booleans(),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_each_row_is_that_of_the_stream_to_the_last_bit_and_learned_once_on_one_side_of_the_cut(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[Click],
    partitions: int,
    batch_events: int,
    cut: int,
    cut_rows: int,
    masks: bool,
) -> None:
    folder = tmp_path_factory.mktemp("past")
    wanted = settings_of(folder, cut_rows=40, masks=masks)
    salt, mask = load_salt(wanted.salt_path), mask_one_user(wanted) if masks else Mask.NONE
    topic, join = written(log, partitions, wanted), known_attributes(folder / "attributes", wanted, salt)
    live = local_form(folder / "live", wanted, topic, join, mask, batch_events)
    ends = topic.topics().ends(wanted.kafka.clicks_topic)
    marks = {Source(TOPIC, one): min(cut * (1 + one) // 2 + 1, end) for one, (_, end) in ends.items() if end}
    past = past_of(marks)
    wanted = replace(wanted, stream=replace(wanted.stream, cut_rows=cut_rows))
    with maker(folder / "again", wanted, join, mask) as rows:
        made = made_of(rows, wanted, past, topic)
    join.close()
    again, before = rows_of(made), learned(past, made)
    # What is made is what the stream made, as far as it was read.
    assert again.items() <= live.rows.items()
    # And divided by the cut: what the log brings behind it, and what was learned before it.
    to_learn = {place for place in live.rows if trained(np.array([place[3]], np.uint8))[0]}
    behind = {place for place in to_learn if comes_with_the_log(marks, place)}
    assert before == to_learn - behind


def a_day(users: int = 5) -> list[Click]:
    """A view of some user each half hour."""
    return [Click(number % users, 0, number % 4, number * HOUR_MS // 2) for number in range(48)]


def plain(folder: Path) -> Settings:
    """A shop without attributes, and a control."""
    found = replace(settings_of(folder, cut_rows=40), attributes=Attributes())
    found.registry_dir.mkdir(parents=True)
    Controls(found.registry_dir).propose(start(actor="trainer", reason="first start", now_ms=0))
    load_salt(found.salt_path)
    return found


def values_of(wanted: Settings, past: Past, log: MemoryLog) -> list[bytes]:
    found: list[bytes] = []
    run(wanted, past, log, found.append)
    return found


def test_only_the_last_days_are_learned_with_the_windows_of_what_came_before_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    wanted = plain(tmp_path)
    log = written(a_day(), 1, wanted)
    whole = past_of({Source(TOPIC, 0): 48})
    since = replace(whole, begin_ms=BASE_MS + 20 * HOUR_MS)
    all_of_it, late = values_of(wanted, whole, log), values_of(wanted, since, log)
    assert len(learned(whole, all_of_it)) == 48
    places = learned(since, late)
    assert {place[2] for place in places} == set(range(40, 48))
    # The longest window is two hours: bits of those rows know of the clicks before the first of them.
    assert {place: rows_of(late)[place] for place in places} == {place: rows_of(all_of_it)[place] for place in places}
    # Clicks that are older than that were not read.
    assert min(place[2] for place in rows_of(late)) >= 36
    assert list(wanted.registry_dir.glob("past-*")) == []


def test_what_a_killed_one_left_goes_with_the_next(tmp_path: Path) -> None:
    wanted = plain(tmp_path)
    (wanted.registry_dir / "past-killed" / "histories").mkdir(parents=True)
    values_of(wanted, past_of({Source(TOPIC, 0): 4}), written(a_day(), 1, wanted))
    assert list(wanted.registry_dir.glob("past-*")) == []


def test_files_give_the_rows_that_the_topic_gives(tmp_path: Path) -> None:
    wanted, day = plain(tmp_path), a_day()
    log = written(day, 1, wanted)
    halves = (day[24:], day[:24])
    for number, half in enumerate(halves):
        lines = [json.loads(one.value or b"") for one in half]
        Path(tmp_path, f"clicks-{number}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    files = (str(tmp_path / "clicks-*.jsonl"),)
    marks = {Source(TOPIC, 0): 48}
    from_files = replace(wanted, retrain=RetrainSettings(files=files))
    past = past_of(marks, files=files, begin_ms=BASE_MS, until_ms=BASE_MS + 20 * HOUR_MS)
    ours, theirs = values_of(from_files, past, log), values_of(wanted, past_of(marks), log)
    # Another source, and so another number of the topic in events; the offsets, and all else of a row, are the same.
    mine = {place[2:]: row for place, row in rows_of(ours).items()}
    assert mine == {place[2:]: row for place, row in rows_of(theirs).items()}
    assert len(learned(past, ours)) == 41
    assert {one for value in ours for one in decode(value).action.tolist()} == {ACTIONS.index("view")}


def test_a_topic_that_was_made_anew_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    wanted = plain(tmp_path)
    with pytest.raises(UnknownTopic, match="recreated"):
        values_of(wanted, past_of({Source("ef" * 16, 0): 4}), written(a_day(), 1, wanted))


def test_buckets_that_are_ahead_of_each_other_are_cut_user_by_user(tmp_path: Path) -> None:
    """A distributed stream's marks are of buckets of users; the log has their rows from there on."""
    wanted = plain(tmp_path)
    log = written(a_day(users=12), 1, wanted)
    marks = {Source(TOPIC, 0, 0, 2): 10, Source(TOPIC, 0, 1, 2): 30}
    past = past_of(marks)
    made = values_of(wanted, past, log)
    before = learned(past, made)
    for value in made:
        batch = decode(value)
        fresh, _ = trim(batch, marks)
        for row in range(len(batch)):
            user, offset = int(batch.user[row]), int(batch.offset[row])
            assert fresh[row] == (offset >= marks[Source(TOPIC, 0, user % 2, 2)])
            assert ((TOPIC, 0, offset, 0, offset) in before) != fresh[row]
    assert before


CLICKS = 600


def child(settings: Settings, past: Past) -> subprocess.Popen[bytes]:
    """The process, with what it is asked for in a trial's registry."""
    registry = Registry(settings.state_dir / "experiments" / "anew" / "registry")
    if registry.control() is None:
        registry.propose(start(actor="ann", reason="to see", now_ms=0))
    write_past(registry.path, past)
    environment: Mapping[str, str] = settings.environment()
    command = [sys.executable, "-m", "streaming.past", f"--paths.registry={registry.path}"]
    return forked.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def settings(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    send(kafka, [click(number) for number in range(CLICKS)])
    return settings_for(kafka, tmp_path / "state", tmp_path / "salt")


def test_its_rows_are_those_in_the_training_log_and_it_ends_in_order(settings: Settings, tmp_path: Path) -> None:
    with (
        following(settings.kafka, settings.kafka.microbatches_topic) as log,
        running(settings, tmp_path / "log") as stream,
    ):
        until(lambda: next_offsets(log.poll()) == {0: CLICKS // 2, 1: CLICKS // 2}, "all clicks in the log")
        assert stream.stop() == 0, stream.lines
        written = log.poll()
    sources = {part.source for value in written for part in decode(value).header.ranges}
    made, frames = child(settings, past_of(dict.fromkeys(sources, CLICKS // 2))), Frames()
    out, errors = made.communicate(timeout=240)
    values = list(frames.take(out))
    assert (made.returncode, frames.ended) == (0, True), errors.decode()
    assert rows_of(values) == rows_of(written) and len(rows_of(values)) == CLICKS

    # Nobody reads on: its trainer was killed.
    registry = settings.state_dir / "experiments" / "anew" / "registry"
    left = forked.Popen(made.args, env=settings.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert left.stdout is not None and left.stderr is not None
    assert left.stdout.read(4)
    left.stdout.close()
    assert left.wait(240) == 0 and "closed the pipe" in left.stderr.read().decode()
    left.stderr.close()
    assert list(registry.glob("past-*")) == []
