"""Computes users' profiles from the host's stores: histories to windows, rows to logits, logits to answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.interests import Correction, correction_of, newest_key
from deploy.serving.answers.program import PAIRS, batch_of
from deploy.serving.answers.query import NOBODY, Query, iso, probability
from deploy.serving.answers.version import Catalogue, LoadedVersion, ShownName, VersionLoader, VersionRows
from deploy.serving.host_files import CLOCK_EXTRA, CONTROL_NOTE, MASK_NOTE, EventClock
from springtide_client.answers import Clock, Engagement, Interest, Profile, Version
from state.attributes.values import SIDES, AttributeStore, AttributeTable, ids_in, tables_of, texts_in
from state.churn import ChurnWeights
from state.compiled import compiled
from state.config.settings import Settings
from state.events.identity import Salt, context_id, pseudonyms, public_id
from state.features.arrays import Vector
from state.features.spec import EVENT, Events, FeatureSpec, Mask, vectorise_many
from state.history.appends import exchanged
from state.history.store import HistoryStore
from state.ranking.crosses import Values
from state.ranking.transitions import Succession, succession
from state.rows.reader import RowReader
from state.rows.store import RowStore

KINDS = ("recent", "popular", "successor")
"""Kinds of candidates, in slot order; prefixes of the program's masks and logits."""

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
Inputs = dict[str, F32]
_PLACES = np.arange(PAIRS)[:, None]


class AttributeValues(NamedTuple):
    """The attributes of one user or item.

    Attributes:
        ids: The ids of its A attribute values; empty if no attributes are configured.
        texts: The values by name; None for a value that the record lacks. Empty without a record.
    """

    ids: Sequence[int]
    texts: dict[str, str | None]


class KnownAttributes:
    """Looks up the newest attributes of users and items by id. Used by one thread.

    Attributes:
        names: The names of the attributes by side; empty for a side without a table.
    """

    def __init__(self, store: AttributeStore | None, tables: Mapping[str, AttributeTable]) -> None:
        self._store, self._tables = store, {} if store is None else tables
        self.names = {side: self._tables[side].names if side in self._tables else () for side in SIDES}
        self._unknown = {side: AttributeValues(table.unknown.tolist(), {}) for side, table in self._tables.items()}

    def of(self, side: str, ids: Sequence[int]) -> list[AttributeValues]:
        """Returns the current attributes, in the order of `ids`."""
        table = self._tables.get(side)
        if table is None or self._store is None:
            return [AttributeValues((), {})] * len(ids)
        width, values = len(table.names), []
        for value in self._store.read_many(side, ids):
            if value is None:
                values.append(self._unknown[side])
            else:
                texts = dict(zip(table.names, texts_in(value, width), strict=True))
                values.append(AttributeValues(ids_in(value, width).tolist(), texts))
        return values


class Asked(NamedTuple):
    """A query with the host's data about its user and item.

    Attributes:
        user: The pseudonym; 0 if the version must treat the user as unknown.
        recent_categories: The user's categories, newest first, without padding.
        item: The item's id; 0 if the query has no item.
        category: The item's category; 0 if unknown.
        context: One id per context field; 0 if the field is not given.
        newest_key: The key of the list of what was clicked after the user's latest item; 0 without one, or if the version
            does not use it.
    """

    query: Query
    user: int
    at_ms: int
    recent_categories: list[int]
    user_attributes: AttributeValues
    item: int
    category: int
    item_attributes: AttributeValues
    context: list[int]
    churn: float | None = None
    newest_key: int = 0


class Prepared(NamedTuple):
    """n queries with their data and the program's inputs; valid as long as the reader is open.

    Attributes:
        has_row: Whether each user has a row in the version.
        successors: `[n, S]` uint64, the successor candidates, padded with 0.
        correction: The correction of the logits by counts; None if the version has none.
        clock: The clock that gives the time of queries without a time.
    """

    version: LoadedVersion
    rows: VersionRows
    asked: list[Asked]
    vectors: Vector
    has_row: list[bool]
    successors: NDArray[np.uint64]
    inputs: Inputs
    correction: Correction | None
    clock: Clock
    now_ms: int
    mask: Mask


class Stores(NamedTuple):
    """The stores of one host; `attributes` is None without configured attributes."""

    rows: RowStore
    histories: HistoryStore
    attributes: AttributeStore | None = None


