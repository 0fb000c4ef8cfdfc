"""Segments: expressions, and the store of their members."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError
from state.segments import (
    DEEPEST,
    LAST_USER,
    MOST_CHARACTERS,
    Membership,
    ProfileFacts,
    SegmentsPosition,
    SegmentStore,
    Vocabulary,
    all_members,
    key_of,
    member_of,
    membership_of,
    parse,
    segments_of,
    texts_of,
    value_of,
)

MAP = 1 << 24
names = st.sampled_from(["a", "ab", "b-1"])
users = st.sampled_from([0, 1, 255, 256, LAST_USER])
members = st.tuples(names, users)
memberships = st.builds(Membership, st.integers(-(2**40), 2**40), st.integers(0, 2**63))


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
        assert store.position() is None
        store.restart_at(SegmentsPosition("cd" * 16, {0: 1}))
        store.close()
        again = SegmentStore(Path(folder) / "s", MAP)
        assert (again.sizes(), again.page("a", 0, 9), again.position()) == ({}, [], SegmentsPosition("cd" * 16, {0: 1}))
        again.close()


@given(members, st.none() | memberships.filter(lambda one: one.since_ms >= 0))
def test_a_record_is_read_as_it_was_written(member: tuple[str, int], membership: Membership | None) -> None:
    assert (member_of(key_of(member)), membership_of(value_of(membership))) == (member, membership)


def test_records_of_this_release_stay_as_they_are() -> None:
    assert key_of(("sporty", 0x0123456789ABCDEF)) == b"0123456789abcdef:sporty"
    assert value_of(Membership(1_800_000_000_123, 42)) == (
        b'{"in": true, "since": "2027-01-15T08:00:00.123Z", "since_ms": 1800000000123, "version": 42}'
    )


NAMED = ("view.count_7d", "events.visible")
QUOTED = ("label.1.count_1h", "add-to-cart.count_7d", "user.count_7d", "it's", "or")
KNOWN = Vocabulary((*NAMED, *QUOTED), ("age_band", "level"), churn=True)
SIGNS = (">=", "<=", "==", "!=", ">", "<")

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from([*NAMED, *(f"feature[{name!r}]" for name in QUOTED)]),
    texts.map(lambda name: f"interest[{name!r}]"),
)
strings = st.one_of(texts.map(repr), st.sampled_from(["user.age_band", "user.level"]))
comparisons = st.one_of(
    st.tuples(numbers, st.sampled_from(SIGNS), numbers), st.tuples(strings, st.sampled_from(["==", "!="]), strings)
).map(" ".join)
expressions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(lambda text: f"not ({text})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
    ),
    max_leaves=8,
)
facts = st.builds(
    ProfileFacts,
    st.fixed_dictionaries({name: st.integers(0, 65535) for name in KNOWN.features}),
    st.dictionaries(texts, st.floats(0, 1), max_size=3),
    st.fixed_dictionaries({name: st.none() | texts for name in KNOWN.attributes}),
)


@given(expressions, facts)
def test_what_holds_is_what_python_says(text: str, profile: ProfileFacts) -> None:
    features = dict(profile.features)
    names = {
        "view": SimpleNamespace(count_7d=features["view.count_7d"]),
        "events": SimpleNamespace(visible=features["events.visible"]),
        "feature": features,
        "interest": defaultdict(float, profile.interests),
        "user": SimpleNamespace(**profile.attributes),
    }
    if len(text) <= MOST_CHARACTERS:
        assert parse(f" {text} ", KNOWN).holds(profile) == eval(text, names)


pieces = st.sampled_from(
    [
        *SIGNS,
        *NAMED,
        *"()[]'\"=.#\\",
        "and",
        "not ",
        "interest",
        "user.level",
        "churn",
        " 1",
        "0.5",
        "\n",
        "\0",
        "\u00e9",
    ]
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_any_text_is_an_expression_or_an_error_with_a_column_in_it(text: str) -> None:
    try:
        parse(text, KNOWN)
    except ValueError as error:
        column = int(str(error).split(":")[0].removeprefix("column "))
        assert 1 <= column <= len(text) + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: invalid syntax"),
        ("view.count_7d >= 5 5", "column 20: invalid syntax"),
        ("  view.count_7d >=", "column 19: invalid syntax"),
        ("(view.count_7d >= 5", "column 1: '(' was never closed"),
        ("1 < view.count_7d < 5", "column 1: a comparison of two values must stand here"),
        ("view.count_7d", "column 1: a comparison of two values must stand here"),
        ("1 < 2 # and so on", "column 7: an expression has no comments"),
        ("views.count_7d >= 5", "column 1: views.count_7d is no feature; the nearest is view.count_7d"),
        ("'é' == 'e' and views > 5", "column 16: views is no feature"),
        ("1 < feature['count_7d']", "column 13: count_7d is no feature; the nearest is"),
        ("user.age == 'x'", "column 1: age is no attribute of users; the nearest is age_band"),
        ("user.age_band > 'x'", "column 1: texts are compared with == and != alone"),
        ("user.age_band == 25", "column 1: user.age_band and 25 cannot be compared: one is a text"),
        ("interest[Sport] > 0.3", "column 10: a text in quotes must stand here"),
        ("1 + 1 > 1", "column 1: a number, a text or a name must stand here"),
        ("True == 1", "column 1: a number, a text or a name must stand here"),
        (f"1{'0' * 400} > 1", "column 1: the number is too large"),
        ("not " * (DEEPEST + 1) + "churn > 1", f"column {4 * DEEPEST + 5}: more than {DEEPEST} `and`"),
        ("not " * 400 + "churn > 1", f"column {4 * DEEPEST + 5}: more than {DEEPEST} `and`"),
        ("1 < 2 " + " " * MOST_CHARACTERS, f"column {MOST_CHARACTERS + 1}: an expression has {MOST_CHARACTERS}"),
        ("__import__('os') == 1", "column 1: a number, a text or a name must stand here"),
    ],
)
def test_errors_name_their_column(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(text, KNOWN)
    assert str(refused.value).startswith(message)


def test_churn_holds_only_where_it_is_known_and_is_refused_where_profiles_have_none() -> None:
    asked = parse("not churn > 0.5 or churn <= 0.5", KNOWN)
    assert not parse("churn <= 0.5", KNOWN).holds(ProfileFacts({}, {}, {}))
    assert asked.holds(ProfileFacts({}, {}, {}, 0.1)) and asked.kinds == {"churn"}
    with pytest.raises(ValueError, match=r"^column 10: profiles contain no churn; set churn.days"):
        parse("1 < 2 or churn > 0.5", KNOWN._replace(churn=False))


def from_file(tmp_path: Any, text: str) -> Settings:
    (tmp_path / "springtide.toml").write_text(text)
    return load([], env={}, path=tmp_path / "springtide.toml")


def test_segments_are_keys_of_their_section_and_reach_child_processes(tmp_path: Any) -> None:
    settings = from_file(
        tmp_path,
        '[attributes]\nuser_topic = "users"\nuser_fields = ["age_band"]\n'
        "[segments]\nlookalikes = 5\n"
        "sporty = \"interest['Sport, shoes'] > 0.3 and user.age_band == '25-34'\"\nbusy = \"view.count_1d >= 20\"\n",
    )
    assert [*texts_of(settings)] == ["sporty", "busy"] and settings.segments.lookalikes == 5
    child = load([], env=settings.environment(), path="/dev/null")
    assert texts_of(child) == texts_of(settings) and [*segments_of(child)] == ["sporty", "busy"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[segments]\nbusy = 'views >= 20'\n", "springtide.toml:1: segment busy, column 1: views is no feature"),
        ("[segments]\nbusy = 20\n", "springtide.toml:2: segments.busy must be a text, not 20"),
        ("[segments]\n'a b' = '1 < 2'\n", "springtide.toml:1: segment 'a b=1 < 2' has no name"),
        ("[segments]\nexpressions = ['a=1 < 2']\na = '1 < 2'\n", "two segments are called a"),
        ("[segments]\na = \"user.age == 'x'\"\n", "column 1: age is no attribute of users, for there are none"),
        ("[segments]\na = 'churn > 0.5'\n", "segment a, column 1: profiles contain no churn; set churn.days"),
    ],
)
def test_settings_that_name_no_segment_are_refused_with_their_place(tmp_path: Any, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        segments_of(from_file(tmp_path, text))
    assert said in str(refused.value)
