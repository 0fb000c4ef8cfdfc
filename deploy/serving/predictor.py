"""Users' profiles from the host's stores: histories to windows, rows to logits, logits to answers.

Every answer reads one version in one transaction over pointer, rows, dense
weights and mask, and one moment of the user's history. No TensorFlow. The
questions that arrived together are answered together: the program takes 55 us
for one row and 150 us for sixteen.

1. Pointer, control and mask; program and dense weights, when the version changed.
2. The users' pseudonyms, by the salt, and their histories.
3. The windows as of `at`, without what the mask takes out.
4. Rows of the user, the context, the categories, the item, and of the attributes of user and item; where an item is
   asked for, what the pair's crosses say.
5. Candidates = the user's categories, the popular ones that are not among them, and of what over all users came next
   after the newest category the most frequent that are neither; of each, how often it came next.
6. Logits, softmax over the candidates, names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving import crosses
from deploy.serving.attributes import NOTHING, Known, KnownAttributes
from deploy.serving.candidates import Interest, Label, add_succession, came_next, interests
from deploy.serving.program import BATCHES, Program, batch_of, read_program
from state.errors import NotReady, SaltMismatch, SpecMismatch
from state.events.identity import Salt, context_id, public_id, user_id
from state.features.spec import FeatureSpec, Mask, Vector, vectorise
from state.history.store import HistoryStore
from state.ranking.crosses import Crosses, Values
from state.rows.reader import RowReader
from state.rows.served import Served
from state.rows.store import RowStore

CONTROL_NOTE = "control"
MASK_NOTE = "mask"
CLOCK_EXTRA = "clock"
NAMES_REMEMBERED = 100_000
ROWS_REMEMBERED = 10_000
MOST_AT_ONCE = BATCHES[-1]

F32 = NDArray[np.float32]


class Version(TypedDict):
    """Which version an answer is from; `age_s` since it was published, `sources` as far as it was trained."""

    number: int
    epoch: int
    age_s: float
    mask_generation: int
    sources: Mapping[str, int]


class Engagement(TypedDict):
    """How probable it is that the user engages with the item, whose attributes are named as the user's are."""

    item: str
    probability: float
    attributes: Mapping[str, str | None]


@dataclass(slots=True)
class Answer:
    """What is known of one user at one moment; its fields are those of the JSON.

    Attributes:
        user_id: As it was asked for.
        known: Whether the user has a visible click or a row.
        cold_start: Whether the answer is the one for unknown users.
        version: Which version it is from.
        at: The time the windows speak of, ISO 8601.
        at_ms: The same in milliseconds.
        clock: Where it comes from: `event`, `wall` or `request`.
        interests: Candidates, best first; the probabilities sum to 1.
        engagement: For the item asked for; else None.
        vector: `[width]` float32.
        features: The windows by name.
        attributes: Of the user, by name; None where the record has no such value. Empty without a record.
    """

    user_id: str
    known: bool
    cold_start: bool
    version: Version
    at: str
    at_ms: int
    clock: str
    interests: list[Interest]
    engagement: Engagement | None
    vector: F32
    features: dict[str, int]
    attributes: Mapping[str, str | None]


class Query(NamedTuple):
    """A question.

    Attributes:
        user: The raw id; it is used for the pseudonym and returned, and never stored.
        item: An item to score the engagement for.
        category: The item's category; by default the one it was last seen in.
        context: Values of context fields.
        at_ms: The time to answer for; by default now by the configured clock.
    """

    user: str
    item: str | None = None
    category: str | None = None
    context: Mapping[str, str] = MappingProxyType({})
    at_ms: int | None = None


class Pair(NamedTuple):
    """A user and an item that was asked for, and all that is known of them; ids are 0 where there is none."""

    query: Query
    user: int
    item: int
    category: int
    person: Known
    good: Known
    vector: Vector


@dataclass(frozen=True)
class Loaded:
    """What stays the same between two versions.

    Attributes:
        dim: Width of rows.
        popular: `[P]` uint64, padded with 0.
        popular_labels: Those there are, as answers show them.
        popular_rows: `[P, dim]` float32.
        popular_known: `[P]` float32, 1 where there is a popular label.
        missing: The bytes of a row that is not there.
        cross_shares: `[C, 2]` float32, how much weights and margins of crosses count.
        category_rows: Rows of categories read so far; they recur in most answers.
    """

    served: Served
    program: Program
    dim: int
    popular: NDArray[np.uint64]
    popular_labels: list[Label]
    popular_rows: F32
    popular_known: F32
    missing: bytes
    cross_shares: F32
    category_rows: dict[int, bytes] = field(default_factory=dict)


