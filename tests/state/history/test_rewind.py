"""A store that goes back is the store that it was at that place, whatever came between: overflow, crashes, waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.history.appends import Appends, events_of
from state.history.rewinding import LogToRead, Rewound, branch_of, rewind
from state.history.store import HistoryStore
from state.history.waiting import WaitingRows, key_of
from state.microbatch.batch import Header, Kind, MicroBatch, counts_by_range, happened
from state.microbatch.codec import decode, encode
from state.positions import Range, Source
from state.registry.log_line import WHOLE, LogLine, has, turned
from tests.kills import killed_at
from tests.memory_log import MemoryLog
from tests.microbatches import columns

LOG = "microbatches"
TOPIC = "ab" * 16
HISTORY = 32
LONG_MS = 10**12


class Writer:
    """Makes micro-batches of clicks of two partitions, writes them to a log, and commits them to a store."""

    def __init__(self, path: Path, seed: int) -> None:
        self.seed, self.drawn = seed, np.random.default_rng(seed)
        self.store = HistoryStore(path, HISTORY, 1 << 26)
        self.log = MemoryLog(ids=lambda: "cd" * 16)
        self.log.topics().ensure(LOG, 1)
        self.next = {0: 0, 1: 0}
        self.open: dict[tuple[int, int], int] = {}

    def batch(self, rows: int, epoch: int = 1) -> tuple[bytes, dict[str, Any]]:
        """A record of the next `rows` clicks, of which one user of each partition has most, and what is open behind it."""
        sources, firsts = [Source(TOPIC, part) for part in (0, 1)], dict(self.next)
        at, waits = dict(self.next), dict(self.open)
        made: list[tuple[int, int, int, int, int]] = []
        for _ in range(rows):
            part = int(self.drawn.integers(0, 2))
            offset, at[part] = at[part], at[part] + 1
            # What is at a position is so whoever reads it again.
            click = np.random.default_rng([self.seed, part, offset])
            user = 2 * (1 if click.random() < 0.7 else int(click.integers(2, 9))) + part
            chance = click.random()
            theirs = [opened for (owner, opened) in waits if owner == user]
            kind = Kind.OPENED if chance < 0.2 else Kind.FEEDBACK if chance < 0.4 else Kind.ROW
            made.append((part, user, offset, kind, 0))
            if kind == Kind.OPENED:
                waits[user, offset] = part
            elif kind == Kind.FEEDBACK and theirs:
                del waits[user, theirs[0]]
                made.append((part, user, offset, Kind.JOINED, offset - theirs[0]))
            # A dead letter now and then.
            at[part] += int(click.random() < 0.1)
        columns = self._columns(made)
        ranges = []
        for number, (source, found) in enumerate(
            zip(sources, counts_by_range(columns["kind"], columns["source"], 2), strict=True)
        ):
            first, after = firsts[number], at[number]
            ranges.append(Range(source, first, after, **found, dead=after - first - sum(_placed(found))))
        header = Header("spec", "salt", tuple(ranges), 0, log_epoch=epoch)
        return encode(header, columns), {"next": at, "open": waits}

    def _columns(self, made: list[tuple[int, int, int, int, int]]) -> dict[str, Any]:
        table = np.array(made, np.int64).reshape(-1, 5)
        rows = len(table)
        return columns(
            rows,
            user=table[:, 1],
            item=table[:, 2],
            category=np.full(rows, 3),
            at_ms=1000 * table[:, 2] + 1_000_000,
            source=table[:, 0],
            offset=table[:, 2].copy(),
            kind=table[:, 3],
            waited=table[:, 4].copy(),
        )

    def write(self, value: bytes) -> None:
        with self.log.writer("stream") as writer, writer.transaction():
            writer.send(LOG, 0, None, value)

    def commit(self, value: bytes, behind: dict[str, Any]) -> None:
        append(self.store, decode(value))
        self.next, self.open = behind["next"], behind["open"]

    def end(self) -> int:
        return self.log.topics().ends(LOG)[0][1]

    def back(self, line: LogLine) -> Rewound | None:
        return rewind(self.store, line, LogToRead(lambda at: self.log.reader(LOG, [0], {0: at}), LONG_MS))


def _placed(found: dict[str, int]) -> list[int]:
    return [found[name] for name in ("rows", "opened", "feedback")]


def append(store: HistoryStore, batch: MicroBatch) -> None:
    """What the stream's commit does of a record."""
    rows, changes, extra = WaitingRows(store), dict[bytes, bytes | None](), dict[str, bytes]()
    ranges = batch.header.ranges
    now = rows.adopt(batch.columns, changes, extra)
    for row in range(len(batch)):
        one = batch.take(np.arange(len(batch)) == row)
        source = ranges[int(one.source[0])].source
        if one.kind[0] == Kind.OPENED:
            changes[key_of(source, int(one.offset[0]))] = now.pack(one.columns)[0]
        elif one.kind[0] == Kind.JOINED:
            changes[key_of(source, int(one.opened[0]))] = None
    events = batch.take(happened(batch.kind))
    store.commit(Appends.of(events.user, events_of(events, ranges)), ranges, extra, changes)


