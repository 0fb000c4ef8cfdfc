"""The row store answers at each version what a plain replay along its line of descent gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from state.errors import UnknownVersion
from state.layout import DATA
from state.positions import Source
from state.process import killpoints
from state.registry.manifest import Kind, LogRange, Manifest
from state.rows.reader import RowReader, Served
from state.rows.store import ROWS_AT_ONCE, WRITTEN_AT_ONCE, RowStore
from tests.conformance.kept import sweep
from tests.disks import folder_in_memory

DIM = 4
IDS = 6
Rows = dict[tuple[str, int], float]


def manifest(version: int, parent: int | None, kind: Kind = "delta", epoch: int = 1) -> Manifest:
    """A manifest of which only what the store keeps matters."""
    return Manifest(
        version=version, kind=kind, epoch=epoch, parent=parent, visible=((version, version),), log=LogRange(),
        sources=((Source("ab" * 16, 0), version * 10),), steps=version, rows=version, created_at_ms=version * 1000,
        event_time_ms=version * 1000 - 500, spec="spec", program="program", salt="salt", mask_generation=0,
        metrics={}, environment={}, files={},
    )  # fmt: skip


def tensors(put: Mapping[tuple[str, int], float], removed: frozenset[tuple[str, int]] = frozenset()) -> dict[str, Any]:
    """The tensors of a version: rows filled with one value each."""
    made: dict[str, Any] = {"dense.w": np.array([1.0], np.float32), "popular": np.array([5, 6], np.uint64)}
    for table in ("user", "category"):
        ids = [identity for name, identity in put if name == table]
        made[f"{table}.ids"] = np.array(ids, np.uint64)
        made[f"{table}.rows"] = np.array([[put[table, i]] * DIM for i in ids], np.float32).reshape(len(ids), DIM)
        made[f"{table}.removed"] = np.array([i for name, i in removed if name == table], np.uint64)
    return made


@contextmanager
def store_in_temporary_folder() -> Iterator[RowStore]:
    with folder_in_memory() as folder:
        store = RowStore(folder / "rows", 1 << 26)
        yield store
        store.close()


def read(store: RowStore, version: int) -> Rows:
    """Everything that is visible at `version`."""
    found: Rows = {}
    with store.reader() as reader:
        at = reader.version(version)
        assert at is not None
        for table in ("user", "category"):
            rows, known = reader.get(table, range(IDS), at)
            for identity in range(IDS):
                if known[identity]:
                    assert len(set(rows[identity].tolist())) == 1
                    found[table, identity] = float(rows[identity][0])
                else:
                    assert not rows[identity].any()
            assert walked(reader, table, at) == {
                identity: value for (name, identity), value in found.items() if name == table
            }
    return found


def walked(reader: RowReader, table: str, at: Served) -> dict[int, float]:
    """All rows of a table, read a few at a time."""
    found: dict[int, float] = {}
    following: int | None = 0
    while following is not None:
        ids, rows, following = reader.rows_from(table, following, 2, at)
        assert len(ids) <= 2
        found |= zip(ids.tolist(), rows[:, :1].reshape(-1).tolist(), strict=True)
    assert list(found) == sorted(found)
    return found


def check_changed(store: RowStore, truth: Mapping[int, Rows]) -> None:
    """Whatever differs between two versions is named, where anything is."""
    with store.reader() as reader:
        for since, at in itertools.permutations(reader.versions(), 2):
            named = reader.changed("user", since, at)
            before, after = truth[since.version], truth[at.version]
            other = {
                one
                for name, one in {*before, *after}
                if name == "user" and before.get((name, one)) != after.get((name, one))
            }
            assert named is None or other <= {*named.tolist()}, (since, at)


KEYS = st.tuples(st.sampled_from(["user", "category"]), st.integers(0, IDS - 1))
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sets(KEYS, max_size=4), st.sets(KEYS, max_size=2)),
        st.tuples(st.just("roll back"), st.integers(0, 30), st.none()),
        st.tuples(st.just("serve"), st.integers(0, 30), st.none()),
        st.tuples(st.just("sweep"), st.integers(1, 6), st.lists(st.integers(0, 30), max_size=2)),
        st.tuples(st.just("forget"), st.sets(st.integers(0, 30), max_size=4), st.integers(0, 3)),
        st.tuples(st.just("rebuild"), st.integers(0, 40), st.integers(0, 5)),
        st.tuples(st.just("reapply"), st.none(), st.none()),
        st.tuples(st.just("base"), st.none(), st.none()),
        st.tuples(st.just("compact"), st.none(), st.none()),
    ),
    max_size=30,
)


NOTHING: set[tuple[str, int]] = set()
PUBLISHED = ("publish", NOTHING, NOTHING)
REMOVED = ("publish", NOTHING, {("user", 0)})


@given(OPERATIONS)
# What a version wrote before it came into another lane is still known.
@example([PUBLISHED, PUBLISHED, REMOVED, PUBLISHED, ("rebuild", 3, 0)])
@example([PUBLISHED, PUBLISHED, REMOVED, PUBLISHED, ("rebuild", 3, 0), ("forget", {3}, 3)])
# A lane that was swept empty takes old versions again.
@example([PUBLISHED, PUBLISHED, REMOVED, ("sweep", 1, []), ("rebuild", 3, 0), ("rebuild", 1, 1)])
def test_any_history_reads_as_its_replay(operations: list[tuple[str, Any, Any]]) -> None:
    """Epochs, sweeps, rebuilds and newcomers' bases change what is stored, never what a version says."""
    with store_in_temporary_folder() as store:
        truth: dict[int, Rows] = {1: {("user", 0): 0.5}}
        changes: dict[int, tuple[int, Rows, frozenset[tuple[str, int]]]] = {}
        store.apply(manifest(1, None, "base"), tensors(truth[1]), now_ms=1, follow=True)
        newest = head = 1
        for clock, (name, first, second) in enumerate(operations, start=2):
            with store.reader() as reader:
                here = [record.version for record in reader.versions()]
            match name:
                case "publish":
                    newest += 1
                    put: Rows = {key: newest + key[1] / 16 for key in sorted(first)}
                    removed = frozenset(second - first)
                    truth[newest] = {k: v for k, v in truth[head].items() if k not in removed} | put
                    changes[newest] = (head, put, removed)
                    if store.accepts(manifest(newest, head)):
                        assert store.apply(manifest(newest, head), tensors(put, removed), now_ms=clock, follow=True)
                    else:
                        assert head not in here
                        store.apply(manifest(newest, head, "base"), tensors(truth[newest]), now_ms=clock, follow=True)
                    head = newest
                case "roll back":
                    head = here[first % len(here)]
                    store.serve(head)
                case "serve":
                    store.serve(here[first % len(here)])
                case "sweep":
                    sweep(store, clock - first, keep=[*second, head])
                case "forget":
                    # Some at any place, and what they leave not to its end.
                    store.drop({here[one % len(here)] for one in first} - {head})
                    store.tidy(second)
                case "compact":
                    # As after a restart, who wrote what is listed is unknown, and what is left to delete is forgotten.
                    store.compact()
                case "base":
                    store.apply(
                        manifest(head, 0, "base"), tensors(truth[head]), now_ms=clock, follow=True, replace=True
                    )
                case "reapply":
                    for version, (parent, put, removed) in sorted(changes.items()):
                        if version not in here and store.accepts(manifest(version, parent)):
                            store.apply(manifest(version, parent), tensors(put, removed), now_ms=clock)
                case "rebuild":
                    version = sorted(truth)[first % len(truth)]
                    line = [version]
                    while line[0] in changes and len(line) <= second:
                        line.insert(0, changes[line[0]][0])
                    store.apply(manifest(line[0], 0, "base"), tensors(truth[line[0]]), now_ms=clock, replace=True)
                    for step in line[1:]:
                        parent, put, removed = changes[step]
                        store.apply(manifest(step, parent), tensors(put, removed), now_ms=clock, replace=True)
            with store.reader() as reader:
                here = [record.version for record in reader.versions()]
                served = reader.served()
            assert served is not None and served.version in here
            for version in here:
                assert read(store, version) == truth[version], version
            check_changed(store, truth)


