"""Expressions: what is written is what is read, errors name their column, and what holds is what Python says of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError
from state.segments.configured import DEEPEST, MOST_CHARACTERS, Vocabulary, parse, segments_of, texts_of
from state.segments.expression import (
    COMPARISONS,
    Expression,
    Junction,
    Negated,
    Operand,
    ProfileFacts,
    Relation,
    operands,
)

FEATURES = ("view.count_7d", "label.1.count_1h", "add-to-cart.count_7d", "user.count_7d", "it's", "or")
KNOWN = Vocabulary(FEATURES, ("age_band", "level"), churn=True)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: Operand("number", value))
of_numbers = st.one_of(
    numbers,
    st.sampled_from(FEATURES).map(lambda name: Operand("feature", name)),
    texts.map(lambda name: Operand("interest", name)),
    st.just(Operand("churn")),
)
of_texts = st.one_of(
    texts.map(lambda text: Operand("text", text)),
    st.sampled_from(KNOWN.attributes).map(lambda name: Operand("attribute", name)),
)
comparisons = st.one_of(
    st.builds(Relation, of_numbers, st.sampled_from([*COMPARISONS]), of_numbers),
    st.builds(Relation, of_texts, st.sampled_from(["==", "!="]), of_texts),
)


def joined(word: Any, parts: list[Expression]) -> Expression:
    """Parts that are joined by the same word are parts of the whole."""
    flat = [
        one for part in parts for one in (part.parts if isinstance(part, Junction) and part.word == word else (part,))
    ]
    return Junction(word, tuple(flat))


expressions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(Negated), st.builds(joined, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=4))
    ),
    max_leaves=8,
)
facts = st.builds(
    ProfileFacts,
    st.fixed_dictionaries({name: st.integers(0, 65535) for name in FEATURES}),
    st.dictionaries(texts, st.floats(0, 1), max_size=3),
    st.dictionaries(st.sampled_from(KNOWN.attributes), st.none() | texts, max_size=2),
    st.none() | st.floats(0, 1),
)


@given(expressions)
def test_what_is_written_is_read_as_it_was(expression: Expression) -> None:
    text = str(expression)
    if len(text) <= MOST_CHARACTERS:
        assert parse(text, KNOWN) == expression
        # Blanks mean nothing between tokens.
        assert parse(f"  ( {text} ) ", KNOWN) == expression


def value(operand: Operand, profile: ProfileFacts) -> Any:
    what: Any = operand.what
    if operand.kind == "feature":
        return profile.features[what]
    if operand.kind == "attribute":
        return profile.attributes.get(what)
    if operand.kind == "interest":
        return profile.interests.get(what, 0)
    return profile.churn if operand.kind == "churn" else what


def in_python(expression: Expression, profile: ProfileFacts) -> bool:
    """The same by Python's own operators."""
    if isinstance(expression, Negated):
        return not in_python(expression.inner, profile)
    if isinstance(expression, Junction):
        found = [in_python(part, profile) for part in expression.parts]
        return all(found) if expression.word == "and" else any(found)
    sides = {name: value(one, profile) for name, one in (("a", expression.left), ("b", expression.right))}
    if profile.churn is None and "churn" in (expression.left.kind, expression.right.kind):
        return False
    return bool(eval(f"a {expression.sign} b", sides))


@given(expressions, facts)
def test_what_holds_is_what_python_says(expression: Expression, profile: ProfileFacts) -> None:
    assert expression.holds(profile) == in_python(expression, profile)


