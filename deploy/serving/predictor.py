"""A user's profile from the host's stores: history to windows, rows to logits, logits to an answer.

Every answer reads one version in one transaction over pointer, rows, dense
weights and mask, and one moment of the user's history. No TensorFlow.

1. The user's pseudonym, by the salt.
2. Pointer, control and mask; program and dense weights, when the version changed.
3. The history, and its windows as of `at` without what the mask takes out.
4. Rows of the user, the context, the labels, the item.
5. Candidates = the user's labels, and the popular ones that are not among them.
6. Logits, softmax over the candidates, names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving.program import Program, read_program
from state.errors import SaltMismatch, SpecMismatch, SpringtideError
from state.features import FeatureSpec, Mask, vectorise
from state.history import HistoryStore
from state.identity import Salt, context_id, public_id, user_id
from state.rows import RowReader, RowStore, Served

CONTROL_NOTE = "control"
MASK_NOTE = "mask"
CLOCK_EXTRA = "clock"
NAMES_REMEMBERED = 100_000

F32 = NDArray[np.float32]


class NotReady(SpringtideError):
    """Something that answers need is not here yet. Wait for the applier, or look at its log."""


class Interest(TypedDict):
    """A candidate: the category's name (or id where it has none), its id, its probability."""

    label: str
    id: str
    probability: float


class Version(TypedDict):
    """Which version an answer is from; `age_s` since it was published, `sources` as far as it was trained."""

    number: int
    epoch: int
    age_s: float
    mask_generation: int
    sources: Mapping[str, int]


class Engagement(TypedDict):
    """How probable it is that the user engages with the item."""

    item: str
    probability: float


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


@dataclass(frozen=True)
class Loaded:
    """What stays the same between two versions.

    Attributes:
        popular: Popular labels, P of them or fewer.
        popular_rows: `[P, dim]` float32.
        popular_known: `[1, P]` float32, 1 where there is a popular label.
    """

    served: Served
    spec: FeatureSpec
    program: Program
    popular: tuple[int, ...]
    popular_rows: F32
    popular_known: F32