@given(
    st.lists(st.tuples(st.sets(KEYS, max_size=4), st.sets(KEYS, max_size=2)), min_size=6, max_size=40),
    st.integers(2, 7),
)
def test_versions_of_two_lifetimes_leave_one_entry_a_row_between_those_that_stay(
    steps: list[tuple[set[tuple[str, int]], set[tuple[str, int]]]], every: int
) -> None:
    """Most versions go after a moment, each so many-th later: what is stored is what those that stay read, whatever went before."""
    with store_in_temporary_folder() as store:
        truth: dict[int, Rows] = {1: {}}
        removals: dict[int, Set[tuple[str, int]]] = {}
        store.apply(manifest(1, None, "base"), tensors({}), now_ms=1, follow=True)
        for version, (put, named) in enumerate(steps, start=2):
            fresh = {key: float(version) for key in put}
            # A table removes what it has.
            removals[version] = removed = frozenset(named - put) & truth[version - 1].keys()
            truth[version] = {k: v for k, v in truth[version - 1].items() if k not in removed} | fresh
            store.apply(manifest(version, version - 1), tensors(fresh, removed), now_ms=version, follow=True)
            if version % every == 0:
                here = [one for one in truth if one < version]
                store.drop([one for one in here if one % every or one < version - 3 * every])
                while store.tidy(1):
                    pass
                with store.reader() as reader:
                    stay = [record.version for record in reader.versions()]
                for one in stay:
                    assert read(store, one) == truth[one]
                values = {(key, value) for one in stay for key, value in truth[one].items()}
                # Of a row that was removed between two that stay, and not put again, a tombstone is one more.
                most = len(values)
                for older, newer in itertools.pairwise(stay):
                    between = [removals[one] for one in range(older + 1, newer + 1)]
                    most += len(frozenset().union(*between) - truth[newer].keys())
                assert len(values) <= store.entries() <= most
        last = len(steps) + 2
        store.apply(manifest(last, last - 1), {}, now_ms=last, follow=True)
        sweep(store, last)
        assert store.entries() == len(truth[last - 1]), "no tombstone, and one entry a row"