def event_now(clock: bytes | None, now_ms: int) -> int | None:
    """The event clock: the newest accepted event's time, and the wall time since it was accepted.

    >>> event_now(b'{"event_ms": 100, "accepted_ms": 5000}', 5030), event_now(None, 5030)
    (130, None)
    """
    if clock is None:
        return None
    values = json.loads(clock)
    return int(values["event_ms"]) + max(0, now_ms - int(values["accepted_ms"]))


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
        self._programs = programs
        self._spec = spec
        self._salt = salt
        self._context_fields = tuple(context_fields)
        names = self._attributes.names
        self._crosses = Crosses(spec, self._context_fields, names["user"], names["item"])
        self._clock = clock
        self._now_ms = now_ms
        self._loaded: Loaded | None = None
        self._program: tuple[str, Program] | None = None
        self._control: tuple[bytes | None, Mask] = (None, Mask.NONE)
        self._labels: dict[int, Label] = {}

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

    def profiles(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers questions in their order, all from the same version.

        Args:
            queries: At most `MOST_AT_ONCE`.

        Raises:
            NotReady: There is no version yet.
            SaltMismatch: The version's pseudonyms are of another salt.
            SpecMismatch: The version's features are not those of the settings.
            ProgramError: The version's program cannot be run.
            CorruptVersion: The program's file is missing or damaged.
        """
        now_ms = self._now_ms()
        with self._rows.reader() as reader:
            # 1.
            loaded, mask = self._take_up(reader), self._mask(reader)
            default_ms, clock = self._now(now_ms)
            # 2.
            users = [user_id(self._salt, query.user) for query in queries]
            histories = self._histories.read_many(users)
            # 3.
            times = [default_ms if query.at_ms is None else query.at_ms for query in queries]
            vectors = [
                vectorise(history, at_ms, None, mask, self._spec, user)
                for user, history, at_ms in zip(users, histories, times, strict=True)
            ]
            # 4. 5.
            seen = [[label for label in vector.recent_categories.tolist() if label] for vector in vectors]
            people = self._attributes.of("user", users)
            items = [None if query.item is None else public_id(query.item) for query in queries]
            goods = self._attributes.of("item", [item or 0 for item in items])
            categories = [
                self._category_of(item) if query.category is None else public_id(query.category)
                for query, item in zip(queries, items, strict=True)
            ]
            inputs, known = self._inputs(reader, loaded, users, items, categories, seen)
            found = came_next(
                reader, loaded.served, np.stack([vector.recent_categories for vector in vectors]), loaded.popular
            )
            add_succession(inputs, found, self._categories(reader, loaded, found.ids.reshape(-1).tolist()))
            self._add_attributes(reader, loaded, queries, inputs, people, goods)
            pairs = [
                (place, Pair(query, user, item, category or 0, person, good, vector))
                for place, (query, user, item, category, person, good, vector) in enumerate(
                    zip(queries, users, items, categories, people, goods, vectors, strict=True)
                )
                if item is not None
            ]
            self._add_crosses(reader, loaded, pairs, inputs)
        for place, vector in enumerate(vectors):
            inputs["features"][place] = vector.features
            inputs["category_windows"][place] = vector.category_windows
        # 6.
        outputs = loaded.program.predict(inputs)
        named = [
            ([self._label(label) for label in own], [self._label(label) for label in others if label])
            for own, others in zip(seen, found.ids.tolist(), strict=True)
        ]
        ranked = interests(named, loaded.popular_labels, inputs, outputs)
        served, names = loaded.served, self._spec.names
        version: Version = {
            "number": served.version,
            "epoch": served.epoch,
            "age_s": (now_ms - served.created_at_ms) / 1000,
            "mask_generation": mask.generation,
            "sources": served.sources,
        }
        answers = []
        for place, query in enumerate(queries):
            is_known = known[place] or bool(seen[place])
            engagement: Engagement | None = None
            if query.item is not None:
                chance = 1.0 / (1.0 + math.exp(-min(max(float(outputs["engagement_logit"][place]), -60.0), 60.0)))
                engagement = {"item": query.item, "probability": chance, "attributes": goods[place].texts}
            answers.append(
                Answer(
                    user_id=query.user,
                    known=is_known,
                    cold_start=not is_known,
                    version=version,
                    at=iso(times[place]),
                    at_ms=times[place],
                    clock=clock if query.at_ms is None else "request",
                    interests=ranked[place],
                    engagement=engagement,
                    vector=outputs["vector"][place],
                    features=dict(zip(names, vectors[place].features.tolist(), strict=True)),
                    attributes=people[place].texts,
                )
            )
        return answers

    def ready(self) -> Served:
        """The version that answers would use now.

        Raises:
            NotReady, SaltMismatch, SpecMismatch, ProgramError: As `profile`.
        """
        with self._rows.reader() as reader:
            return self._take_up(reader).served

    def _take_up(self, reader: RowReader) -> Loaded:
        """The served version's program with its weights; loaded when it changed."""
        served = reader.served()
        if served is None:
            raise NotReady("no version is here yet; wait for the trainer's first version and for the applier")
        loaded = self._loaded
        if loaded is not None and loaded.served.serial == served.serial:
            return loaded
        if served.salt != self._salt.fingerprint:
            raise SaltMismatch.between(f"version {served.version}", served.salt, self._salt.fingerprint)
        if served.spec != self._spec.digest:
            raise SpecMismatch(
                f"version {served.version} has the feature spec {served.spec[:12]}, the settings give {self._spec.digest[:12]}; "
                "use the settings of the stream"
            )
        if self._program is None or self._program[0] != served.program:
            self._program = (served.program, Program(read_program(self._programs / f"{served.program}.tflite")))
        program = self._program[1]
        # A failed load may leave half of the weights: the next answer must load again.
        self._loaded = None
        program.load(reader.dense(served.version))
        places, dim = program.shapes["popular_rows"]
        stored = reader.popular(served.version)
        popular = stored[stored != 0][:places]
        popular_rows, popular_known = np.zeros((places, dim), np.float32), np.zeros(places, np.float32)
        popular_known[: len(popular)] = 1.0
        loaded = Loaded(
            served,
            program,
            dim,
            np.pad(popular, (0, places - len(popular))),
            [self._label(label) for label in popular.tolist()],
            popular_rows,
            popular_known,
            bytes(4 * dim),
            crosses.shares_of(reader, served, self._crosses),
        )
        popular_rows[: len(popular)] = self._categories(reader, loaded, popular.tolist())
        self._loaded = loaded
        return loaded

    def _mask(self, reader: RowReader) -> Mask:
        """The mask of the newest control that the applier has seen."""
        control = reader.note(CONTROL_NOTE)
        if control != self._control[0]:
            self._control = (control, Mask.from_json((reader.note(MASK_NOTE) or b"{}").decode()))
        return self._control[1]

    def _now(self, now_ms: int) -> tuple[int, str]:
        if self._clock == "event":
            by_events = event_now(self._histories.extra(CLOCK_EXTRA), now_ms)
            if by_events is not None:
                return by_events, "event"
        return now_ms, "wall"

    def _inputs(
        self,
        reader: RowReader,
        loaded: Loaded,
        users: list[int],
        items: list[int | None],
        categories: list[int | None],
        seen: list[list[int]],
    ) -> tuple[dict[str, NDArray[Any]], list[bool]]:
        """The program's inputs, the windows still empty, and whether each user has a row."""
        served, rows = loaded.served, batch_of(len(users))
        shapes = loaded.program.shapes
        inputs = {name: np.zeros((rows, *shape[1:]), np.float32) for name, shape in shapes.items() if shape[0] < 0}
        inputs["popular_rows"] = loaded.popular_rows
        inputs["popular_mask"][: len(users)] = loaded.popular_known
        known, popular = [], loaded.popular.tolist()
        for place, (user, item, category, recent_categories) in enumerate(
            zip(users, items, categories, seen, strict=True)
        ):
            row = reader.row("user", user, served)
            known.append(row is not None)
            if row is not None:
                inputs["user_row"][place] = np.frombuffer(row, np.float32)
            if recent_categories:
                # Categories come first and without gaps.
                inputs["recent_rows"][place, : len(recent_categories)] = self._categories(
                    reader, loaded, recent_categories
                )
                inputs["recent_mask"][place, : len(recent_categories)] = 1.0
                own = set(recent_categories)
                taken = [rank for rank, label in enumerate(popular) if label in own]
                inputs["popular_mask"][place, taken] = 0.0
            if item is not None:
                inputs["item_row"][place] = np.frombuffer(
                    reader.row("item", item, served) or loaded.missing, np.float32
                )
            if category is not None:
                inputs["category_row"][place] = self._categories(reader, loaded, [category])[0]
        return inputs, known

    def _categories(self, reader: RowReader, loaded: Loaded, recent_categories: Sequence[int]) -> F32:
        """Rows of categories, `[n, dim]` float32; zeros for those without one."""
        cached = loaded.category_rows
        found = []
        for label in recent_categories:
            row = cached.get(label)
            if row is None:
                if len(cached) >= ROWS_REMEMBERED:
                    cached.clear()
                row = cached[label] = reader.row("category", label, loaded.served) or loaded.missing
            found.append(row)
        return np.frombuffer(b"".join(found), np.float32).reshape(-1, loaded.dim)

    def _add_attributes(
        self,
        reader: RowReader,
        loaded: Loaded,
        queries: Sequence[Query],
        inputs: dict[str, NDArray[Any]],
        people: Sequence[Known],
        goods: Sequence[Known],
    ) -> None:
        """The mean over the context fields and the user's attributes, and the item's attributes added to its row."""
        for place, (query, user, item) in enumerate(zip(queries, people, goods, strict=True)):
            fields = [context_id(name, query.context[name]) for name in self._context_fields if name in query.context]
            if fields or user.ids:
                # As in training a field that is not given counts as zeros.
                count = len(self._context_fields) + len(user.ids)
                inputs["context_row"][place] = self._sum(reader, loaded, [*fields, *user.ids]) / np.float32(count)
            if query.item is not None and item.ids:
                inputs["item_row"][place] += self._sum(reader, loaded, item.ids) / np.float32(len(item.ids))

    def _add_crosses(
        self, reader: RowReader, loaded: Loaded, pairs: Sequence[tuple[int, Pair]], inputs: dict[str, NDArray[Any]]
    ) -> None:
        """What each asked pair's crosses say; one without a row says nothing."""
        if not pairs or "cross" not in inputs or not loaded.cross_shares.size:
            return
        contexts = [
            [
                context_id(name, pair.query.context[name]) if name in pair.query.context else 0
                for name in self._context_fields
            ]
            for _, pair in pairs
        ]
        values = Values(
            user=np.array([pair.user for _, pair in pairs], np.uint64),
            item=np.array([pair.item for _, pair in pairs], np.uint64),
            category=np.array([pair.category for _, pair in pairs], np.uint64),
            context=np.array(contexts, np.uint64).reshape(len(pairs), -1),
            user_attributes=np.array([pair.person.ids for _, pair in pairs], np.uint64).reshape(len(pairs), -1),
            item_attributes=np.array([pair.good.ids for _, pair in pairs], np.uint64).reshape(len(pairs), -1),
            features=np.stack([pair.vector.features for _, pair in pairs]),
        )
        found = crosses.logits(reader, loaded.served, self._crosses, loaded.cross_shares, values)
        inputs["cross"][[place for place, _ in pairs]] = found

    def _sum(self, reader: RowReader, loaded: Loaded, ids: Sequence[int]) -> F32:
        """The sum of rows of contexts and attributes, `[dim]` float32; an id without one counts as zeros."""
        total = np.zeros(loaded.dim, np.float32)
        for one in ids:
            total += np.frombuffer(reader.row("context", one, loaded.served) or loaded.missing, np.float32)
        return total

    def _label(self, label: int) -> Label:
        known = self._labels.get(label)
        if known is not None:
            return known
        identity = f"{label:016x}"
        stored = self._histories.extra(f"name:{identity}")
        if stored is None:
            return Label(identity, identity)
        if len(self._labels) >= NAMES_REMEMBERED:
            self._labels.clear()
        return self._labels.setdefault(label, Label(stored.decode(), identity))

    def _category_of(self, item: int | None) -> int | None:
        stored = None if item is None else self._histories.extra(f"item:{item:016x}")
        return None if stored is None else int.from_bytes(stored, "big")


def iso(at_ms: int) -> str:
    """ISO 8601 of milliseconds since 1970.

    >>> iso(1_500)
    '1970-01-01T00:00:01.500Z'
    """
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
