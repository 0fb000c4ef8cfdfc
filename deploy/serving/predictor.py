"""Computes users' profiles from the host's stores: histories to windows, rows to logits, logits to answers.

Every answer reads one version in one transaction over pointer, rows, dense
weights and mask, and one snapshot of the user's history. It does not use
TensorFlow. Queries that arrive together are answered in one batch: the program
takes 55 us for one row and 150 us for sixteen.

1. Read pointer, control and mask; load program and dense weights if the version changed.
2. Compute the users' pseudonyms with the salt, and read their histories.
3. Compute the windows as of `at`, without masked events; look up categories, and the attributes of user and item.
4. Read the rows of the user, the context, the categories, the item, and the attributes of user and item. For an item,
   compute the crosses of the user-item pair.
5. Build the candidates: the user's categories, the other popular ones, and the successors. Successors are the most
   frequent other categories that came next after the newest category over all users. Add how often each candidate
   came next, and the rows of the ranker's custom tables.
6. Compute logits and the softmax over the candidates, and look up names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import Answer, Query
from deploy.serving.answering import answers
from deploy.serving.candidates import add_succession, came_next, interests
from deploy.serving.catalogue import Catalogue
from deploy.serving.inputs import Asked, Inputs, add_own_rows, program_inputs
from deploy.serving.known_attributes import NOTHING, KnownAttributes
from deploy.serving.leaving import leaving
from deploy.serving.loaded_version import LoadedVersion, VersionLoader, VersionRows
from deploy.serving.notes import CLOCK_EXTRA, CONTROL_NOTE, MASK_NOTE, EventClock
from deploy.serving.program import BATCHES
from deploy.serving.version_features import FeaturesOf
from state.events.identity import Salt, context_id, pseudonyms, public_id
from state.features.arrays import Vector
from state.features.spec import EVENT, Events, FeatureSpec, Mask, vectorise_many
from state.history.actions import exchanged
from state.history.store import HistoryStore
from state.ranking.crosses import Crosses
from state.rows.reader import RowReader, Served
from state.rows.store import RowStore

MOST_AT_ONCE = BATCHES[-1]

F32 = NDArray[np.float32]


class Prepared(NamedTuple):
    """n queries with their data and the program's inputs; valid as long as the reader is open.

    Attributes:
        version: The loaded version.
        rows: The version's rows.
        asked: The queries.
        vectors: The windows of their users, n rows.
        has_row: Whether each user has a row in the version.
        successors: `[n, S]` uint64, the successor candidates, padded with 0.
        inputs: The program's inputs.
        clock: The clock that gives the time of queries without a time.
        seen: The wall clock in milliseconds, and the mask.
    """

    version: LoadedVersion
    rows: VersionRows
    asked: list[Asked]
    vectors: Vector
    has_row: list[bool]
    successors: NDArray[np.uint64]
    inputs: Inputs
    clock: str
    seen: tuple[int, Mask]


class Predictor:
    """Answers queries from one host's stores. Used by one thread.

    Args:
        rows: The row store, opened read-only.
        histories: The history store, opened read-only.
        programs: The directory with the applier's copies of programs.
        spec: The feature spec of the settings.
        salt: The salt of the pseudonyms.
        context_fields: The names of the context fields, as in the stream.
        clock: `event` or `wall`.
        now_ms: The wall clock.
        attributes: The attributes of users and items; None if none are configured.
        pseudonym: Maps a query's user to a pseudonym; None if queries contain raw ids.

    Attributes:
        context_fields: The names of the context fields.
        histories: The history store.
        catalogue: Looks up the names and categories of items in the histories.
        item_attributes: Whether item attributes are configured.
    """

    def __init__(
        self,
        rows: RowStore,
        histories: HistoryStore,
        programs: Path,
        spec: FeatureSpec,
        salt: Salt,
        context_fields: Sequence[str],
        clock: str,
        now_ms: Callable[[], int],
        attributes: KnownAttributes | None = None,
        pseudonym: Callable[[str], int] | None = None,
    ) -> None:
        self._attributes = attributes or NOTHING
        self._rows = rows
        self.histories = self._histories = histories
        self._pseudonym = pseudonym or pseudonyms(salt)
        self.context_fields = tuple(context_fields)
        names = self._attributes.names
        self._clock = clock
        self._now_ms = now_ms
        self.catalogue = self._catalogue = Catalogue(histories)
        self.item_attributes = bool(names["item"])
        features = FeaturesOf(
            programs, spec, lambda one: Crosses(one, self.context_fields, names["user"], names["item"])
        )
        self._versions = VersionLoader(programs, features, salt, self._catalogue)
        self._control: tuple[bytes | None, Mask] = (None, Mask.NONE)
        self._clock_read: tuple[bytes | None, EventClock | None] = (None, None)

    def profile(
        self,
        user: str,
        item: str | None = None,
        category: str | None = None,
        context: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> Answer:
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
        self, queries: Sequence[Query], held: RowReader | None = None, number: int | None = None
    ) -> list[Answer]:
        """Answers queries in their order, all from the same version.

        Args:
            queries: At most `MOST_AT_ONCE`.
            held: A snapshot of versions and mask; None for the current state.
            number: The version; None for the served one.

        Raises:
            NotReady: There is no version yet.
            UnknownModel: The version is not on this host.
            SaltMismatch: The version's pseudonyms use another salt.
            SpecMismatch: The version's features cannot be computed on this host.
            ProgramError: The version's program cannot be run.
            CorruptVersion: The program's file is missing or damaged.
        """
        with self._rows.reader() if held is None else nullcontext(held) as reader:
            prepared = self.prepare(queries, reader, number)
        # 6. Logits, probabilities, names.
        return self.answered(prepared, prepared.version.program.predict(prepared.inputs))

    def prepare(self, queries: Sequence[Query], reader: RowReader, number: int | None = None) -> Prepared:
        """Collects the data of queries and builds the program's inputs; raises the errors of `profiles`.

        The program keeps the version's weights until queries are prepared for another version.

        Args:
            queries: At most `MOST_AT_ONCE`.
            reader: The snapshot of versions and mask.
            number: The version; None for the served one.
        """
        now_ms = self._now_ms()
        # 1. Version and mask.
        version, mask = self._versions.take_up(reader, number), self._mask(reader)
        rows = version.rows(reader)
        # 2. 3. Histories, windows, attributes.
        default_ms, clock = self._now(now_ms)
        asked, vectors = self._asked(queries, mask, default_ms, version)
        # 4. Rows and crosses.
        inputs, has_row = program_inputs(version, rows, asked, vectors, version.features.crosses)
        # 5. Candidates.
        found = came_next(rows, vectors.recent_categories, version.popular)
        add_succession(inputs, found, rows.categories(found.ids.reshape(-1).tolist()))
        add_own_rows(inputs, version, rows, asked, vectors, found.ids)
        return Prepared(version, rows, asked, vectors, has_row, found.ids, inputs, clock, (now_ms, mask))

    def answered(self, prepared: Prepared, outputs: Mapping[str, F32]) -> list[Answer]:
        """Builds the answers to prepared queries from the program's outputs."""
        asked, version = prepared.asked, prepared.version
        users = [
            (one.recent_categories, others) for one, others in zip(asked, prepared.successors.tolist(), strict=True)
        ]
        most = [one.query.top for one in asked]
        popular, names = version.popular_ids, version.popular_names
        ranked = interests(users, popular, names, self._catalogue.name_of, most, outputs)
        return answers(
            asked, prepared.has_row, prepared.clock, version, prepared.seen, ranked, outputs, prepared.vectors
        )

    def take_up(self, reader: RowReader, number: int | None = None) -> LoadedVersion:
        """Loads the version that `reader` sees, or version `number`, with its weights; raises as `profiles` does."""
        return self._versions.take_up(reader, number)

    def items_of(self, asked: Asked, items: Sequence[tuple[int, int]]) -> list[Asked]:
        """Returns one query for each of n items, all about the same user.

        Args:
            asked: The query without an item.
            items: The id of each item and of its category; 0 for the category that the item was last seen in.
        """
        query = asked.query._replace(item="")
        attributes = self._attributes.of("item", [item for item, _ in items])
        return [
            asked._replace(query=query, item=item, category=category, item_attributes=known)
            for (item, _), category, known in zip(items, self._catalogue.categories_of(items), attributes, strict=True)
        ]

    def events_by(self, asked: Asked, mask: Mask) -> Events:
        """Returns the user's unmasked events up to the time of the query, newest first.

        Args:
            asked: The query.
            mask: The mask that answers respect.
        """
        events = self._histories.read(asked.user) if asked.user else np.empty(0, EVENT)
        visible = events[~mask.events(events, asked.user) & (events["at_ms"] <= asked.at_ms)]
        found: Events = visible[np.argsort(-visible["at_ms"], kind="stable")]
        return found

    def ready(self) -> Served:
        """Returns the version that answers would use now.

        Raises:
            NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: See `profiles`.
        """
        with self._rows.reader() as reader:
            return self._versions.take_up(reader).served

    def _mask(self, reader: RowReader) -> Mask:
        """Returns the mask of the newest control that the applier has read."""
        control = reader.note(CONTROL_NOTE)
        if control != self._control[0]:
            self._control = (control, Mask.from_bytes(reader.note(MASK_NOTE) or b"{}"))
        return self._control[1]

    def _now(self, now_ms: int) -> tuple[int, str]:
        if self._clock == "event":
            stored = self._histories.extra(CLOCK_EXTRA)
            if stored != self._clock_read[0]:
                self._clock_read = stored, EventClock.parse(stored)
            if (events := self._clock_read[1]) is not None:
                return events.now(now_ms), "event"
        return now_ms, "wall"

    def _asked(
        self, queries: Sequence[Query], mask: Mask, default_ms: int, version: LoadedVersion
    ) -> tuple[list[Asked], Vector]:
        """Collects each query's data on this host: windows, categories, attributes and churn.

        A user who was erased after the version was trained counts as unknown.
        """
        features, erased = version.features, version.served.erased
        users = [self._pseudonym(query.user) for query in queries]
        items = [0 if query.item is None else public_id(query.item) for query in queries]
        times = [default_ms if query.at_ms is None else query.at_ms for query in queries]
        self._histories.history = features.spec.history
        histories = [exchanged(each, features.actions) for each in self._histories.read_many(users)]
        vectors = vectorise_many(histories, times, mask, features.spec, users)
        recent = [[one for one in row if one] for row in vectors.recent_categories.tolist()]
        of_users, of_items = self._attributes.of("user", users), self._attributes.of("item", items)
        churn = leaving(version.churn, histories, times, mask, features.spec, users)
        asked = []
        for place, (query, user, item) in enumerate(zip(queries, users, items, strict=True)):
            given, fields = query.context, self.context_fields
            asked.append(
                Asked(
                    query=query,
                    user=0 if mask.erased.hides(user, erased) else user,
                    at_ms=times[place],
                    recent_categories=recent[place],
                    user_attributes=of_users[place],
                    item=item,
                    category=self._catalogue.category_of(item) if query.category is None else public_id(query.category),
                    item_attributes=of_items[place],
                    context=[context_id(name, given[name]) if name in given else 0 for name in fields],
                    churn=churn[place],
                )
            )
        return asked, vectors