def test_what_changed_since_a_version_is_known_as_long_as_it_is_here(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0}), now_ms=1)
    for version in (2, 3, 4):
        put = {("user", version): 1.0, ("category", 9): float(version)}
        store.apply(manifest(version, version - 1), tensors(put), now_ms=1, follow=True)
    store.apply(manifest(5, 2, epoch=2), tensors({("user", 3): 5.0}), now_ms=1)
    store.drop([3])
    with store.reader() as reader:
        one, two, four, five = (reader.version(number) for number in (1, 2, 4, 5))
        assert one is not None and two is not None and four is not None and five is not None
        named = [reader.changed("user", *pair) for pair in ((one, four), (two, four), (four, four))]
        assert [[] if ids is None else ids.tolist() for ids in named] == [[2, 3, 4], [3, 4], []]
        assert reader.changed("user", four, five) is None and reader.changed("user", four, two) is None
    store.drop([1])
    with store.reader() as reader:
        assert reader.changed("user", one, four) is None


def test_what_a_process_did_not_live_to_delete_goes_with_the_next_entry_of_its_row(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0}), now_ms=1)
    for version in (2, 3, 4):
        store.apply(manifest(version, version - 1), tensors({("user", 1): float(version)}), now_ms=1, follow=True)
    assert store.drop([1, 2]) == 2
    store.close()
    again = RowStore(tmp_path, 1 << 26)
    assert (again.entries(), read(again, 4)) == (4, {("user", 1): 4.0})
    again.drop([3])
    while again.tidy():
        pass
    assert (again.entries(), read(again, 4)) == (1, {("user", 1): 4.0})


def test_what_is_left_to_look_at_stays_as_much_as_some_rounds_leave(tmp_path: Path) -> None:
    """One look a version, which writes five times what a look takes: entries and what is left do not grow."""
    store, rng, entries = RowStore(tmp_path, 1 << 28), np.random.default_rng(9), list[int]()
    store.apply(manifest(1, None, "base"), tensors({}), now_ms=1, follow=True)
    for version in range(2, 72):
        ids = rng.choice(10 * ROWS_AT_ONCE, 5 * ROWS_AT_ONCE, replace=False)
        put = {("user", int(one)): float(version) for one in ids}
        store.apply(manifest(version, version - 1), tensors(put), now_ms=version, follow=True)
        store.drop([version - 10])
        store.tidy()
        entries.append(store.entries())
    assert max(entries[50:]) < 1.1 * max(entries[30:50])


def test_where_nothing_is_to_be_deleted_nothing_is_written(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0}), now_ms=1, follow=True)
    store.tidy()
    before = (tmp_path / DATA).read_bytes()
    assert store.drop([1, 7]) == 0 and not store.tidy() and sweep(store, 99) == 0
    assert (tmp_path / DATA).read_bytes() == before


def test_a_durable_version_over_the_one_before_it_reads_as_one_line(tmp_path: Path) -> None:
    """A delta of a durable version is over another one of long before; who reads it looks in one interval."""
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0, ("user", 2): 1.0}), now_ms=1)
    for version, parent in ((51, 1), (101, 51)):
        of_line = replace(manifest(version, parent), visible=((1, version),))
        store.apply(of_line, tensors({("user", 1): float(version)}), now_ms=1, follow=True)
    with store.reader() as reader:
        served = reader.served()
        assert served is not None and served.visible == ((1, 101),)
    assert read(store, 101) == {("user", 1): 101.0, ("user", 2): 1.0}
    assert read(store, 51) == {("user", 1): 51.0, ("user", 2): 1.0}


