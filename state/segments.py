"""Segments: named groups of users, defined by expressions over their profiles, and their stored members and lookalikes.

**Expressions** decide which users are members.

    0.3 < interest['Sport']      the probability of a category; 0 if it is not a candidate of the profile
    view.count_7d >= 5           a feature by name; feature['add-to-cart.count_7d'] if it is not an identifier
    user.age_band == '25-34'     an attribute; without a value it equals no text, and `!=` holds
    churn > 0.8                  the probability of no further event; without one no comparison holds

Expressions are comparisons of two such values or constants, joined by `and`, `or`, `not` and parentheses. They have
Python's syntax and are read by its parser, but are never executed: each node of the tree must be one of these.

**Members** are records of a compacted topic, and this host has a copy of it in LMDB. Other programs read the topic, so
a change of the format of its records needs another topic. If the copy cannot be trusted, it is rebuilt from the
beginning of the topic.

Lookalikes are the users nearest to a segment's members, in one file per segment for the workers of this host. The
process that stores members removes all files when control changes, so none contains an erased user.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import operator
import re
import struct
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import msgspec

from state.config.settings import Settings
from state.config.sources import fields_of
from state.disk import documents
from state.disk import files as durable
from state.disk.lmdb_store import LmdbStore, keys_with
from state.errors import CorruptStore, SettingsError
from state.features.spec import FeatureSpec

MOST_CHARACTERS = 2000
DEEPEST = 50
"""Nesting limit of `and`, `or` and `not`."""
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
}
MOST_SEGMENTS = 64
"""Each is a value of a metric's label, and is evaluated for each user who clicked."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SETTING = "segments.expressions"


class Vocabulary(NamedTuple):
    """The features and users' attributes that an expression may use, and whether profiles have a churn probability."""

    features: Collection[str]
    attributes: Collection[str]
    churn: bool = False


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


Test = Callable[[ProfileFacts], bool]


class Expression(NamedTuple):
    """A checked expression: whether it holds for a profile, and the kinds of values that it reads.

    The kinds are feature, interest, attribute and churn.
    """

    holds: Test
    kinds: frozenset[str]


class _Operand(NamedTuple):
    """One side of a comparison."""

    is_text: bool
    value: Callable[[ProfileFacts], float | str | None]