def content(store: HistoryStore) -> dict[str, Any]:
    return {
        "digest": store.digest(),
        "counts": store.counts(),
        "users": store.users(),
        "waiting": dict(store.waiting()),
    }


records = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["commit", "crash"])), max_size=8)


@settings(max_examples=20, deadline=None)
@given(before=records, after=records, seed=st.integers(0, 1000))
def test_going_back_undoes_what_came_since(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[int, str]],
    after: list[tuple[int, str]],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("rewind")
    writer = Writer(folder / "store", seed)

    def play(steps: list[tuple[int, str]]) -> None:
        for rows, then in steps:
            value, behind = writer.batch(rows)
            writer.write(value)
            if then == "commit":
                writer.commit(value, behind)

    play([(40, "commit"), *before, (5, "commit")])
    # A version stands where a record ended that was committed.
    place, marks = writer.end(), writer.store.positions()
    writer.store.copy_to(folder / "then")
    play(after)
    line = turned(WHOLE, 1, place, writer.end(), tuple(marks.items()))
    found = writer.back(line)
    assert found is not None
    then = HistoryStore(folder / "then", HISTORY, 1 << 26)
    assert content(writer.store) == content(then)
    assert (branch_of(writer.store), writer.back(line)) == (line, None)
    assert found.short == 0
    # It goes on as that one does.
    writer.next = {source.partition: marks.get(source, 0) for source in (Source(TOPIC, 0), Source(TOPIC, 1))}
    writer.open = {}
    for rows in (1, 30, 60):
        value, behind = writer.batch(rows, epoch=2)
        plain = decode(value)
        plain = plain.take(happened(plain.kind))
        for store in (writer.store, then):
            store.commit(Appends.of(plain.user, events_of(plain, plain.header.ranges)), plain.header.ranges)
        writer.next = behind["next"]
    assert writer.store.digest() == then.digest()
    writer.store.close()
    then.close()


def full(tmp_path: Path) -> tuple[Writer, LogLine, dict[str, Any]]:
    """A store whose heavy user has overflowed since the place that the line goes back to."""
    writer = Writer(tmp_path / "store", 1)
    for _ in range(4):
        value, behind = writer.batch(60)
        writer.write(value)
        writer.commit(value, behind)
    place, marks, then = writer.end(), writer.store.positions(), content(writer.store)
    for _ in range(3):
        value, behind = writer.batch(60)
        writer.write(value)
        writer.commit(value, behind)
    return writer, turned(WHOLE, 1, place, writer.end(), tuple(marks.items())), then


