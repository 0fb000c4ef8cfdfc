"""Expressions that decide whether a user is in a segment: comparisons of profile values, joined by `and`, `or`, `not`.

    0.3 < interest['Sport']      the probability of a category; 0 if it is not a candidate of the profile
    view.count_7d >= 5           a feature, by its dimension's name; feature['add-to-cart.count_7d'] if that is no word
    user.age_band == '25-34'     an attribute; without a value it equals no text, and `!=` holds
    churn > 0.8                  the probability of no further event; without one no comparison holds

`state/segments/configured.py` parses them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["number", "text", "feature", "interest", "attribute", "churn"]
TEXTS = ("text", "attribute")
"""The kinds of operands that are text; all others are numbers."""
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
WORDS = frozenset(("and", "or", "not"))
_BARE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_PREFIX, _CHURN = "user.", "churn"


class ProfileFacts(NamedTuple):
    """The values of one profile that an expression may use.

    Attributes:
        features: Features by name.
        interests: The probability of each candidate, by its category's name.
        attributes: Attributes by name; None if the user's record has no such value.
        churn: The probability of no further event; None if the profile has none.
    """

    features: Mapping[str, int]
    interests: Mapping[str, float]
    attributes: Mapping[str, str | None]
    churn: float | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand: a constant, or a profile value by name.

    Attributes:
        kind: Kind of the operand.
        what: The constant, or the name; empty for churn.
    """

    kind: Kind
    what: float | str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is text; otherwise it is a number."""
        return self.kind in TEXTS

    def of(self, facts: ProfileFacts) -> float | str | None:
        """Its value in a profile; None if the profile has none."""
        match self.kind:
            case "feature":
                return facts.features.get(str(self.what))
            case "interest":
                return facts.interests.get(str(self.what), 0.0)
            case "attribute":
                return facts.attributes.get(str(self.what))
            case "churn":
                return facts.churn
        return self.what

    def __str__(self) -> str:
        what = str(self.what)
        match self.kind:
            case "number":
                return repr(self.what)
            case "text":
                return quoted(what)
            case "attribute":
                return f"{_PREFIX}{what}"
            case "churn":
                return _CHURN
            case "feature" if is_bare(what):
                return what
        return f"{self.kind}[{quoted(what)}]"


@dataclass(frozen=True, slots=True)
class Relation:
    """A comparison of two operands of one type by one of `COMPARISONS`."""

    left: Operand
    sign: str
    right: Operand

    def holds(self, facts: ProfileFacts) -> bool:
        """Whether the comparison is true for a profile."""
        left, right = self.left.of(facts), self.right.of(facts)
        if not self.left.is_text and (left is None or right is None):
            return False
        return COMPARISONS[self.sign](left, right)

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@dataclass(frozen=True, slots=True)
class Negated:
    """A negated expression."""

    inner: Expression

    def holds(self, facts: ProfileFacts) -> bool:
        """Whether the expression is true for a profile."""
        return not self.inner.holds(facts)

    def __str__(self) -> str:
        return f"not {_inner(self.inner)}"


@dataclass(frozen=True, slots=True)
class Junction:
    """Two or more expressions joined by `and` or `or`.

    Attributes:
        word: `and` or `or`.
        parts: The expressions; none of them is a junction with the same word.
    """

    word: Literal["and", "or"]
    parts: tuple[Expression, ...]

    def holds(self, facts: ProfileFacts) -> bool:
        """Whether the expression is true for a profile."""
        found = (part.holds(facts) for part in self.parts)
        return all(found) if self.word == "and" else any(found)

    def __str__(self) -> str:
        return f" {self.word} ".join(map(_inner, self.parts))


Expression = Relation | Negated | Junction


def _inner(expression: Expression) -> str:
    return f"({expression})" if isinstance(expression, Junction) else str(expression)


def operands(expression: Expression) -> Iterator[Operand]:
    """All operands of an expression.

    >>> [str(one) for one in operands(Relation(Operand("churn"), ">", Operand("number", 0.5)))]
    ['churn', '0.5']
    """
    if isinstance(expression, Relation):
        yield from (expression.left, expression.right)
        return
    for part in (expression.inner,) if isinstance(expression, Negated) else expression.parts:
        yield from operands(part)


def quoted(text: str) -> str:
    """Quotes a text for an expression; quotes in it are doubled.

    >>> quoted("kids' wear")
    "'kids'' wear'"
    """
    return "'" + text.replace("'", "''") + "'"


def is_bare(name: str) -> bool:
    """Whether a feature can be written without quotes: its name is a word that means nothing else.

    >>> is_bare("view.count_7d"), is_bare("add-to-cart.count_7d"), is_bare("user.count_7d"), is_bare("churn")
    (True, False, False, False)
    """
    taken = name in WORDS or name in (_CHURN, "interest", "feature") or name.startswith(_PREFIX)
    return not taken and _BARE.fullmatch(name) is not None