def parse(text: str, vocabulary: Vocabulary) -> Expression:
    """Checks an expression; `vocabulary` has the names that it may use.

    >>> known = Vocabulary(["view.count_7d"], ["age_band"])
    >>> asked = parse("view.count_7d>=5 and(not interest['Sport'] < 0.3)", known)
    >>> asked.holds(ProfileFacts({"view.count_7d": 5}, {"Sport": 0.4}, {})), sorted(asked.kinds)
    (True, ['feature', 'interest'])

    Raises:
        ValueError: It is not an expression, or uses an unknown name; the message begins with the column, from 1 on.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"column {MOST_CHARACTERS + 1}: an expression has {MOST_CHARACTERS} characters at most")
    return _Checker(text, vocabulary).expression()


class _Checker:
    """Turns the tree of one expression into functions."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        # Joins the text to one line, so that each offset is a column.
        self._text, self._known = re.sub(r"\s", " ", text), vocabulary
        self._indent = len(self._text) - len(self._text.lstrip())
        self._kinds: set[str] = set()

    def expression(self) -> Expression:
        source = self._text.strip()
        try:
            tree = ast.parse(source, mode="eval")
        except SyntaxError as error:
            # At the end of the text the parser's offset is 0.
            raise self._error(min((error.offset or len(source) + 1) - 1, len(source)), error.msg) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._error(0, str(error) or "too many parentheses inside one another") from None
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                raise self._error(token.start[1], "an expression has no comments")
        return Expression(self._test(tree.body, 0), frozenset(self._kinds))

    def _test(self, node: ast.expr, depth: int) -> Test:
        if depth > DEEPEST:
            raise self._wrong(node, f"more than {DEEPEST} `and`, `or` and `not` inside one another")
        match node:
            case ast.BoolOp(op=word, values=values):
                parts = [self._test(value, depth + 1) for value in values]
                if isinstance(word, ast.And):
                    return lambda facts: all(part(facts) for part in parts)
                return lambda facts: any(part(facts) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                part = self._test(inner, depth + 1)
                return lambda facts: not part(facts)
            case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in COMPARISONS:
                return self._comparison(node, left, sign, right)
        raise self._wrong(node, "a comparison of two values must stand here, such as view.count_7d >= 5")

    def _comparison(self, node: ast.expr, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Test:
        first, second, compare = self._operand(left), self._operand(right), COMPARISONS[type(sign)]
        if first.is_text != second.is_text:
            problem = (
                f"{ast.unparse(left)} and {ast.unparse(right)} cannot be compared: one is a text, the other a number"
            )
            raise self._wrong(node, problem)
        if first.is_text:
            if not isinstance(sign, ast.Eq | ast.NotEq):
                raise self._wrong(node, "texts are compared with == and != alone")
            return lambda facts: compare(first.value(facts), second.value(facts))

        def holds(facts: ProfileFacts) -> bool:
            first_value, second_value = first.value(facts), second.value(facts)
            return first_value is not None and second_value is not None and compare(first_value, second_value)

        return holds

    def _operand(self, node: ast.expr) -> _Operand:
        match node:
            case ast.Constant(value=str(text)):
                return _Operand(True, lambda facts: text)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number) | float(number))):
                return self._number(node, -number)
            case ast.Constant(value=int(number) | float(number)) if not isinstance(number, bool):
                return self._number(node, number)
            case ast.Subscript(value=ast.Name(id="interest"), slice=ast.Constant(value=str(name))):
                self._kinds.add("interest")
                return _Operand(False, lambda facts: facts.interests.get(name, 0.0))
            case ast.Subscript(value=ast.Name(id="feature"), slice=ast.Constant(value=str(name)) as index):
                return self._feature(index, name)
            case ast.Subscript(value=ast.Name(id="interest" | "feature"), slice=index):
                raise self._wrong(index, "a text in quotes must stand here")
            case ast.Name(id="churn"):
                if not self._known.churn:
                    raise self._wrong(node, "profiles contain no churn; set churn.days")
                self._kinds.add("churn")
                return _Operand(False, lambda facts: facts.churn)
        dotted = _dotted(node)
        if dotted is None:
            raise self._wrong(node, "a number, a text or a name must stand here")
        if not dotted.startswith("user."):
            return self._feature(node, dotted)
        attribute = dotted.removeprefix("user.")
        self._require(node, attribute, self._known.attributes, "attribute of users")
        self._kinds.add("attribute")
        return _Operand(True, lambda facts: facts.attributes.get(attribute))

    def _number(self, node: ast.expr, number: float) -> _Operand:
        try:
            value = float(number)
        except OverflowError:
            raise self._wrong(node, "the number is too large") from None
        return _Operand(False, lambda facts: value)

    def _feature(self, node: ast.expr, name: str) -> _Operand:
        self._require(node, name, self._known.features, "feature")
        self._kinds.add("feature")
        return _Operand(False, lambda facts: facts.features.get(name))

    def _require(self, node: ast.expr, name: str, names: Collection[str], kind: str) -> None:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise self._wrong(
                node, f"{name} is no {kind}{f'; the nearest is {near[0]}' if near else ', for there are none'}"
            )

    def _wrong(self, node: ast.expr, problem: str) -> ValueError:
        # The parser counts bytes.
        return self._error(len(self._text.strip().encode()[: node.col_offset].decode()), problem)

    def _error(self, offset: int, problem: str) -> ValueError:
        return ValueError(f"column {self._indent + offset + 1}: {problem}")