@pytest.mark.parametrize("log_is_cut", [False, True])
def test_histories_that_overflowed_are_rebuilt_as_far_as_the_log_reaches_back(tmp_path: Path, log_is_cut: bool) -> None:
    writer, line, then = full(tmp_path)
    if log_is_cut:
        writer.log.topics().delete_before(LOG, {0: line[0].until or 0})
    found = writer.back(line)
    assert found is not None and found.users >= found.rebuilt > 0
    assert found.short == (found.rebuilt if log_is_cut else 0)
    assert f"{found.rebuilt} histories rebuilt" in str(found)
    after = content(writer.store)
    assert after == then or (log_is_cut and after["digest"] != then["digest"])
    assert [one["next"] for one in after["counts"].values()] == [one["next"] for one in then["counts"].values()]


def test_users_who_were_taken_out_since_are_rebuilt_from_the_log(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "store", 1)

    def play(times: int) -> None:
        for _ in range(times):
            value, behind = writer.batch(60)
            writer.write(value)
            writer.commit(value, behind)

    play(4)
    place, marks = writer.end(), writer.store.positions()
    then = {user: writer.store.read(user).tolist() for user in range(20)}
    play(2)
    users = [user for user in range(20) if len(writer.store.read(user))]
    # Who did not click in between looks like a new user: the whole log would have to be read for each of those.
    clicked = [user for user in range(20) if writer.store.read(user).tolist() != then[user]]
    writer.store.sweep([], lambda events: events["at_ms"] < 0, users)
    assert writer.store.users() == 0
    # They click on before anybody goes back.
    play(1)
    found = writer.back(turned(WHOLE, 1, place, writer.end(), tuple(marks.items())))
    assert found is not None
    assert found.rebuilt > 10
    assert {user: writer.store.read(user).tolist() for user in clicked} == {user: then[user] for user in clicked}


@pytest.mark.parametrize("at", ["back.found", "back.committed"])
def test_a_crash_in_between_leaves_the_old_or_the_new_and_a_restart_the_new(tmp_path: Path, at: str) -> None:
    writer, line, then = full(tmp_path)
    before = content(writer.store)
    with killed_at(at):
        writer.back(line)
    assert content(writer.store) == (before if at == "back.found" else then)
    writer.back(line)
    assert content(writer.store) == then


def test_a_store_that_had_not_come_that_far_takes_up_the_line_alone(tmp_path: Path) -> None:
    writer, line, _ = full(tmp_path)
    behind = Writer(tmp_path / "behind", 1)
    behind.log = writer.log
    value, after = behind.batch(60)
    behind.commit(value, after)
    before = content(behind.store)
    assert behind.back(line) == Rewound()
    assert (content(behind.store), branch_of(behind.store)) == (before, line)


@settings(max_examples=15, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 40), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1000),
)
def test_after_any_rollbacks_also_unseen_ones_the_store_is_as_it_was_at_the_last_place(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int, bool]], seed: int
) -> None:
    """A rollback during a rollback, three in a row, and a stream that was down meanwhile."""
    folder = tmp_path_factory.mktemp("turns")
    writer, line, epoch = Writer(folder / "store", seed), WHOLE, 1
    # Epoch, offset of the log, positions of the clicks, what was open, and what the store held.
    places: list[tuple[int, int, dict[Source, int], dict[str, Any], dict[str, Any]]] = []

    def note(offset: int) -> None:
        behind = {"next": dict(writer.next), "open": dict(writer.open)}
        places.append((epoch, offset, writer.store.positions(), behind, content(writer.store)))

    for records_written, choice, seen in turns:
        for _ in range(records_written if line == branch_of(writer.store) else 0):
            value, behind = writer.batch(25, epoch)
            writer.write(value)
            writer.commit(value, behind)
            note(writer.end())
        kept = [one for one in places if has(line, one[0], one[1])]
        at, offset, marks, behind, then = kept[choice % len(kept)]
        line = turned(line, at, offset, writer.end(), tuple(marks.items()))
        epoch = line[-1].epoch
        if seen:
            writer.back(line)
            writer.next, writer.open = dict(behind["next"]), dict(behind["open"])
            assert content(writer.store) == then
            note(line[-1].first)
    writer.back(line)
    assert (content(writer.store), branch_of(writer.store)) == (then, line)
    writer.store.close()
