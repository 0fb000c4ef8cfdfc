"""Serving offers what came next after a user's newest label, with the trainer's own logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.interests import newest_key
from deploy.serving.answers.predictor import KINDS
from deploy.serving.answers.query import Query
from springtide_client.answers import Profile
from state.events.identity import public_id, user_id
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.features.spec import EVENT, LABELLED, POSITIVE, FeatureSpec
from state.history.appends import Appends
from state.layout import PROGRAMS
from state.microbatch.batch import MicroBatch
from state.ranking.interest_scores import key_of_item
from state.ranking.transitions import SUCCESSORS
from tests.deploy.serving.stocked import NOW_MS, SALT, Lowered, Stores, clicks, digest_of, manifest, predictor
from tests.trainer.batches import micro_batch, spread
from tests.vectors import vectorise

SPEC = FeatureSpec()
CATEGORIES = 40
USERS = {"cleo": [1, 2, 7], "dora": [2], "emil": [4, 3, 2, 1], "finn": [35], "gus": []}
"""What each clicked, oldest first: numbers of categories."""
AT_MS = NOW_MS - 3_600_000
"""When the trainer's clicks begin."""


@dataclasses.dataclass(frozen=True)
class Taught:
    """A trainer that has learned, and what it publishes."""

    trainer: Any
    tensors: dict[str, Any]
    lowered: Lowered


@pytest.fixture(scope="module")
def taught() -> Taught:
    from state.config.settings import Settings
    from tests.deploy.serving.stocked import small
    from trainer.engine.step import Trainer
    from trainer.versions import checkpoint
    from trainer.versions.lowering import build

    settings = small(Settings())
    trainer = Trainer(dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, device="cpu")), SPEC)
    for number in range(12):
        trainer.step(micro_batch(64, first=64 * number, categories=CATEGORIES, at_ms=AT_MS))
    # The users' newest items, which others clicked before something else.
    own = dataclasses.replace(
        micro_batch(len(USERS), first=2000, categories=CATEGORIES, at_ms=AT_MS),
        item=np.array([public_id(f"i{len(clicked) - 1}") for clicked in USERS.values()], np.uint64),
    )
    mine = np.array([user_id(SALT, name) for name in USERS], np.uint64)
    trainer.step(dataclasses.replace(own, user=np.where([*map(bool, USERS.values())], mine, own.user)))
    trainer.step(dataclasses.replace(own, user=own.user + np.uint64(999), offset=own.offset + 100))
    after = micro_batch(len(USERS), first=2200, categories=CATEGORIES, at_ms=AT_MS)
    trainer.step(dataclasses.replace(after, user=own.user + np.uint64(999)))
    ranker = trainer.ranker()
    lowered = Lowered(build(ranker), ranker.weights(), ranker)
    return Taught(trainer, checkpoint.full(trainer), lowered)


@pytest.fixture
def shop(stores: Stores, taught: Taught) -> Stores:
    """Serves the version of the trainer, to users with some clicks."""
    for name, categories in USERS.items():
        events = clicks([("", f"i{number}", 1000 * (9 - number)) for number in range(len(categories))])
        events["category"], events["offset"] = spread(np.array(categories, np.int64)), np.arange(len(categories)) + 50
        owners = np.full(len(categories), user_id(SALT, name), np.uint64)
        stores.histories.commit(Appends.of(owners, events), (), {})
    serve(stores, taught.lowered.content, taught.tensors)
    return stores


def serve(stores: Stores, program: bytes, tensors: dict[str, Any]) -> None:
    lowered = Lowered(program, {}, None)
    path = stores.settings.serving_dir / PROGRAMS / f"{digest_of(lowered)}.tflite"
    path.write_bytes(program)
    with stores.rows.reader() as reader:
        version = reader.versions()[-1].version + 1
    stores.rows.apply(manifest(version, digest_of(lowered)), tensors, NOW_MS, follow=True)


def asked(stores: Stores) -> MicroBatch:
    """The users' rows as the trainer is given them; what they click next is some category."""
    vectors = [vectorise(stores.histories.read(user_id(SALT, name)), NOW_MS, None, Mask.NONE, SPEC) for name in USERS]
    return dataclasses.replace(
        micro_batch(len(USERS), first=9000),
        user=np.array([user_id(SALT, name) for name in USERS], np.uint64),
        category=spread(np.full(len(USERS), 17)),
        at_ms=np.full(len(USERS), NOW_MS),
        features=np.stack([vector.features for vector in vectors]),
        recent_categories=np.stack([vector.recent_categories for vector in vectors]),
        category_windows=np.stack([vector.category_windows for vector in vectors]),
    )


def successors(taught: Taught, labels: list[int]) -> list[int]:
    """By hand out of the trainer's table: who came next most often and is neither a label nor popular."""
    table = taught.trainer.transitions
    listed = table.lists(table.find(np.array(labels[:1], np.uint64))).ids[0].tolist()
    taken = {*labels, *taught.tensors["popular"].tolist()}
    return [label for label in listed if label and label not in taken][:SUCCESSORS]