def _dotted(node: ast.expr) -> str | None:
    """The name that is written as `a.b.c`; None if another expression is written."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            before = _dotted(inner)
            return None if before is None else f"{before}.{name}"
    return None


class Segment(NamedTuple):
    """One segment: its name, its expression as written in the settings, and the checked expression."""

    name: str
    text: str
    expression: Expression


def texts_of(settings: Settings) -> dict[str, str]:
    """The expression of each segment by name, as written and unchecked."""
    return {
        name.strip(): text.strip()
        for name, _, text in (expression.partition("=") for expression in settings.segments.expressions)
    }


def segments_of(settings: Settings) -> Mapping[str, Segment]:
    """The segments by name, in their order; empty if none are configured.

    Raises:
        SettingsError: A segment has no name, a duplicate name, or an invalid expression; the error has the column.
    """
    written, segments = settings.segments.expressions, dict[str, Segment]()
    if not written:
        return segments
    origin = settings.origins.get(SETTING, SETTING)
    if len(written) > MOST_SEGMENTS:
        raise SettingsError(f"{origin}: {len(written)} segments", f"name {MOST_SEGMENTS} at most")
    users = settings.attributes
    vocabulary = Vocabulary(
        features=FeatureSpec.from_settings(settings).names,
        attributes=tuple(field.name for field in fields_of(users.user_fields)) if users.user_topic else (),
        churn=bool(settings.churn.days),
    )
    for definition in written:
        name, equals, text = (part.strip() for part in definition.partition("="))
        if not equals or NAME.fullmatch(name) is None:
            raise SettingsError(
                f"{origin}: segment {definition[:80]!r} has no name",
                "write NAME = EXPRESSION; a name has 1 to 64 letters, digits, dashes and underscores",
            )
        if name in segments:
            raise SettingsError(f"{origin}: two segments are called {name}", "give each a name of its own")
        try:
            segments[name] = Segment(name, text, parse(text, vocabulary))
        except ValueError as error:
            raise SettingsError(f"{origin}: segment {name}, {error}", f"correct it: {text}") from None
    return segments


_KEY = re.compile(rb"([0-9a-f]{16}):([A-Za-z0-9_-]{1,64})")


class Membership(NamedTuple):
    """When a user joined a segment, milliseconds since the Unix epoch, and by which version."""

    since_ms: int
    version: int


Member = tuple[str, int]
"""A segment's name, and a pseudonym."""


def key_of(member: Member) -> bytes:
    """The key of a record."""
    segment, user = member
    return b"%016x:%b" % (user, segment.encode())


