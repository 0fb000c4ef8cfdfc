"""Users' profiles from the host's stores: histories to windows, rows to logits, logits to answers.

Every answer reads one version in one transaction over pointer, rows, dense
weights and mask, and one moment of the user's history. No TensorFlow. The
questions that arrived together are answered together: the program takes 55 us
for one row and 150 us for sixteen.

1. Pointer, control and mask; program and dense weights, when the version changed.
2. The users' pseudonyms, by the salt, and their histories.
3. The windows as of `at`, without what the mask takes out; categories, and the attributes of user and item.
4. Rows of the user, the context, the categories, the item, and of the attributes of user and item; where an item is
   asked for, what the pair's crosses say.
5. Candidates = the user's categories, the popular ones that are not among them, and of what over all users came next
   after the newest category the most frequent that are neither; of each, how often it came next. Rows of tables of
   the ranker's own.
6. Logits, softmax over the candidates, names.
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
from state.features.many import vectorise_many
from state.features.spec import EVENT, Events, FeatureSpec, Mask
from state.history.actions import exchanged
from state.history.store import HistoryStore
from state.ranking.crosses import Crosses
from state.rows.reader import RowReader
from state.rows.served import Served
from state.rows.store import RowStore

MOST_AT_ONCE = BATCHES[-1]

F32 = NDArray[np.float32]


class Prepared(NamedTuple):
    """n questions, what is known of them, and what the program is asked; good as long as the reader is.

    Attributes:
        version: What answers.
        rows: Its rows.
        asked: The questions.
        vectors: The windows of their users, n rows.
        has_row: Whether each user has a row in the version.
        successors: `[n, S]` uint64, candidates for what came next; 0 pads.
        inputs: The program's.
        clock: What gave the time of those that name none.
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
    """Answers from one host's stores; use it in one thread.

    Args:
        rows: The row store, read only.
        histories: The history store, read only.
        programs: The directory with the applier's copies of programs.
        spec: The feature spec of the settings.
        salt: The salt of the pseudonyms.
        context_fields: Names of the context fields, as the stream has them.
        clock: `event` or `wall`.
        now_ms: The wall clock.
        attributes: What is known of users and items; None where nothing is configured.
        pseudonym: Of what a question calls a user; None where that is the raw id.

    Attributes:
        context_fields: As given.
        histories: The history store.
        catalogue: What it knows of items and categories.
        item_attributes: Whether any are configured.
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
        """Answers one question; see `profiles`."""
        return self.profiles([Query(user, item, category, context or {}, at_ms)])[0]

    @property
    def version(self) -> int | None:
        """The version that was taken up last, of those that answer by themselves; None before the first one."""
        return self._versions.number

    def reading(self) -> AbstractContextManager[RowReader]:
        """One moment of versions and mask, for several calls of `profiles`."""
        return self._rows.reader()

    def profiles(
        self, queries: Sequence[Query], held: RowReader | None = None, number: int | None = None
    ) -> list[Answer]:
        """Answers questions in their order, all from the same version.

        Args:
            queries: At most `MOST_AT_ONCE`.
            held: The moment of versions and mask; None for now.
            number: The version; None for the one that answers.

        Raises:
            NotReady: There is no version yet.
            UnknownModel: The version is not here.
            SaltMismatch: The version's pseudonyms are of another salt.
            SpecMismatch: The version's features cannot be computed here.
            ProgramError: The version's program cannot be run.
            CorruptVersion: The program's file is missing or damaged.
        """
        with self._rows.reader() if held is None else nullcontext(held) as reader:
            prepared = self.prepare(queries, reader, number)
        # 6. Logits, probabilities, names.
        return self.answered(prepared, prepared.version.program.predict(prepared.inputs))

    def prepare(self, queries: Sequence[Query], reader: RowReader, number: int | None = None) -> Prepared:
        """All that is known of questions and that the program is asked; raises as `profiles`.

        The program has the version's weights until another one is prepared.

        Args:
            queries: At most `MOST_AT_ONCE`.
            reader: The moment of versions and mask.
            number: The version; None for the one that answers.
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
        """The answers to questions, out of what the program says of them."""
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
        """Gives the program the weights of the version that `reader` sees, or of another one that is here; raises as `profiles`."""
        return self._versions.take_up(reader, number)

    def items_of(self, asked: Asked, items: Sequence[tuple[int, int]]) -> list[Asked]:
        """The question of one user about each of n items.

        Args:
            asked: The question about none.
            items: The id of each item and of its category; 0 where the one that it was last seen in counts.
        """
        query = asked.query._replace(item="")
        attributes = self._attributes.of("item", [item for item, _ in items])
        return [
            asked._replace(query=query, item=item, category=category, item_attributes=known)
            for (item, _), category, known in zip(items, self._catalogue.categories_of(items), attributes, strict=True)
        ]

    def events_by(self, asked: Asked, mask: Mask) -> Events:
        """The user's events up to the time that is asked for, without what the mask takes out; the newest first.

        Args:
            asked: The question.
            mask: What answers know of.
        """
        events = self._histories.read(asked.user) if asked.user else np.empty(0, EVENT)
        visible = events[~mask.events(events, asked.user) & (events["at_ms"] <= asked.at_ms)]
        found: Events = visible[np.argsort(-visible["at_ms"], kind="stable")]
        return found

    def ready(self) -> Served:
        """The version that answers would use now.

        Raises:
            NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `profiles`.
        """
        with self._rows.reader() as reader:
            return self._versions.take_up(reader).served

    def _mask(self, reader: RowReader) -> Mask:
        """The mask of the newest control that the applier has seen."""
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
        """What the host knows of each question: the item's category and attributes, whether the user leaves, and the windows.

        Who was erased later than the version knows is nobody in it.
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
