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

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import Answer, Engagement, Interest, Query, Version, iso
from deploy.serving.candidates import add_succession, came_next, interests
from deploy.serving.catalogue import Catalogue
from deploy.serving.inputs import Asked, add_own_rows, program_inputs
from deploy.serving.known_attributes import NOTHING, KnownAttributes
from deploy.serving.loaded_version import LoadedVersion, VersionLoader
from deploy.serving.notes import CLOCK_EXTRA, CONTROL_NOTE, MASK_NOTE, event_now
from deploy.serving.program import BATCHES
from deploy.serving.version_features import FeaturesOf
from state.events.identity import Salt, context_id, public_id, user_id
from state.features.spec import FeatureSpec, Mask, vectorise
from state.history.actions import exchanged
from state.history.store import HistoryStore
from state.ranking.crosses import Crosses
from state.rows.reader import RowReader
from state.rows.served import Served
from state.rows.store import RowStore

MOST_AT_ONCE = BATCHES[-1]
STEEPEST_LOGIT = 60.0
"""Beyond it a probability is 0 or 1 in float64, and its exponential may overflow."""

F32 = NDArray[np.float32]


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
    ) -> None:
        self._attributes = attributes or NOTHING
        self._rows = rows
        self._histories = histories
        self._salt = salt
        self._context_fields = tuple(context_fields)
        names = self._attributes.names
        self._clock = clock
        self._now_ms = now_ms
        self._catalogue = Catalogue(histories)
        features = FeaturesOf(
            programs, spec, lambda one: Crosses(one, self._context_fields, names["user"], names["item"])
        )
        self._versions = VersionLoader(programs, features, salt, self._catalogue)
        self._control: tuple[bytes | None, Mask] = (None, Mask.NONE)

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

    def reading(self) -> AbstractContextManager[RowReader]:
        """One moment of versions and mask, for several calls of `profiles`."""
        return self._rows.reader()

    def profiles(self, queries: Sequence[Query], held: RowReader | None = None) -> list[Answer]:
        """Answers questions in their order, all from the same version.

        Args:
            queries: At most `MOST_AT_ONCE`.
            held: The moment of versions and mask; None for now.

        Raises:
            NotReady: There is no version yet.
            SaltMismatch: The version's pseudonyms are of another salt.
            SpecMismatch: The version's features cannot be computed here.
            ProgramError: The version's program cannot be run.
            CorruptVersion: The program's file is missing or damaged.
        """
        now_ms = self._now_ms()
        with self._rows.reader() if held is None else nullcontext(held) as reader:
            # 1. Version and mask.
            version, mask = self._versions.take_up(reader), self._mask(reader)
            rows = version.rows(reader)
            # 2. 3. Histories, windows, attributes.
            default_ms, clock = self._now(now_ms)
            asked = self._asked(queries, mask, default_ms, version)
            # 4. Rows and crosses.
            inputs, has_row = program_inputs(version, rows, asked, version.features.crosses)
            # 5. Candidates.
            newest = np.stack([one.vector.recent_categories for one in asked])
            found = came_next(rows, newest, version.popular)
            add_succession(inputs, found, rows.categories(found.ids.reshape(-1).tolist()))
            add_own_rows(inputs, version, rows, asked, found.ids)
        # 6. Logits, probabilities, names.
        outputs = version.program.predict(inputs)
        name_of = self._catalogue.name_of
        named = [
            ([name_of(category) for category in one.recent_categories], [name_of(other) for other in others if other])
            for one, others in zip(asked, found.ids.tolist(), strict=True)
        ]
        ranked = interests(named, version.popular_names, inputs, outputs)
        shown = version_of(version.served, now_ms, mask)
        return [
            self._answer(one, has_row[place], clock, shown, ranked[place], outputs, place, version.features.spec.names)
            for place, one in enumerate(asked)
        ]

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
            by_events = event_now(self._histories.extra(CLOCK_EXTRA), now_ms)
            if by_events is not None:
                return by_events, "event"
        return now_ms, "wall"

    def _asked(self, queries: Sequence[Query], mask: Mask, default_ms: int, version: LoadedVersion) -> list[Asked]:
        """What the host knows of each question: history, windows, attributes, the item's category.

        Who was erased later than the version knows is nobody in it.
        """
        features, erased = version.features, version.served.erased
        users = [user_id(self._salt, query.user) for query in queries]
        items = [0 if query.item is None else public_id(query.item) for query in queries]
        self._histories.history = features.spec.history
        histories = [exchanged(each, features.actions) for each in self._histories.read_many(users)]
        of_users, of_items = self._attributes.of("user", users), self._attributes.of("item", items)
        asked = []
        for place, (query, user, item) in enumerate(zip(queries, users, items, strict=True)):
            at_ms = default_ms if query.at_ms is None else query.at_ms
            vector = vectorise(histories[place], at_ms, None, mask, features.spec, user)
            given, fields = query.context, self._context_fields
            asked.append(
                Asked(
                    query=query,
                    user=0 if mask.erased.hides(user, erased) else user,
                    at_ms=at_ms,
                    vector=vector,
                    recent_categories=[category for category in vector.recent_categories.tolist() if category],
                    user_attributes=of_users[place],
                    item=item,
                    category=self._catalogue.category_of(item) if query.category is None else public_id(query.category),
                    item_attributes=of_items[place],
                    context=[context_id(name, given[name]) if name in given else 0 for name in fields],
                )
            )
        return asked

    def _answer(
        self,
        one: Asked,
        has_row: bool,
        clock: str,
        version: Version,
        ranked: list[Interest],
        outputs: Mapping[str, F32],
        place: int,
        names: Sequence[str],
    ) -> Answer:
        known = has_row or bool(one.recent_categories)
        engagement: Engagement | None = None
        if one.query.item is not None:
            engagement = {
                "item": one.query.item,
                "probability": probability(float(outputs["engagement_logit"][place])),
                "attributes": one.item_attributes.texts,
            }
        return Answer(
            user_id=one.query.user,
            known=known,
            cold_start=not known,
            version=version,
            at=iso(one.at_ms),
            at_ms=one.at_ms,
            clock=clock if one.query.at_ms is None else "request",
            interests=ranked,
            engagement=engagement,
            vector=outputs["vector"][place],
            features=dict(zip(names, one.vector.features.tolist(), strict=True)),
            attributes=one.user_attributes.texts,
        )


def version_of(served: Served, now_ms: int, mask: Mask) -> Version:
    """The version as answers name it."""
    return {
        "number": served.version,
        "epoch": served.epoch,
        "age_s": (now_ms - served.created_at_ms) / 1000,
        "mask_generation": mask.generation,
        "sources": served.sources,
    }


def probability(logit: float) -> float:
    """The logistic function.

    >>> probability(0.0), probability(-1e9) < 1e-25
    (0.5, True)
    """
    return 1.0 / (1.0 + math.exp(-min(max(logit, -STEEPEST_LOGIT), STEEPEST_LOGIT)))