def expected(stores: Stores, taught: Taught) -> list[dict[str, float]]:
    """Of each user the probabilities by id, from the trainer's own logits."""
    batch, found = asked(stores), []
    scores = taught.trainer.score(batch)
    for place, labels in enumerate(batch.recent_categories.tolist()):
        logits: dict[int, float] = {}
        ranked = (labels, taught.tensors["popular"].tolist(), successors(taught, labels))
        for kind, names in zip(KINDS, ranked, strict=True):
            for slot, label in enumerate(names):
                if label and label not in logits:
                    logits[label] = float(scores[f"{kind}_logits"][place, slot])
        chances = np.exp(np.array(list(logits.values())))
        found.append(dict(zip((f"{one:016x}" for one in logits), (chances / chances.sum()).tolist(), strict=True)))
    return found


def chances(answer: Profile) -> dict[str, float]:
    given = [one.probability for one in answer.interests]
    assert given == sorted(given, reverse=True)
    return {one.id: one.probability for one in answer.interests}


def test_each_candidate_has_the_trainers_probability_alone_and_among_others(shop: Stores, taught: Taught) -> None:
    wanted, labels = expected(shop, taught), asked(shop).recent_categories.tolist()
    assert "interests.weights" in taught.tensors
    together = predictor(shop).profiles([Query(name) for name in USERS])
    for name, own, chance, answer in zip(USERS, labels, wanted, together, strict=True):
        assert chances(answer) == pytest.approx(chance, abs=1e-5)
        assert chances(predictor(shop).profile(name)) == pytest.approx(chance, abs=1e-5)
        assert len(answer.interests) == len(chance)
        assert {f"{one:016x}" for one in successors(taught, own)} <= chance.keys()
    counts = [len(successors(taught, own)) for own in labels]
    # Somebody has all that there is room for, and whoever has not clicked has none.
    assert max(counts) == SUCCESSORS and counts[-1] == 0


def test_a_successor_is_named_as_other_labels_are(shop: Stores, taught: Taught) -> None:
    first = successors(taught, asked(shop).recent_categories[0].tolist())[0]
    empty = Appends.of(np.empty(0, np.uint64), clicks([]))
    shop.histories.commit(empty, (), {f"name:{first:016x}": b"tents"})
    found = {one.id: one.label for one in predictor(shop).profile("cleo").interests}
    assert found[f"{first:016x}"] == "tents"


def test_engagement_is_the_trainers_too_of_a_label_a_successor_and_something_else(shop: Stores, taught: Taught) -> None:
    trainer, batch = taught.trainer, asked(shop)
    none = np.zeros((len(batch), 0), np.uint64)
    first = batch.recent_categories[0].tolist()
    found = set()
    for category in (first[0], successors(taught, first)[0], 12345):
        about = dataclasses.replace(
            batch,
            item=np.full(len(batch), public_id("i9"), np.uint64),
            category=np.full(len(batch), category, np.uint64),
        )
        scores = trainer.engine.measure(trainer._record(about, none, (0, 0)), move=False).scores
        extra = {f"item:{public_id('i9'):016x}": category.to_bytes(8, "big")}
        shop.histories.commit(Appends.of(np.empty(0, np.uint64), clicks([])), (), extra)
        answers = predictor(shop).profiles([Query(name, item="i9") for name in USERS])
        for answer, logit in zip(answers, scores.engagement[: len(batch)].tolist(), strict=True):
            assert answer.engagement is not None
            assert answer.engagement.probability == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3)
        found.add(answers[0].engagement.probability if answers[0].engagement else None)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("items", "ages_s", "flags", "mask", "newest"),
    [
        ([5, 6, 7], [30, 20, 10], [0, 0, 0], Mask.NONE, 7),
        ([5, 6, 7], [30, 10, 20], [0, 0, 0], Mask.NONE, 6),
        ([5, 6, 7], [30, 20, -10], [0, 0, 0], Mask.NONE, 6),
        ([5, 6, 0], [30, 20, 10], [0, LABELLED, 0], Mask.NONE, 5),
        ([5, 6, 7], [30, 20, 10], [0, LABELLED | POSITIVE, LABELLED], Mask.NONE, 6),
        ([5, 6, 7], [30, 20, 10], [0, 0, 0], Mask(users=MaskedUsers.of([9])), 0),
        ([], [], [], Mask.NONE, 0),
    ],
)
def test_the_newest_list_is_that_of_the_item_of_the_latest_visible_click(
    items: list[int], ages_s: list[int], flags: list[int], mask: Mask, newest: int
) -> None:
    events = np.zeros(len(items), EVENT)
    events["item"], events["at_ms"], events["flags"] = items, NOW_MS - 1000 * np.array(ages_s, np.int64), flags
    assert newest_key(events, NOW_MS, mask, 9) == key_of_item(np.uint64(newest))
