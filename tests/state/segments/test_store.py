"""The store of members: sizes, pages and memberships agree, and it is begun anew from the topic."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from state.segments.members import (
    LAST_USER,
    Membership,
    SegmentsPlace,
    SegmentStore,
    all_members,
    key_of,
    member_of,
    membership_of,
    value_of,
)

MAP = 1 << 24
names = st.sampled_from(["a", "ab", "b-1"])
users = st.sampled_from([0, 1, 255, 256, LAST_USER])
members = st.tuples(names, users)
memberships = st.builds(Membership, st.integers(-(2**40), 2**40), st.integers(0, 2**63))


@settings(max_examples=40, deadline=None)
@given(commits=st.lists(st.dictionaries(members, st.none() | memberships, max_size=6), max_size=6))
def test_what_is_committed_is_paged_counted_and_found(commits: list[dict[tuple[str, int], Membership | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, kept = SegmentStore(Path(folder) / "s", MAP), dict[tuple[str, int], Membership]()
        for changes in commits:
            store.commit(changes)
            for member, membership in changes.items():
                kept.pop(member, None)
                if membership is not None:
                    kept[member] = membership
        for name in ("a", "ab", "b-1"):
            wanted = sorted((user, one) for (segment, user), one in kept.items() if segment == name)
            assert [one for page in all_members(store, name, 2) for one in page] == wanted
            assert store.sizes().get(name, 0) == len(wanted)
        asked = [(name, user) for name in ("a", "ab", "b-1") for user in (0, 1, 255, 256, LAST_USER)]
        assert store.memberships(asked) == [kept.get(one) for one in asked]
        assert store.place() is None
        store.begin_anew(SegmentsPlace("cd" * 16, {0: 1}))
        store.close()
        again = SegmentStore(Path(folder) / "s", MAP)
        assert (again.sizes(), again.page("a", 0, 9), again.place()) == ({}, [], SegmentsPlace("cd" * 16, {0: 1}))
        again.close()


@given(members, st.none() | memberships.filter(lambda one: one.since_ms >= 0))
def test_a_record_is_read_as_it_was_written(member: tuple[str, int], membership: Membership | None) -> None:
    assert (member_of(key_of(member)), membership_of(value_of(membership))) == (member, membership)


def test_records_of_this_release_stay_as_they_are() -> None:
    """What other programs read; a change needs another topic."""
    assert key_of(("sporty", 0x0123456789ABCDEF)) == b"0123456789abcdef:sporty"
    assert value_of(Membership(1_800_000_000_123, 42)) == (
        b'{"in": true, "since": "2027-01-15T08:00:00.123Z", "since_ms": 1800000000123, "version": 42}'
    )