def softmax(logits: F32) -> F32:
    """Probabilities of logits, `[n]` float32.

    >>> softmax(np.array([0.0, 0.0], np.float32)).tolist()
    [0.5, 0.5]
    """
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum(), np.float32)


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
    ) -> None:
        self._rows = rows
        self._histories = histories
        self._programs = programs
        self._spec = spec
        self._salt = salt
        self._context_fields = tuple(context_fields)
        self._clock = clock
        self._now_ms = now_ms
        self._loaded: Loaded | None = None
        self._program: tuple[str, Program] | None = None
        self._control: tuple[bytes | None, Mask] = (None, Mask.NONE)
        self._names: dict[int, str] = {}

    def profile(
        self,
        user: str,
        item: str | None = None,
        category: str | None = None,
        context: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> Answer:
        """Answers for one user.

        Args:
            user: The raw id; it is used for the pseudonym and returned, and never stored.
            item: An item to score the engagement for.
            category: The item's category; by default the one it was last seen in.
            context: Values of context fields.
            at_ms: The time to answer for; by default now by the configured clock.

        Raises:
            NotReady: There is no version yet.
            SaltMismatch: The version's pseudonyms are of another salt.
            SpecMismatch: The version's features are not those of the settings.
            ProgramError: The version's program cannot be run.
        """
        identity = user_id(self._salt, user)
        now_ms = self._now_ms()
        with self._rows.reader() as reader:
            loaded = self._take_up(reader)
            mask = self._mask(reader)
            at_ms, clock = self._at(at_ms, now_ms)
            history = self._histories.read(identity)
            features, labels, windows = vectorise(history, at_ms, None, mask, loaded.spec, identity)
            inputs, seen, user_known = self._inputs(reader, loaded, identity, labels.tolist(), item, category, context or {})
        inputs["features"] = features.astype(np.float32)[None]
        inputs["label_windows"] = windows.astype(np.float32)[None]
        outputs = loaded.program.predict(inputs)
        known = bool(seen) or user_known
        version = loaded.served
        return Answer(
            user_id=user,
            known=known,
            cold_start=not known,
            version={
                "number": version.version,
                "epoch": version.epoch,
                "age_s": (now_ms - version.created_at_ms) / 1000,
                "mask_generation": mask.generation,
                "sources": version.sources,
            },
            at=iso(at_ms),
            at_ms=at_ms,
            clock=clock,
            interests=self._interests(loaded, seen, inputs, outputs),
            engagement=None if item is None else {"item": item, "probability": _sigmoid(float(outputs["engagement_logit"][0]))},
            vector=outputs["vector"][0],
            features=dict(zip(loaded.spec.names, features.tolist(), strict=True)),
        )

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
            raise SaltMismatch(
                f"version {served.version} was trained with the salt {served.salt}, this worker has {self._salt.fingerprint}; "
                "give it the stream's salt file (paths.salt_file)"
            )
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
        places = program.shapes["popular_rows"][0]
        popular = [label for label in reader.popular(served.version).tolist() if label]
        places = places if places > 0 else len(popular)
        popular = popular[:places]
        rows, _ = reader.get("category", popular, served)
        dim = program.shapes["user_row"][-1]
        popular_rows, popular_known = np.zeros((places, dim), np.float32), np.zeros((1, places), np.float32)
        if rows.size:
            popular_rows[: len(popular)] = rows
        popular_known[0, : len(popular)] = 1.0
        self._loaded = Loaded(served, self._spec, program, tuple(popular), popular_rows, popular_known)
        return self._loaded

    def _mask(self, reader: RowReader) -> Mask:
        """The mask of the newest control that the applier has seen."""
        control = reader.note(CONTROL_NOTE)
        if control != self._control[0]:
            self._control = (control, Mask.from_json((reader.note(MASK_NOTE) or b"{}").decode()))
        return self._control[1]

    def _at(self, at_ms: int | None, now_ms: int) -> tuple[int, str]:
        if at_ms is not None:
            return at_ms, "request"
        if self._clock == "event":
            by_events = event_now(self._histories.extra(CLOCK_EXTRA), now_ms)
            if by_events is not None:
                return by_events, "event"
        return now_ms, "wall"

    def _inputs(
        self,
        reader: RowReader,
        loaded: Loaded,
        user: int,
        labels: list[int],
        item: str | None,
        category: str | None,
        context: Mapping[str, str],
    ) -> tuple[dict[str, NDArray[Any]], list[int], bool]:
        """The program's inputs but for the windows; the user's labels; whether the user has a row."""
        served, dim = loaded.served, loaded.program.shapes["user_row"][-1]
        seen = [label for label in labels if label]
        item_id = None if item is None else public_id(item)
        category_id = public_id(category) if category is not None else None if item_id is None else self._category_of(item_id)
        categories = seen if category_id is None else [*seen, category_id]

        user_rows, user_known = reader.get("user", [user], served)
        inputs: dict[str, NDArray[Any]] = {
            "user_row": _or_zeros(user_rows, 1, dim),
            "context_row": np.zeros((1, dim), np.float32),
            "item_row": np.zeros((1, dim), np.float32),
            "category_row": np.zeros((1, dim), np.float32),
            "label_rows": np.zeros((1, len(labels), dim), np.float32),
            "label_mask": np.zeros((1, len(labels)), np.float32),
            "popular_rows": loaded.popular_rows,
            "popular_mask": loaded.popular_known,
        }
        fields = [context_id(name, context[name]) for name in self._context_fields if name in context]
        if fields:
            context_rows, _ = reader.get("context", fields, served)
            # The mean is over all fields, as in training: a missing one counts as zeros.
            inputs["context_row"] = _or_zeros(context_rows, len(fields), dim).sum(0, keepdims=True) / len(self._context_fields)
        if item_id is not None:
            inputs["item_row"] = _or_zeros(reader.get("item", [item_id], served)[0], 1, dim)
        if categories:
            rows = _or_zeros(reader.get("category", categories, served)[0], len(categories), dim)
            # Labels come first and without gaps.
            inputs["label_rows"][0, : len(seen)] = rows[: len(seen)]
            inputs["label_mask"][0, : len(seen)] = 1.0
            if category_id is not None:
                inputs["category_row"] = rows[len(seen) :]
        own = set(seen)
        if not own.isdisjoint(loaded.popular):
            mask = loaded.popular_known.copy()
            mask[0, [place for place, label in enumerate(loaded.popular) if label in own]] = 0.0
            inputs["popular_mask"] = mask
        return inputs, seen, bool(user_known[0])

    def _interests(
        self, loaded: Loaded, seen: list[int], inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, F32]
    ) -> list[Interest]:
        free = inputs["popular_mask"][0].tolist()
        candidates = [*seen, *(label for label, there in zip(loaded.popular, free, strict=False) if there)]
        if not candidates:
            return []
        places = np.flatnonzero(inputs["popular_mask"][0])
        logits = np.concatenate((outputs["label_logits"][0, : len(seen)], outputs["popular_logits"][0, places]))
        shares = softmax(logits)
        order = np.argsort(-shares, kind="stable").tolist()
        probabilities = shares.tolist()
        name = self._name
        return [
            {"label": name(candidates[place]), "id": f"{candidates[place]:016x}", "probability": probabilities[place]}
            for place in order
        ]

    def _name(self, label: int) -> str:
        known = self._names.get(label)
        if known is not None:
            return known
        stored = self._histories.extra(f"name:{label:016x}")
        if stored is None:
            return f"{label:016x}"
        if len(self._names) >= NAMES_REMEMBERED:
            self._names.clear()
        return self._names.setdefault(label, stored.decode())

    def _category_of(self, item: int) -> int | None:
        stored = self._histories.extra(f"item:{item:016x}")
        return None if stored is None else int.from_bytes(stored, "big")


def _or_zeros(rows: F32, count: int, dim: int) -> F32:
    """Rows of a table; zeros where the version has no row of that table at all."""
    return rows if rows.shape[1] else np.zeros((count, dim), np.float32)


def _sigmoid(logit: float) -> float:
    return float(1.0 / (1.0 + np.exp(-logit)))


def iso(at_ms: int) -> str:
    """ISO 8601 of milliseconds since 1970.

    >>> iso(1_500)
    '1970-01-01T00:00:01.500Z'
    """
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