@pytest.mark.parametrize("reopened", [False, True])
def test_a_version_of_many_rows_is_there_at_once_or_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reopened: bool
) -> None:
    """Its rows are written by many transactions; where it ends in between, the next version takes back what is there."""
    store, count = RowStore(tmp_path, 1 << 26), 2 * WRITTEN_AT_ONCE + 120
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0, ("user", 2): 1.0}), now_ms=1, follow=True)
    many = {("user", number): 2.0 for number in range(1, count + 1)}

    def end() -> None:
        assert read(store, 1) == {("user", 1): 1.0, ("user", 2): 1.0}
        raise MemoryError

    monkeypatch.setattr(killpoints, "armed", killpoints.parse("rows.begun:2", end))
    with pytest.raises(MemoryError):
        store.apply(manifest(2, 1), tensors(many), now_ms=2, follow=True)
    assert store.entries() == 2 + 2 * WRITTEN_AT_ONCE
    if reopened:
        store.close()
        store = RowStore(tmp_path, 1 << 26)
    with store.reader() as reader:
        assert reader.version(2) is None
    store.apply(manifest(3, 1), tensors({("category", 3): 3.0}), now_ms=3, follow=True)
    assert store.entries() == 3
    assert read(store, 3) == {("user", 1): 1.0, ("user", 2): 1.0, ("category", 3): 3.0}
    store.apply(manifest(4, 3), tensors(many), now_ms=4, follow=True)
    assert store.entries() == 3 + count
    with store.reader() as reader:
        served = reader.served()
        assert served is not None and served.version == 4
        rows, known = reader.get("user", range(1, count + 1), served)
    assert known.all() and (rows == 2.0).all()


def test_a_version_carries_dense_weights_popular_labels_and_provenance(tmp_path: Path) -> None:
    """What a delta leaves out is its parent's; the record says where the weights come from."""
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({}) | {"dense.b": np.array([2.0], np.float32)}, now_ms=1)
    store.apply(manifest(2, 1), {"dense.w": np.array([[7.0]], np.float32)}, now_ms=77, follow=True)
    with store.reader() as reader:
        served = reader.served()
        assert served is not None
        dense = reader.dense(2)
        # Whole where there are any: another model's do not stay among them.
        assert {name: value.tolist() for name, value in dense.items()} == {"w": [[7.0]]}
        assert reader.popular(2).tolist() == [5, 6]
    assert (served.version, served.event_time_ms, served.applied_at_ms) == (2, 1500, 77)
    assert served.sources == {"ab" * 16 + ":0": 20}
    assert Served.parse(served.to_json()) == served


def test_a_delta_without_its_parent_is_refused(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 1 << 26)
    with pytest.raises(UnknownVersion, match="version 9 builds on version 8"):
        store.apply(manifest(9, 8), tensors({}), now_ms=1)
    with pytest.raises(UnknownVersion, match="version 9 is not applied"):
        store.serve(9)
    with store.reader() as reader:
        assert reader.served() is None and reader.versions() == []


def test_notes_and_pointer_move_together(tmp_path: Path) -> None:
    """A mask and the version it goes with are seen by the same answer, or neither is."""
    store = RowStore(tmp_path, 1 << 26)
    with pytest.raises(UnknownVersion):
        store.steer({"control": b"2"}, version=7)
    with store.reader() as reader:
        assert reader.note("control") is None
    store.apply(manifest(1, None, "base"), tensors({}), now_ms=1)
    store.steer({"control": b"2"}, version=1)
    with store.reader() as reader:
        served = reader.served()
        assert served is not None and (served.version, reader.note("control")) == (1, b"2")


def test_a_dropped_version_that_is_applied_again_keeps_what_it_reads(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 1 << 26)
    store.apply(manifest(1, None, "base"), tensors({("user", 1): 1.0}), now_ms=1)
    for version in (2, 3, 4):
        store.apply(manifest(version, version - 1), tensors({("user", 1): float(version)}), now_ms=1, follow=True)
    store.drop([3])
    store.apply(manifest(3, 2), tensors({("user", 1): 3.0}), now_ms=2)
    while store.tidy():
        pass
    assert [read(store, version)["user", 1] for version in (2, 3, 4)] == [2.0, 3.0, 4.0]