class Predictor:
    """Answers queries from one host's stores, opened read-only. Used by one thread.

    Args:
        pseudonym: Maps a query's user to a pseudonym; None if queries contain raw ids.
        require: Raises NotHeld if this host does not hold a user, by pseudonym; None if it holds all users.

    Attributes:
        catalogue: Looks up the names and categories of items in the histories.
    """

    def __init__(
        self,
        stores: Stores,
        settings: Settings,
        salt: Salt,
        now_ms: Callable[[], int],
        pseudonym: Callable[[str], int] | None = None,
        require: Callable[[int], None] | None = None,
    ) -> None:
        self._rows, self.histories = stores.rows, stores.histories
        self._attributes = KnownAttributes(stores.attributes, tables_of(settings.attributes))
        self._pseudonym, self._require = pseudonym or pseudonyms(salt), require
        self.context_fields, self._clock, self._now_ms = settings.events.context, settings.serving.clock, now_ms
        self.catalogue = Catalogue(self.histories)
        self.item_attributes = bool(self._attributes.names["item"])
        self._versions = VersionLoader(settings, salt, self.catalogue)
        self._control: tuple[bytes | None, Mask] = (None, Mask.NONE)
        self._clock_read: tuple[bytes | None, EventClock | None] = (None, None)

    def profile(
        self,
        user: str,
        item: str | None = None,
        category: str | None = None,
        context: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> Profile:
        """Answers one query; see `profiles`."""
        return self.profiles([Query(user, item, category, context or {}, at_ms)])[0]

    @property
    def version(self) -> int | None:
        """The served version that was loaded last, not counting versions requested by number; None before the first."""
        return self._versions.number

    def reading(self) -> AbstractContextManager[RowReader]:
        """Opens a snapshot of versions and mask, for several calls of `profiles`."""
        return self._rows.reader()

    def profiles(
        self, queries: Sequence[Query], snapshot: RowReader | None = None, number: int | None = None
    ) -> list[Profile]:
        """Answers queries in their order, all from the same version.

        There are at most `queue.MOST_AT_ONCE` queries. They see `snapshot`, by default the current state, and are answered
        by version `number`, by default the served one.

        Raises:
            NotHeld: This host does not hold one of the users.
            NotReady, BadRequest, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: See `VersionLoader.load_version`.
        """
        with self._rows.reader() if snapshot is None else nullcontext(snapshot) as reader:
            prepared = self.prepare(queries, reader, number)
        # 6. Logits, probabilities, names.
        return self.answered(prepared, prepared.version.predict(prepared.inputs))

    def prepare(self, queries: Sequence[Query], reader: RowReader, number: int | None = None) -> Prepared:
        """Collects the data of at most `queue.MOST_AT_ONCE` queries and builds the program's inputs.

        The program keeps the weights of version `number` (None: the served one) until queries are prepared for
        another version. Raises as `profiles` does.
        """
        now_ms = self._now_ms()
        # 1. Version and mask.
        version, mask = self._versions.load_version(reader, number), self._mask(reader)
        rows = version.rows(reader)
        # 2. 3. Histories, windows, attributes.
        default_ms, clock = self._now(now_ms)
        questions, vectors = self._asked(queries, mask, default_ms, version)
        # 4. Rows and crosses.
        inputs, has_row = _program_inputs(version, rows, questions, vectors)
        # 5. Candidates.
        at, lists = rows.transitions(vectors.recent_categories[:, 0].tolist())
        following = succession(at, lists, vectors.recent_categories, version.popular)
        _add_succession(inputs, following, rows)
        add_own_rows(inputs, version, rows, questions, vectors, following.ids)
        correction = None
        if version.interest_weights is not None:
            successors = following.ids if "successor_mask" in inputs else following.ids[:, :0]
            keys = [question.newest_key for question in questions]
            times = [question.at_ms for question in questions]
            correction = correction_of(version, rows, vectors, successors, keys, times)
        return Prepared(
            version, rows, questions, vectors, has_row, following.ids, inputs, correction, clock, now_ms, mask
        )

    def answered(self, prepared: Prepared, outputs: Mapping[str, F32]) -> list[Profile]:
        """Builds the answers to prepared queries from the program's outputs."""
        version, vectors = prepared.version, prepared.vectors
        ranked = _interests(prepared, outputs, self.catalogue.name_of)
        served = version.served
        age_s, generation = (prepared.now_ms - served.created_at_ms) / 1000, prepared.mask.generation
        lean = Version(served.version, served.epoch, age_s, generation)
        full = Version(served.version, served.epoch, age_s, generation, served.sources)
        times = {at_ms: iso(at_ms) for at_ms in {question.at_ms for question in prepared.asked}}
        answers = []
        for row, question in enumerate(prepared.asked):
            query, known = question.query, prepared.has_row[row] or bool(question.recent_categories)
            fields = query.fields
            engagement: Engagement | None = None
            if query.item is not None:
                chance = probability(float(outputs["engagement_logit"][row]))
                engagement = Engagement(query.item, chance, question.item_attributes.texts)
            features = None
            if "features" in fields:
                features = dict(zip(version.features.spec.names, vectors.features[row].tolist(), strict=True))
            answers.append(
                Profile(
                    user_id=query.user,
                    known=known,
                    cold_start=not known,
                    version=full if "sources" in fields else lean,
                    at=times[question.at_ms],
                    at_ms=question.at_ms,
                    clock=prepared.clock if query.at_ms is None else "request",
                    interests=ranked[row],
                    engagement=engagement,
                    # JSON has an array like a list, with the digits of float32.
                    vector=cast(list[float], outputs["vector"][row]) if "vector" in fields else None,
                    features=features,
                    attributes=question.user_attributes.texts if "attributes" in fields else None,
                    churn=question.churn,
                )
            )
        return answers

    def load_version(self, reader: RowReader, number: int | None = None) -> LoadedVersion:
        """Loads version `number`, or the one that `reader` sees, with its weights; raises as `profiles` does."""
        return self._versions.load_version(reader, number)

    def users_of(self, queries: Sequence[Query]) -> list[int]:
        """Returns the pseudonyms of the users of queries; raises NotHeld if this host does not hold one of them."""
        users = [self._pseudonym(query.user) for query in queries]
        if self._require is not None:
            for query, user in zip(queries, users, strict=True):
                if query.user != NOBODY:
                    self._require(user)
        return users

    def items_of(self, question: Asked, items: Sequence[tuple[int, int]]) -> list[Asked]:
        """Returns one query for each of n items, given as ids of item and category, all about the same user.

        If the category is 0, the item's last category is used.
        """
        query = question.query._replace(item="")
        attributes = self._attributes.of("item", [item for item, _ in items])
        return [
            question._replace(query=query, item=item, category=category, item_attributes=values)
            for (item, _), category, values in zip(items, self.catalogue.categories_of(items), attributes, strict=True)
        ]

    def events_by(self, question: Asked, mask: Mask) -> Events:
        """Returns the user's unmasked events up to the time of the query, newest first."""
        events = self.histories.read(question.user) if question.user else np.empty(0, EVENT)
        visible = events[~mask.events(events, question.user) & (events["at_ms"] <= question.at_ms)]
        newest_first: Events = visible[np.argsort(-visible["at_ms"], kind="stable")]
        return newest_first

    def _mask(self, reader: RowReader) -> Mask:
        control = reader.note(CONTROL_NOTE)
        if control != self._control[0]:
            self._control = (control, Mask.from_bytes(reader.note(MASK_NOTE) or b"{}"))
        return self._control[1]

    def _now(self, now_ms: int) -> tuple[int, Clock]:
        if self._clock == "event":
            stored = self.histories.extra(CLOCK_EXTRA)
            if stored != self._clock_read[0]:
                self._clock_read = stored, EventClock.parse(stored)
            if (events := self._clock_read[1]) is not None:
                return events.now(now_ms), "event"
        return now_ms, "wall"

    def _asked(
        self, queries: Sequence[Query], mask: Mask, default_ms: int, version: LoadedVersion
    ) -> tuple[list[Asked], Vector]:
        """Collects each query's data on this host; a user erased after the version was trained counts as unknown."""
        features, erased = version.features, version.served.erased
        users = self.users_of(queries)
        items = [0 if query.item is None else public_id(query.item) for query in queries]
        times = [default_ms if query.at_ms is None else query.at_ms for query in queries]
        self.histories.history = features.spec.history
        histories = [exchanged(history, features.actions) for history in self.histories.read_many(users)]
        vectors = vectorise_many(histories, times, mask, features.spec, users)
        recent = [[category for category in row if category] for row in vectors.recent_categories.tolist()]
        of_users, of_items = self._attributes.of("user", users), self._attributes.of("item", items)
        churn = churn_probabilities(version.churn, histories, times, mask, features.spec, users)
        questions, has_correction = [], version.interest_weights is not None
        for row, (query, user, item) in enumerate(zip(queries, users, items, strict=True)):
            context, fields = query.context, self.context_fields
            questions.append(
                Asked(
                    query=query,
                    user=0 if mask.erased.hides(user, erased) else user,
                    at_ms=times[row],
                    recent_categories=recent[row],
                    user_attributes=of_users[row],
                    item=item,
                    category=self.catalogue.category_of(item) if query.category is None else public_id(query.category),
                    item_attributes=of_items[row],
                    context=[context_id(name, context[name]) if name in context else 0 for name in fields],
                    churn=churn[row],
                    newest_key=newest_key(histories[row], times[row], mask, user) if has_correction else 0,
                )
            )
        return questions, vectors


def churn_probabilities(
    weights: ChurnWeights | None,
    histories: Sequence[Events],
    at_ms: Sequence[int],
    mask: Mask,
    spec: FeatureSpec,
    users: Sequence[int],
) -> list[float | None]:
    """Computes the churn probabilities of n users, each at its own time.

    A user without events, or whose latest event is older than the trained horizon, has None. Windows are as of the
    arrival of the user's latest event, so they equal those of its row in the training log. `histories` are n arrays
    `[m]` EVENT in append order.
    """
    probabilities: list[float | None] = [None] * len(histories)
    if weights is None:
        return probabilities
    to_score: list[tuple[int, Events, int, int]] = []
    for row, (events, now_ms, user) in enumerate(zip(histories, at_ms, users, strict=True)):
        latest = _latest(events, now_ms, mask, user)
        if latest is None or now_ms - (latest_ms := int(events["at_ms"][latest])) >= weights.horizon.reach_ms:
            continue
        to_score.append((row, events[:latest], latest_ms, int(events["action"][latest])))
    if to_score:
        rows_scored, before, times, actions = zip(*to_score, strict=True)
        their_users = [users[row] for row in rows_scored]
        ages = [at_ms[row] - latest_ms for row, _, latest_ms, _ in to_score]
        windows = vectorise_many(before, times, mask, spec, their_users).features[:, weights.inputs.columns]
        inputs = weights.inputs.of(windows, np.array(actions, np.uint8), np.array(ages, np.int64))
        for row, churn in zip(rows_scored, weights.probabilities(inputs).tolist(), strict=True):
            probabilities[row] = churn
    return probabilities


def _latest(events: Events, now_ms: int, mask: Mask, user: int) -> int | None:
    """Returns the index of the latest visible event, the last one appended if times are equal; None without one."""
    visible = np.flatnonzero(events["at_ms"] <= now_ms)
    if mask:
        visible = visible[~mask.events(events[visible], user)]
    if not visible.size:
        return None
    times = events["at_ms"][visible]
    return int(visible[visible.size - 1 - int(np.argmax(times[::-1]))])


def _program_inputs(
    version: LoadedVersion, rows: VersionRows, questions: Sequence[Asked], vectors: Vector
) -> tuple[Inputs, list[bool]]:
    """Builds the inputs of n queries, without transitions between categories, and whether each user has a row.

    The inputs are float32 by name, padded with zeros to the program's batch size.
    """
    inputs: Inputs = version.program.zeros(batch_of(len(questions)))
    if "popular_rows" in version.program.shapes:
        inputs["popular_rows"] = version.popular_rows
    for name, values in (("features", vectors.features), ("category_windows", vectors.category_windows)):
        if name in inputs:
            inputs[name][: len(questions)] = values
    # The users' own categories, which are masked out of the popular ones.
    recent = vectors.recent_categories
    if "recent_rows" in inputs:
        # 0 is padding and has no row.
        own_rows = rows.categories(recent.reshape(-1).tolist()).reshape(*recent.shape, -1)
        inputs["recent_rows"][: len(questions)] = own_rows
    inputs["recent_mask"][: len(questions)] = recent != 0
    _mask_popular(recent, version.popular, inputs["popular_mask"])
    has_row, with_sequence = [], vectors.sequence_actions.shape[1] > 0
    for row_number, question in enumerate(questions):
        row = rows.user(question.user)
        has_row.append(row is not None)
        if row is not None and "user_row" in inputs:
            inputs["user_row"][row_number] = row
        if with_sequence:
            _add_sequence(inputs, row_number, vectors, rows)
        if "context_row" in inputs:
            _add_context(inputs, row_number, question, rows)
    add_items(inputs, version, rows, questions, vectors)
    return inputs, has_row


@compiled("u8[:, ::1], u8[::1], f4[:, ::1]")
def _mask_popular(recent: U64, popular: U64, mask: F32) -> None:
    """Sets the mask, `[n or more, P]`, of the popular categories that are not among the user's own; 0 is none."""
    for i in range(recent.shape[0]):
        for j in range(popular.shape[0]):
            known = popular[j] != np.uint64(0)
            for category in recent[i]:
                known &= category != popular[j]
            mask[i, j] = np.float32(known)


def add_items(
    inputs: Inputs, version: LoadedVersion, rows: VersionRows, questions: Sequence[Asked], vectors: Vector
) -> None:
    """Adds the inputs for the item of each query that has one. `vectors`: those of the n queries' users."""
    with_item = [row for row, question in enumerate(questions) if question.query.item is not None]
    if with_item and "item_row" in inputs:
        inputs["item_row"][with_item] = item_rows(rows, [questions[row] for row in with_item])
    named = [row for row, question in enumerate(questions) if question.category]
    if named and "category_row" in inputs:
        inputs["category_row"][named] = rows.categories([questions[row].category for row in named])
    if with_item and "cross" in inputs and version.cross_shares.size:
        features, latest_items = vectors.features[with_item], vectors.sequence_items[with_item]
        inputs["cross"][with_item] = cross_logits(rows, [questions[row] for row in with_item], features, latest_items)


def item_rows(rows: VersionRows, questions: Sequence[Asked]) -> F32:
    """Returns the rows of n items plus the mean of each item's attribute rows, `[n, dim]` float32; 0 without rows."""
    item_vectors = rows.items([question.item for question in questions])
    if any(question.item_attributes.ids for question in questions):
        item_vectors = item_vectors.copy()
        for row, question in enumerate(questions):
            if ids := question.item_attributes.ids:
                item_vectors[row] += rows.context_sum(ids) / np.float32(len(ids))
    return item_vectors


def cross_logits(rows: VersionRows, questions: Sequence[Asked], features: NDArray[np.uint16], latest_items: U64) -> F32:
    """Returns the cross logits of n user-item pairs, `[n]` float32. The version must have learned crosses.

    Of the users, `features` are `[n, D]` uint16, and `latest_items`, `[n, T]` uint64, the items of their latest events.
    """
    return rows.cross_logits(
        Values(
            user=np.array([question.user for question in questions], np.uint64),
            item=np.array([question.item for question in questions], np.uint64),
            category=np.array([question.category for question in questions], np.uint64),
            context=_table([question.context for question in questions]),
            user_attributes=_table([question.user_attributes.ids for question in questions]),
            item_attributes=_table([question.item_attributes.ids for question in questions]),
            features=features,
            latest_items=latest_items,
        )
    )


def _table(ids: Sequence[Sequence[int]]) -> U64:
    """Converts ids to an array `[n, k]` uint64; k may be 0."""
    return np.array(ids, np.uint64).reshape(len(ids), -1)


def _add_sequence(inputs: Inputs, row: int, vectors: Vector, rows: VersionRows) -> None:
    vector = Vector(*[column[row] for column in vectors])
    count = int((vector.sequence_actions != 0).sum())
    if "sequence_item_rows" in inputs:
        inputs["sequence_item_rows"][row, :count] = rows.items(vector.sequence_items[:count].tolist())
    if "sequence_category_rows" in inputs:
        inputs["sequence_category_rows"][row, :count] = rows.categories(vector.sequence_categories[:count].tolist())
    for name in ("sequence_actions", "sequence_ages"):
        if name in inputs:
            inputs[name][row] = getattr(vector, name)
    if "sequence_mask" in inputs:
        inputs["sequence_mask"][row, :count] = 1.0


def _add_context(inputs: Inputs, row: int, question: Asked, rows: VersionRows) -> None:
    fields = [field for field in question.context if field]
    if fields or question.user_attributes.ids:
        # As in training, a field that is not given counts as zeros.
        count = len(question.context) + len(question.user_attributes.ids)
        total = rows.context_sum([*fields, *question.user_attributes.ids])
        inputs["context_row"][row] = total / np.float32(count)


def _add_succession(inputs: Inputs, following: Succession, rows: VersionRows) -> None:
    """Adds how often each candidate came next, and the successors; nothing for a program without successors."""
    if "successor_mask" not in inputs:
        return
    count, successors = following.ids.shape
    values = {
        "recent_next": following.recent_categories,
        "popular_next": following.popular,
        "successor_next": following.successors,
        "successor_mask": following.ids != 0,
    }
    for name, value in values.items():
        if name in inputs:
            inputs[name][:count] = value
    if "successor_rows" in inputs:
        their_rows = rows.categories(following.ids.reshape(-1).tolist())
        inputs["successor_rows"][:count] = their_rows.reshape(count, successors, -1)


def add_own_rows(
    inputs: Inputs,
    version: LoadedVersion,
    rows: VersionRows,
    questions: Sequence[Asked],
    vectors: Vector,
    successors: U64,
) -> None:
    """Adds rows of the ranker's custom tables, for a program that uses some.

    `vectors` has n rows; `successors` is `[n, S]` uint64, padded with 0.
    """
    inputs |= version.own_popular
    tables = [table for table in version.own if table.ids != "popular"]
    for row, question in enumerate(questions if tables else ()):
        ids = _ids_of(question, Vector(*[column[row] for column in vectors]), successors[row])
        for table in tables:
            if wanted := ids[table.ids]:
                values = rows.own(table.table, wanted, table.width)
                if table.averaged:
                    inputs[table.name][row] = values.sum(0) / np.float32(len(wanted))
                elif inputs[table.name].ndim == 2:
                    inputs[table.name][row] = values[0]
                else:
                    inputs[table.name][row, : len(wanted)] = values


def _ids_of(question: Asked, vector: Vector, successors: U64) -> dict[str, list[int]]:
    """Returns the ids of a query by name; those of the item only if the query has one."""
    about_item = question.query.item is not None
    return {
        "user": [question.user],
        "item": [question.item] if about_item else [],
        "category": [question.category],
        "context": [*question.context, *question.user_attributes.ids],
        "item_attributes": list(question.item_attributes.ids) if about_item else [],
        "recent": question.recent_categories,
        "successor": successors.tolist(),
        "sequence_items": vector.sequence_items.tolist(),
        "sequence_categories": vector.sequence_categories.tolist(),
        "sequence_actions": vector.sequence_actions.tolist(),
    }


def _interests(
    prepared: Prepared, outputs: Mapping[str, F32], name_of: Callable[[int], ShownName]
) -> list[list[Interest]]:
    questions, version = prepared.asked, prepared.version
    successors_of = prepared.successors.tolist()
    names = [f"{kind}_logits" for kind in KINDS]
    parts = [outputs[name][: len(questions)] for name in names if name in outputs]
    logits = np.concatenate(parts, axis=1)
    if prepared.correction is not None:
        logits = prepared.correction.apply(logits)
    slots, ranks = parts[0].shape[1], parts[1].shape[1]
    has_successors, popular = len(parts) == len(KINDS), set(version.popular_ids)
    counts = []
    for question, successors in zip(questions, successors_of, strict=True):
        # A popular category that is also the user's own counts as one candidate.
        recent = question.recent_categories
        count = len(recent) + len(popular) - len(popular.intersection(recent))
        if has_successors:
            count += len(successors) - successors.count(0)
        counts.append(count if question.query.top is None else min(count, question.query.top))
    # An empty slot has a logit far below all others, so it sorts last.
    orders = np.argsort(-logits, axis=1, kind="stable")[:, : max(counts, default=0)]
    shares = softmax(logits)[_PLACES[: len(questions)], orders].tolist()
    interests: list[list[Interest]] = []
    for question, successors, count, order, its in zip(
        questions, successors_of, counts, orders.tolist(), shares, strict=True
    ):
        best: list[Interest] = []
        for slot, share in zip(order[:count], its, strict=False):
            if slot < slots:
                name, identity = name_of(question.recent_categories[slot])
            elif slot < slots + ranks:
                name, identity = version.popular_names[slot - slots]
            else:
                name, identity = name_of(successors[slot - slots - ranks])
            best.append(Interest(name, identity, share))
        interests.append(best)
    return interests


def softmax(logits: F32) -> F32:
    """Computes the softmax of each row; input and output are `[n, k]` float32.

    >>> softmax(np.array([[0.0, 0.0], [-1e9, 0.0]], np.float32)).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    shares = np.exp(logits - np.maximum.reduce(logits, 1, keepdims=True))
    return np.asarray(shares / np.add.reduce(shares, 1, keepdims=True), np.float32)