pieces = st.sampled_from(
    [
        *COMPARISONS,
        *FEATURES,
        *"()[]'\"=.",
        "and",
        "not ",
        "interest",
        "user.level",
        "churn",
        " 1",
        "0.5",
        "\n",
        "\u00e9",
        "\u2003",
    ]
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_any_text_is_an_expression_or_an_error_with_a_column_in_it(text: str) -> None:
    try:
        parse(text, KNOWN)
    except ValueError as error:
        column = int(str(error).split(":")[0].removeprefix("column "))
        assert 1 <= column <= len(text) + 1


@given(expressions, st.data())
def test_an_expression_that_is_cut_short_is_refused_at_its_end(expression: Expression, data: st.DataObject) -> None:
    """Cut before its last operand, so that what is left wants one more."""
    text = str(Relation(Operand("number", 1.0), "<", Operand("number", 2.0)))
    whole = f"({expression}) and {text}"
    cut = whole[: whole.rindex("2.0")]
    if len(cut) <= MOST_CHARACTERS:
        with pytest.raises(ValueError, match=rf"^column {len(cut) + 1}: a number, a text or a name must stand here"):
            parse(cut, KNOWN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "column 1: a number, a text or a name must stand here, not the end"),
        ("view.count_7d >= 5 5", "column 20: `and`, `or` or the end must stand here, not `5`"),
        ("view.count_7d >=", "column 17: a number, a text or a name must stand here, not the end"),
        ("(view.count_7d >= 5", "column 20: `)`, for the `(` of column 1 must stand here, not the end"),
        ("view.count_7d = 5", "column 15: '= 5' is no part of an expression"),
        ("views.count_7d >= 5", "column 1: views.count_7d is no feature; the nearest is view.count_7d"),
        ("1 < feature['count_7d']", "column 13: count_7d is no feature; the nearest is"),
        ("user.age == 'x'", "column 1: age is no attribute of users; the nearest is age_band"),
        ("user.age_band > 'x'", "column 15: texts are compared with == and !=, not with >"),
        ("user.age_band == 25", "column 15: user.age_band and 25.0 cannot be compared: one is a text"),
        ("interest[Sport] > 0.3", "column 10: a text, in quotes must stand here, not `Sport`"),
        ("interest > 0.3", "column 10: `[` must stand here, not `>`"),
        ("interest['Sport > 0.3", 'column 10: "\'Sport > 0.3" is no part of an expression'),
        ("not " * (DEEPEST + 1) + "churn > 1", f"column {4 * DEEPEST + 1}: more than {DEEPEST} parentheses"),
        ("1 < 2 " + " " * MOST_CHARACTERS, f"column {MOST_CHARACTERS + 1}: an expression has {MOST_CHARACTERS}"),
        ("__import__('os') == 1", "column 1: __import__ is no feature"),
    ],
)
def test_errors_name_their_column(text: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(text, KNOWN)
    assert str(refused.value).startswith(said)


def test_without_churn_in_profiles_an_expression_that_asks_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^column 10: profiles say nothing of churn; set churn.days"):
        parse("1 < 2 or churn > 0.5", KNOWN._replace(churn=False))


def test_all_operands_are_named() -> None:
    found = parse("not (view.count_7d > 1 or interest['a'] > 0.5) and user.level == 'gold'", KNOWN)
    assert [one.kind for one in operands(found)] == ["feature", "number", "interest", "number", "attribute", "text"]


def from_file(tmp_path: Any, text: str) -> Settings:
    (tmp_path / "springtide.toml").write_text(text)
    return load([], env={}, path=tmp_path / "springtide.toml")


def test_segments_are_keys_of_their_section_and_reach_child_processes(tmp_path: Any) -> None:
    settings = from_file(
        tmp_path,
        '[attributes]\nuser_topic = "users"\nuser_fields = ["age_band"]\n'
        "[segments]\nsweep_s = 5\n"
        "sporty = \"interest['Sport, shoes'] > 0.3 and user.age_band == '25-34'\"\nbusy = \"view.count_1d >= 20\"\n",
    )
    assert [*texts_of(settings)] == ["sporty", "busy"] and settings.segments.sweep_s == 5.0
    child = load([], env=settings.environment(), path="/dev/null")
    assert segments_of(child) == segments_of(settings)
    assert str(segments_of(child)["sporty"].expression) == texts_of(settings)["sporty"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[segments]\nbusy = 'views >= 20'\n", "springtide.toml:1: segment busy, column 1: views is no feature"),
        ("[segments]\nbusy = 20\n", "springtide.toml:2: segments.busy must be a text, not 20"),
        ("[segments]\n'a b' = '1 < 2'\n", "springtide.toml:1: segment 'a b=1 < 2' has no name"),
        ("[segments]\nexpressions = ['a=1 < 2']\na = '1 < 2'\n", "two segments are called a"),
        ("[segments]\na = \"user.age == 'x'\"\n", "column 1: age is no attribute of users, for there are none"),
        ("[segments]\na = 'churn > 0.5'\n", "segment a, column 1: profiles say nothing of churn; set churn.days"),
    ],
)
def test_settings_that_name_no_segment_are_refused_with_their_place(tmp_path: Any, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        segments_of(from_file(tmp_path, text))
    assert said in str(refused.value)
