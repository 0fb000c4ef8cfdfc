"""What the tests of serving put into its stores: a lowered model, manifests, rows, clicks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.predictor import Stores as HostStores
from springtide_client.answers import Profile
from state.attributes.values import AttributeStore
from state.config.settings import Settings
from state.events.identity import Salt, public_id, user_id
from state.features.spec import EVENT, FeatureSpec, Mask
from state.history.store import HistoryStore
from state.positions import Source
from state.registry.manifest import Kind, LogRange, Manifest
from state.rows.store import RowStore
from tests.vectors import vectorise

NOW_MS = 1_800_000_000_000
SOURCE = Source("ab" * 16, 0)
SALT_KEY = b"a salt of the tests only"
SALT = Salt(SALT_KEY)
DIM = 8
MAP = 1 << 27
CATEGORIES = ["shoes", "hats", "books", "tea"]
POPULAR = ["tea", "shoes"]


@dataclass(frozen=True)
class Lowered:
    """A program as the trainer publishes it.

    Attributes:
        content: The bytes of the `.tflite` file.
        weights: Its dense weights by name.
        model: The model it was lowered from, for reference answers.
    """

    content: bytes
    weights: Mapping[str, Any]
    model: Any


def small(settings: Settings) -> Settings:
    return replace(settings, model=replace(settings.model, dim=DIM, hidden=(16, 12), popular=4))


def digest_of(lowered: Lowered) -> str:
    return hashlib.sha256(lowered.content).hexdigest()


def manifest(version: int, program: str, parent: int | None = None, epoch: int = 1, **more: Any) -> Manifest:
    """A manifest of a version; a base where it has no parent."""
    kind: Kind = "base" if parent is None else "delta"
    made = Manifest(
        version=version, kind=kind, epoch=epoch, parent=parent, visible=((1, version),), log=LogRange(),
        sources=((SOURCE, 1000 + version),), steps=version, rows=version, created_at_ms=NOW_MS - 2000, event_time_ms=NOW_MS - 3000,
        spec=FeatureSpec().digest, program=program, salt=Salt(SALT_KEY).fingerprint, mask_generation=0,
        metrics={}, environment={}, files={},
    )  # fmt: skip
    return replace(made, **more)


def row_of(table: str, name: str, version: int) -> np.ndarray[Any, Any]:
    """A row that tells its table, id and version apart."""
    seed = (hash_of(table, name) + version) % (1 << 32)
    return np.random.default_rng(seed).normal(0, 0.5, DIM).astype(np.float32)


def hash_of(table: str, name: str) -> int:
    """The id of a row."""
    return user_id(Salt(SALT_KEY), name) if table == "user" else public_id(name)


def tensors(lowered: Lowered, version: int, names: Mapping[str, list[str]], popular: list[str]) -> dict[str, Any]:
    """The tensors of a version with rows for `names` by table."""
    made: dict[str, Any] = {f"dense.{name}": value for name, value in lowered.weights.items()}
    for table, ids in names.items():
        made[f"{table}.ids"] = np.array([hash_of(table, name) for name in ids], np.uint64)
        made[f"{table}.rows"] = np.stack([row_of(table, name, version) for name in ids])
        made[f"{table}.removed"] = np.empty(0, np.uint64)
    made["popular"] = np.array([public_id(name) for name in popular], np.uint64)
    return made


def predictor(
    stores: Stores,
    clock: str = "wall",
    context: tuple[str, ...] = (),
    known: AttributeStore | None = None,
    **sections: Any,
) -> Predictor:
    """Answers from the stores, with these sections of the settings."""
    settings = stores.settings
    serving, events = replace(settings.serving, clock=clock), replace(settings.events, context=context)
    settings = replace(settings, **{"serving": serving, "events": events, **sections})
    return Predictor(HostStores(stores.rows, stores.histories, known), settings, SALT, lambda: NOW_MS)


def vector_of(answer: Profile) -> np.ndarray[Any, Any]:
    """The vector of an answer that has one, `[dim]` float32."""
    assert answer.vector is not None
    return np.asarray(answer.vector)


def model_inputs(model: Any, users: list[str], vectors: list[Any], row: Callable[[str, str], Any]) -> dict[str, Any]:
    """What a model is asked about users without an item, composed as `trainer/model/inputs.py` says.

    `row` returns the row of a table's name; all of `CATEGORIES` have one, and of the users ann.
    """
    shapes = {name: tuple(spec.shape) for name, spec in model.specs().items()}
    made = {
        name: np.zeros([len(users) if size is None else size for size in shape], np.float32)
        for name, shape in shapes.items()
    }
    rows = {public_id(name): row("category", name) for name in CATEGORIES}
    for place, name in enumerate(POPULAR):
        made["popular_rows"][place] = rows[public_id(name)]
    for place, (user, vector) in enumerate(zip(users, vectors, strict=True)):
        made["features"][place] = vector.features
        if "category_windows" in made:
            made["category_windows"][place] = vector.category_windows
        for slot in np.flatnonzero(vector.sequence_actions).tolist():
            # All clicks are on one item.
            made["sequence_item_rows"][place, slot] = row("item", "i1")
            made["sequence_category_rows"][place, slot] = rows[int(vector.sequence_categories[slot])]
            made["sequence_mask"][place, slot] = 1.0
        if user == "ann":
            made["user_row"][place] = row("user", user)
        own = vector.recent_categories.tolist()
        for slot, category in enumerate(filter(None, own)):
            made["recent_rows"][place, slot] = rows[category]
            made["recent_mask"][place, slot] = 1.0
        for slot, name in enumerate(POPULAR):
            made["popular_mask"][place, slot] = public_id(name) not in own
    return made


def model_outputs(stores: Stores, user: str, **inputs: Any) -> dict[str, Any]:
    """What the model itself says of a user now, by version 1 and with these inputs, each of one row."""
    vector = vectorise(stores.histories.read(user_id(SALT, user)), NOW_MS, None, Mask.NONE, FeatureSpec())
    asked = model_inputs(stores.lowered.model, [user], [vector], lambda table, name: row_of(table, name, 1))
    asked |= {name: np.asarray(value)[None] for name, value in inputs.items()}
    return {name: np.asarray(value) for name, value in stores.lowered.model.predict(asked).items()}


def clicks(rows: list[tuple[str, str, int]], first_offset: int = 0) -> Any:
    """Events (category, item, milliseconds before NOW) as `[n]` EVENT."""
    events = np.zeros(len(rows), EVENT)
    for place, (category, item, age_ms) in enumerate(rows):
        events[place] = (
            NOW_MS - age_ms, public_id(category), public_id(item), first_offset + place, SOURCE.topic, SOURCE.partition, 0, 0,
        )  # fmt: skip
    return events


@dataclass
class Stores:
    """The stores of a serving host, open for writing, and the settings of a worker."""

    settings: Settings
    rows: RowStore
    histories: HistoryStore
    lowered: Lowered
    closed: bool = False

    def close(self) -> None:
        """Closes both; one process may have a store open only once."""
        if not self.closed:
            self.closed = True
            self.rows.close()
            self.histories.close()
