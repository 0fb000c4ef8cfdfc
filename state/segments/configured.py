"""Reads and checks the segments that the settings define.

    expression   all { "or" all }
    all          one { "and" one }
    one          "not" one | "(" expression ")" | operand sign operand
    operand      number | text | NAME | user.NAME | churn | interest[text] | feature[text]
    sign         >= <= == != > <

`parse` is a recursive-descent parser for this grammar; its errors give the column and the nearest known name. It is
written by hand because the grammar has only five rules. A library's grammar file, tree classes and translation of
errors would take as many lines.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from state.config.fields import fields_of
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.segments.expression import COMPARISONS, WORDS, Expression, Junction, Negated, Operand, Relation

MOST_CHARACTERS = 2000
DEEPEST = 50
"""Nesting limit of parentheses and `not`."""
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<name>[A-Za-z_]\w*(?:\.\w+)*)
    |(?P<sign>>=|<=|==|!=|[><])
    |(?P<mark>[()\[\]])
    |(?P<end>$))""",
    re.VERBOSE | re.ASCII,
)
_SIGNS = ", ".join(COMPARISONS)

MOST_SEGMENTS = 64
"""Each is a value of a metric's label, and is evaluated for each user who clicked."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SETTING = "segments.expressions"


class Vocabulary(NamedTuple):
    """The names that an expression may use.

    Attributes:
        features: The names of the features.
        attributes: The names of users' attributes.
        churn: Whether profiles have a churn probability.
    """

    features: Collection[str]
    attributes: Collection[str]
    churn: bool = False


class _Token(NamedTuple):
    """A token: its kind, its text, and its column, from 1 on."""

    kind: str
    text: str
    column: int


def parse(text: str, known: Vocabulary) -> Expression:
    """Parses an expression.

    >>> known = Vocabulary(["view.count_7d"], ["age_band"])
    >>> str(parse("view.count_7d>=5 and(not interest['Sport'] < .3)", known))
    Traceback (most recent call last):
    ValueError: column 46: '.3)' is no part of an expression: write numbers as 0.3, texts in quotes
    >>> str(parse("view.count_7d>=5 and(not interest['Sport'] < 0.3)", known))
    "view.count_7d >= 5.0 and not interest['Sport'] < 0.3"

    Args:
        text: The expression.
        known: The names that it may use.

    Raises:
        ValueError: It is not an expression, or uses an unknown name; the message begins with the column.
    """
    if len(text) > MOST_CHARACTERS:
        raise _wrong(MOST_CHARACTERS + 1, f"an expression has {MOST_CHARACTERS} characters at most")
    return _Descent(list(_tokens(text)), known).whole()


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        found = _TOKEN.match(text, at)
        if found is None:
            at = len(text) - len(text[at:].lstrip(" \t\n\r\f\v"))
            raise _wrong(
                at + 1, f"{text[at : at + 20]!r} is no part of an expression: write numbers as 0.3, texts in quotes"
            )
        kind = str(found.lastgroup)
        yield _Token(kind, found[kind], found.start(kind) + 1)
        if kind == "end":
            return
        at = found.end()


class _Descent:
    """A recursive-descent parser that reads the tokens once."""

    def __init__(self, tokens: list[_Token], known: Vocabulary) -> None:
        self._tokens, self._known, self._at, self._depth = tokens, known, 0, 0

    def whole(self) -> Expression:
        found = self._any()
        if self._next.kind != "end":
            raise self._expected("`and`, `or` or the end")
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _took(self, text: str) -> bool:
        """Whether the next token is this word or mark; if so, it is consumed."""
        found = self._next.text == text and self._next.kind in ("name", "mark")
        self._at += found
        return found

    def _any(self) -> Expression:
        return self._joined("or", self._all)

    def _all(self) -> Expression:
        return self._joined("and", self._one)

    def _joined(self, word: str, part: Callable[[], Expression]) -> Expression:
        parts = [part()]
        while self._took(word):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        flat = [inner for one in parts for inner in _parts(one, word)]
        return Junction("and" if word == "and" else "or", tuple(flat))

    def _one(self) -> Expression:
        begin = self._next
        self._depth += 1
        if self._depth > DEEPEST:
            raise _wrong(begin.column, f"more than {DEEPEST} parentheses and `not` inside one another")
        found: Expression
        if self._took("not"):
            found = Negated(self._one())
        elif self._took("("):
            found = self._any()
            if not self._took(")"):
                raise self._expected(f"`)`, for the `(` of column {begin.column}")
        else:
            found = self._compared()
        self._depth -= 1
        return found

    def _compared(self) -> Relation:
        left = self._operand()
        if self._next.kind != "sign":
            raise self._expected(f"one of {_SIGNS}")
        sign = self._take()
        right = self._operand()
        if left.is_text != right.is_text:
            raise _wrong(sign.column, f"{left} and {right} cannot be compared: one is a text, the other a number")
        if left.is_text and sign.text not in ("==", "!="):
            raise _wrong(sign.column, f"texts are compared with == and !=, not with {sign.text}")
        return Relation(left, sign.text, right)

    def _operand(self) -> Operand:
        token = self._next
        if token.kind not in ("number", "text", "name") or token.text in WORDS:
            raise self._expected("a number, a text or a name")
        self._at += 1
        if token.kind == "number":
            return Operand("number", float(token.text))
        if token.kind == "text":
            return Operand("text", _unquoted(token))
        if token.text == "interest":
            return Operand("interest", self._index())
        if token.text == "feature":
            column = self._tokens[min(self._at + 1, len(self._tokens) - 1)].column
            return self._named("feature", self._index(), self._known.features, column)
        if token.text == "churn":
            if not self._known.churn:
                raise _wrong(token.column, "profiles say nothing of churn; set churn.days")
            return Operand("churn")
        if token.text.startswith("user."):
            return self._named("attribute", token.text.removeprefix("user."), self._known.attributes, token.column)
        return self._named("feature", token.text, self._known.features, token.column)

    def _index(self) -> str:
        """The text in the brackets after a word."""
        if not self._took("["):
            raise self._expected("`[`")
        if self._next.kind != "text":
            raise self._expected("a text, in quotes")
        found = _unquoted(self._take())
        if not self._took("]"):
            raise self._expected("`]`")
        return found

    def _named(self, kind: str, name: str, there: Collection[str], column: int) -> Operand:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
            listed = f"; the nearest is {near[0]}" if near else ", for there are none"
            raise _wrong(column, f"{name} is no {'attribute of users' if kind == 'attribute' else kind}{listed}")
        return Operand("attribute" if kind == "attribute" else "feature", name)

    def _expected(self, what: str) -> ValueError:
        found = f"`{self._next.text}`" if self._next.text else "the end"
        return _wrong(self._next.column, f"{what} must stand here, not {found}")


def _parts(expression: Expression, word: str) -> tuple[Expression, ...]:
    return expression.parts if isinstance(expression, Junction) and expression.word == word else (expression,)


def _unquoted(token: _Token) -> str:
    quote = token.text[0]
    return token.text[1:-1].replace(quote * 2, quote)


def _wrong(column: int, what: str) -> ValueError:
    return ValueError(f"column {column}: {what}")


class Segment(NamedTuple):
    """One segment: its name, its expression as written in the settings, and the parsed expression."""

    name: str
    text: str
    expression: Expression


def texts_of(settings: Settings) -> dict[str, str]:
    """The expression of each segment by name, as written and unchecked.

    >>> from state.config.sections import SegmentSettings
    >>> texts_of(Settings(segments=SegmentSettings(expressions=("busy=view.count_1d >= 20",))))
    {'busy': 'view.count_1d >= 20'}
    """
    return {
        name.strip(): text.strip() for name, _, text in (one.partition("=") for one in settings.segments.expressions)
    }


def vocabulary(settings: Settings) -> Vocabulary:
    """The names that an expression of this deployment may use."""
    wanted = settings.attributes
    return Vocabulary(
        features=FeatureSpec.from_settings(settings).names,
        attributes=tuple(one.name for one in fields_of(wanted.user_fields)) if wanted.user_topic else (),
        churn=bool(settings.churn.days),
    )


def segments_of(settings: Settings) -> Mapping[str, Segment]:
    """The segments by name, in their order; empty if none are configured.

    Raises:
        SettingsError: A segment has no name, a duplicate name, or an invalid expression; the error has the column.
    """
    written = settings.segments.expressions
    origin = settings.origins.get(SETTING, SETTING)
    if len(written) > MOST_SEGMENTS:
        raise SettingsError(f"{origin}: {len(written)} segments", f"name {MOST_SEGMENTS} at most")
    if not written:
        return {}
    known, found = vocabulary(settings), dict[str, Segment]()
    for one in written:
        name, equals, text = (part.strip() for part in one.partition("="))
        if not equals or NAME.fullmatch(name) is None:
            raise SettingsError(
                f"{origin}: segment {one[:80]!r} has no name",
                "write NAME = EXPRESSION; a name has 1 to 64 letters, digits, dashes and underscores",
            )
        if name in found:
            raise SettingsError(f"{origin}: two segments are called {name}", "give each a name of its own")
        try:
            found[name] = Segment(name, text, parse(text, known))
        except ValueError as error:
            raise SettingsError(f"{origin}: segment {name}, {error}", f"correct it: {text}") from None
    return found