def value_of(membership: Membership | None) -> bytes | None:
    """The value of a record; None, a tombstone, for a user who is out.

    >>> value_of(Membership(1500, 7))
    b'{"in": true, "since": "1970-01-01T00:00:01.500Z", "since_ms": 1500, "version": 7}'
    """
    if membership is None:
        return None
    since = datetime.fromtimestamp(membership.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
    fields = {"in": True, "since": since.replace("+00:00", "Z"), "since_ms": membership.since_ms}
    return json.dumps(fields | {"version": membership.version}).encode()


def member_of(key: bytes | None) -> Member | None:
    """Segment and user of a record with this key; None if the key is malformed.

    >>> member_of(b"00000000000000ab:sporty"), member_of(b"ab"), member_of(None)
    (('sporty', 171), None, None)
    """
    match = _KEY.fullmatch(key or b"")
    return None if match is None else (match[2].decode(), int(match[1], 16))


def membership_of(value: bytes | None) -> Membership | None:
    """The membership in a record's value; None for a tombstone, ValueError if it is not a record of a membership.

    >>> membership_of(value_of(Membership(1500, 7))), membership_of(None)
    (Membership(since_ms=1500, version=7), None)
    """
    if value is None:
        return None
    try:
        fields = json.loads(value)
        return Membership(int(fields["since_ms"]), int(fields["version"])) if fields["in"] is True else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record of a membership: {error}") from None


_VALUE = struct.Struct(">qQ")
_POSITION, _SIZE = b"place", b"size:"
LAST_USER = (1 << 64) - 1


@dataclass(frozen=True)
class SegmentsPosition:
    """The topic, by its id, and the next offset of each partition up to which it was read."""

    topic_id: str
    next: Mapping[int, int]


class SegmentStore(LmdbStore):
    """Members by segment and pseudonym. One thread commits; any thread of any process may read.

    The arguments are those of `LmdbStore`.
    """

    noun = "members of segments"
    databases = ("members",)
    writer = "`springtide segments run`"
    remedy = "remove it: it is read again from Kafka"
    origin = "Kafka"

    def _bind(self) -> None:
        self._members = self._databases["members"]

    def position(self) -> SegmentsPosition | None:
        """The position up to which the topic was read; None before anything was read."""
        stored = self._stored(_POSITION)
        return None if stored is None else documents.decode(stored, SegmentsPosition)

    def sizes(self) -> dict[str, int]:
        """The number of members of each segment, in one snapshot; empty segments may be missing."""
        with self._env.begin(db=self._meta) as transaction:
            entries = keys_with(transaction.cursor(), _SIZE, _SIZE)
        return {key[len(_SIZE) :].decode(): int(value) for key, value in entries}

    def memberships(self, members: Sequence[Member]) -> list[Membership | None]:
        """The membership of each user in the segment, in one snapshot; None for a user who is not in it."""
        with self._env.begin(db=self._members) as transaction:
            values = [transaction.get(_key(member)) for member in members]
        return [None if value is None else Membership(*_VALUE.unpack(value)) for value in values]

    def page(self, segment: str, start: int, most: int) -> list[tuple[int, Membership]]:
        """The first `most` members of a segment from the pseudonym `start` on, in the order of pseudonyms."""
        prefix = _prefix(segment)
        with self._env.begin(db=self._members) as transaction:
            pairs = keys_with(transaction.cursor(), prefix, _key((segment, start)), most)
        return [(int.from_bytes(key[len(prefix) :], "big"), Membership(*_VALUE.unpack(value))) for key, value in pairs]

    def commit(self, changes: Mapping[Member, Membership | None], position: SegmentsPosition | None = None) -> None:
        """Adds members, or removes those with None, and stores `position`, if given, as the position; atomic."""
        moved = dict[str, int]()
        with self._write() as transaction:
            for member, membership in changes.items():
                key = _key(member)
                was = transaction.get(key, db=self._members) is not None
                if membership is not None:
                    transaction.put(key, _VALUE.pack(*membership), db=self._members)
                elif was:
                    transaction.delete(key, db=self._members)
                moved[member[0]] = moved.get(member[0], 0) + (membership is not None) - was
            self._note(transaction, moved, position)

    def restart_at(self, position: SegmentsPosition) -> None:
        """Deletes everything; the topic is then read again from `position`."""
        sizes = {name: -size for name, size in self.sizes().items()}
        with self._write() as transaction:
            transaction.drop(self._members, delete=False)
            self._note(transaction, sizes, position)

    def _note(self, transaction: lmdb.Transaction, moved: Mapping[str, int], position: SegmentsPosition | None) -> None:
        for name, change in moved.items():
            key = _SIZE + name.encode()
            size = int(transaction.get(key, db=self._meta) or 0) + change
            if size:
                transaction.put(key, b"%d" % size, db=self._meta)
            else:
                transaction.delete(key, db=self._meta)
        if position is not None:
            transaction.put(_POSITION, msgspec.json.encode(position), db=self._meta)


def all_members(store: SegmentStore, segment: str, at_once: int = 1000) -> Iterator[list[tuple[int, Membership]]]:
    """All members of a segment in the order of pseudonyms, in pages. Concurrent changes may be missed."""
    start: int | None = 0
    while start is not None:
        page = store.page(segment, start, at_once)
        start = page[-1][0] + 1 if len(page) == at_once and page[-1][0] < LAST_USER else None
        if page:
            yield page


def _prefix(segment: str) -> bytes:
    return segment.encode() + b"\0"


def _key(member: Member) -> bytes:
    segment, user = member
    return _prefix(segment) + user.to_bytes(8, "big")


class NearUser(NamedTuple):
    """A user, by the pseudonym (16 hexadecimal digits), and the mean cosine similarity with the members."""

    pseudonym: str
    similarity: float


class PrecisionAt(NamedTuple):
    """Precision at k of several rankings: the share of held-out members among the first k."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class LookalikeList(msgspec.Struct, frozen=True):
    """The lookalikes of one segment.

    Attributes:
        version: The version whose embeddings were used.
        members: Number of members with which users were compared.
        lookalikes: The users, nearest first.
        precision: Quality of the ranking; empty if too few members could be held out.
    """

    version: int
    at_ms: int
    members: int
    users: int
    lookalikes: tuple[NearUser, ...]
    precision: tuple[PrecisionAt, ...]


def write_lookalikes(folder: Path, segment: str, lookalikes: LookalikeList) -> None:
    """Writes a segment's list; durable once its directory is in place and synced."""
    durable.write(folder / f"{segment}.json", documents.encode_sealed(lookalikes))


def read_lookalikes(folder: Path, segment: str) -> LookalikeList | None:
    """Reads a segment's list; None if there is none."""
    path = folder / f"{segment}.json"
    try:
        return documents.decode_sealed(path.read_bytes(), LookalikeList)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is damaged ({error})", "remove it: it is computed again") from error
