"""An answer looks up a ranker's own tables by every id as training does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.predictor import Predictor
from state.attributes.values import AttributeStore, TopicPosition, pack, tables_of
from state.config.sections import Attributes
from state.config.settings import Settings
from state.events.identity import context_id, public_id, user_id
from state.features.spec import FeatureSpec, Mask
from state.layout import ATTRIBUTES, PROGRAMS
from state.ranking import transitions
from state.ranking.transitions import Lists, record, succession
from state.rows.tables import SERVED_IDS
from tests.conformance.test_own_tables import NARROW, WIDTH, LookingUp
from tests.deploy.serving.stocked import NOW_MS, SALT, Lowered, Stores, digest_of, manifest, small, vector_of
from tests.deploy.serving.stocked import predictor as predictor_of
from tests.vectors import vectorise
from trainer.versions.lowering import build

SPEC = replace(FeatureSpec(), sequence=3)
ATTRIBUTES_OF = Attributes("crm", "goods", ("age", "city"), ("brand",))
TABLES = tables_of(ATTRIBUTES_OF)
FIELDS = ("place", "device")
AGE, BRAND = TABLES["user"].ids(("25-34", None)), TABLES["item"].ids(("acme",))


@pytest.fixture(scope="module")
def looking_up() -> Lowered:
    model = LookingUp(small(Settings()).model, SPEC)
    return Lowered(build(model), model.weights(), model)


def row(one: int, width: int = WIDTH) -> Any:
    """The row of an id; zeros of one that has none."""
    known = [public_id(name) for name in ("i1", "i2", "shoes", "hats", "tea", "books")]
    known += [user_id(SALT, "ann"), context_id("place", "home"), AGE[0], BRAND[0], 1, 3]
    if one not in known:
        return np.zeros(width, np.float32)
    return np.random.default_rng(one % 2**32 + width).normal(0, 1, width).astype(np.float32)


def after_shoes() -> Lists:
    """The lists of no category and of shoes, ann's newest category: books came next."""
    lists = Lists.empty(2)
    record(np.array([1], np.int32), np.array([public_id("books")], np.uint64), lists)
    return lists


def tensors(lowered: Lowered) -> dict[str, Any]:
    names = [public_id(name) for name in ("i1", "i2", "shoes", "hats", "tea", "books")]
    ids = [*names, user_id(SALT, "ann"), context_id("place", "home"), int(AGE[0]), int(BRAND[0]), 1, 3]
    made: dict[str, Any] = {f"dense.{name}": value for name, value in lowered.weights.items()}
    for table, width in (("every", WIDTH), ("narrow", NARROW)):
        made[f"{table}.ids"] = np.array(ids, np.uint64)
        made[f"{table}.rows"] = np.stack([row(one, width) for one in ids])
    made["transition.ids"] = np.array([public_id("shoes")], np.uint64)
    made["transition.rows"] = transitions.pack(after_shoes(), np.zeros((2, transitions.SIGN_BYTES), np.uint8))[1:]
    made["popular"] = np.array([public_id("tea"), public_id("shoes")], np.uint64)
    return made


@pytest.fixture
def predictor(stores: Stores, looking_up: Lowered) -> Iterator[Predictor]:
    folder = stores.settings.serving_dir
    (folder / PROGRAMS / f"{digest_of(looking_up)}.tflite").write_bytes(looking_up.content)
    made = replace(manifest(2, digest_of(looking_up)), spec=SPEC.digest)
    stores.rows.apply(made, tensors(looking_up), NOW_MS, follow=True)
    store = AttributeStore(folder / ATTRIBUTES, 1 << 24)
    for side, one, text in (("user", user_id(SALT, "ann"), ("25-34", None)), ("item", public_id("i1"), ("acme",))):
        place = TopicPosition("identity", "ab" * 16, {0: 1})
        store.commit(side, {one: pack(TABLES[side].ids(text), text)}, place)
    features = replace(stores.settings.features, sequence=SPEC.sequence)
    yield predictor_of(stores, context=FIELDS, known=store, attributes=ATTRIBUTES_OF, features=features)
    store.close()


def padded(ids: list[int], count: int) -> list[int]:
    return [*ids, *[0] * (count - len(ids))]


def expected(stores: Stores, item: str | None) -> Any:
    """All rows of ann and the item, one behind another, as `LookingUp` says."""
    vector = vectorise(stores.histories.read(user_id(SALT, "ann")), NOW_MS, None, Mask.NONE, SPEC)
    events = [public_id("i2"), public_id("i1")]
    assert vector.sequence_items.tolist() == padded(events, 3)
    newest, popular = vector.recent_categories[None], np.array([public_id("tea"), public_id("shoes"), 0, 0], np.uint64)
    followers = succession(np.array([1], np.int32), after_shoes(), newest, popular).ids[0].tolist()
    assert public_id("books") in followers
    about = item is not None
    ids: dict[str, list[int]] = {
        "user": [user_id(SALT, "ann")],
        "item": [public_id(item) if item else 0],
        "category": [public_id("hats") if about else 0],
        "recent": padded([public_id("shoes"), public_id("hats")], SPEC.recent_categories),
        "successor": followers,
        "sequence_items": padded(events, 3),
        "sequence_categories": padded([public_id("shoes"), public_id("hats")], 3),
        "sequence_actions": vector.sequence_actions.tolist(),
    }
    context = [context_id("place", "home"), 0, *AGE]
    means = {"context": context, "item_attributes": BRAND if about else [0]}
    parts = []
    for name in SERVED_IDS:
        if name in means:
            parts.append(np.mean([row(one) for one in means[name]], axis=0))
        elif name != "popular":
            parts += [row(one) for one in ids[name]]
    return np.concatenate([*parts, *(row(one, NARROW) for one in ids["sequence_items"])])


@pytest.mark.parametrize("item", ["i1", None])
def test_every_id_is_looked_up_as_training_does(stores: Stores, predictor: Predictor, item: str | None) -> None:
    answer = predictor.profile("ann", item=item, context={"place": "home"})
    np.testing.assert_allclose(vector_of(answer), expected(stores, item), atol=1e-6)


def test_the_popular_categories_are_looked_up_once_for_all(predictor: Predictor) -> None:
    answer = predictor.profile("nobody")
    logits = [float(row(public_id(name)).sum()) for name in ("tea", "shoes")]
    shares = np.exp(logits) / np.exp(logits).sum()
    found = {one.id: one.probability for one in answer.interests}
    assert [found[f"{public_id(name):016x}"] for name in ("tea", "shoes")] == pytest.approx(shares, abs=1e-5)
