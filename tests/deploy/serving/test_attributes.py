"""Answers use the newest attributes and name them; the applier follows their topics by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.answers.host import Host
from deploy.serving.answers.predictor import KnownAttributes
from deploy.serving.applier import AttributesFollower
from state.attributes.values import AttributeStore, AttributeTable, TopicPosition, pack, tables_of
from state.config.sections import Attributes
from state.config.settings import Settings
from state.errors import MissingSalt, NotReady
from state.events.identity import public_id, user_id
from state.layout import ATTRIBUTES
from state.log import Topics, Writer
from state.metrics import ApplierMetrics, StorageMetrics
from state.storage import SERVING, Room
from tests.conftest import KafkaFactory
from tests.deploy.serving.stocked import (
    DIM,
    NOW_MS,
    SALT,
    SALT_KEY,
    Stores,
    digest_of,
    manifest,
    model_outputs,
    predictor,
    row_of,
    tensors,
    vector_of,
)

WANTED = Attributes("crm", "goods", ("age", "city"), ("brand",))
TABLES = tables_of(WANTED)
ROOM = Room(SERVING, StorageMetrics(CollectorRegistry()), lambda seconds: False)
PLACE = TopicPosition("identity", "ab" * 16, {0: 1})


def put(store: AttributeStore, table: AttributeTable, one: int, *texts: str | None) -> None:
    store.commit(table.side, {one: pack(table.ids(texts), texts)}, PLACE)


@pytest.fixture
def known(stores: Stores) -> Iterator[AttributeStore]:
    """Version 2 has rows of some attributes; ann's record has an age, i1's a brand."""
    names = {"context": ["user:age=25-34", "user:city", "user:age?", "item:brand=acme", "item:brand?"]}
    second = manifest(2, digest_of(stores.lowered), parent=1)
    empty = {
        f"{table}.{name}": np.empty(0, np.uint64)
        for table in ("user", "item", "category")
        for name in ("ids", "removed")
    }
    empty |= {f"{table}.rows": np.empty((0, DIM), np.float32) for table in ("user", "item", "category")}
    stores.rows.apply(second, tensors(stores.lowered, 2, names, ["tea", "shoes"]) | empty, NOW_MS, follow=True)
    store = AttributeStore(stores.settings.serving_dir / ATTRIBUTES, 1 << 24)
    put(store, TABLES["user"], user_id(SALT, "ann"), "25-34", None)
    put(store, TABLES["item"], public_id("i1"), "acme")
    yield store
    store.close()


def learned(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return row_of("context", name, 2)


def test_an_answer_uses_the_attributes_as_training_does_and_names_them(stores: Stores, known: AttributeStore) -> None:
    answer = predictor(stores, known=known, attributes=WANTED).profile("ann", item="i1")
    context = (learned("user:age=25-34") + learned("user:city")) / np.float32(2)
    item, category = row_of("item", "i1", 1) + learned("item:brand=acme"), row_of("category", "hats", 1)
    wanted = model_outputs(stores, "ann", context_row=context, item_row=item, category_row=category)
    np.testing.assert_allclose(vector_of(answer), wanted["vector"][0], atol=1e-5)
    assert answer.engagement is not None
    assert answer.engagement.probability == pytest.approx(1 / (1 + np.exp(-wanted["engagement_logit"][0])), abs=1e-5)
    assert answer.attributes == {"age": "25-34", "city": None}
    assert answer.engagement.attributes == {"brand": "acme"}


def test_whoever_has_no_record_is_unknown_and_not_none(stores: Stores, known: AttributeStore) -> None:
    answer = predictor(stores, known=known, attributes=WANTED).profile("nobody")
    wanted = model_outputs(stores, "nobody", context_row=learned("user:age?") / np.float32(2))
    np.testing.assert_allclose(vector_of(answer), wanted["vector"][0], atol=1e-5)
    assert answer.attributes == {}


def test_context_fields_and_attributes_share_the_mean(stores: Stores, known: AttributeStore) -> None:
    answer = predictor(stores, context=("device",), known=known, attributes=WANTED).profile("ann")
    context = (learned("user:age=25-34") + learned("user:city")) / np.float32(3)
    np.testing.assert_allclose(
        vector_of(answer), model_outputs(stores, "ann", context_row=context)["vector"][0], atol=1e-5
    )


def test_the_next_answer_has_the_newest_record(stores: Stores, known: AttributeStore) -> None:
    answering = predictor(stores, known=known, attributes=WANTED)
    assert answering.profile("bob").attributes == {}
    put(known, TABLES["user"], user_id(SALT, "bob"), None, "Oslo")
    assert answering.profile("bob").attributes == {"age": None, "city": "Oslo"}


def test_without_attributes_answers_are_what_they_were(stores: Stores, known: AttributeStore) -> None:
    answer = predictor(stores).profile("ann", item="i1")
    assert answer.attributes == {}
    np.testing.assert_allclose(vector_of(answer), model_outputs(stores, "ann")["vector"][0], atol=1e-5)


def test_a_worker_waits_for_the_appliers_attributes(stores: Stores) -> None:
    settings = replace(stores.settings, attributes=WANTED)
    # The process that answers is another one than the applier, which has these open.
    stores.close()
    host = Host(settings, SALT, lambda: NOW_MS)
    with pytest.raises(NotReady, match="attributes"):
        host.predictor()
    AttributeStore(settings.serving_dir / ATTRIBUTES, 1 << 24).close()
    assert host.predictor().profile("ann").attributes == {}
    host.close()


def test_the_applier_follows_both_topics(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    wanted = replace(WANTED, user_topic=f"crm-{kafka.clicks_topic}", item_topic=f"goods-{kafka.clicks_topic}")
    settings = Settings(kafka=kafka, attributes=wanted)
    settings = replace(settings, paths=replace(settings.paths, salt_file=str(tmp_path / "salt")))
    settings.salt_path.write_bytes(SALT_KEY)
    settings.salt_path.chmod(0o600)
    follower = AttributesFollower(settings, tmp_path / "attributes", ApplierMetrics(CollectorRegistry()), ROOM)
    stop = threading.Event()
    thread = threading.Thread(target=follower.run, args=(stop,))
    # The topics come into being after the applier did.
    thread.start()
    with Topics(kafka) as topics, Writer(kafka) as writer:
        for topic in (wanted.user_topic, wanted.item_topic):
            topics.ensure(topic, 1, {"cleanup.policy": "compact"})
        writer.send(wanted.user_topic, 0, b"ann", json.dumps({"age": "25-34"}).encode())
        writer.send(wanted.item_topic, 0, b"i1", json.dumps({"brand": 7}).encode())
        writer.flush()
    answering, until = KnownAttributes(follower.store, TABLES), threading.Event()
    for _ in range(600):
        (ann,), (lamp,) = answering.of("user", [user_id(SALT, "ann")]), answering.of("item", [public_id("i1")])
        if ann.texts and lamp.texts:
            break
        until.wait(0.05)
    stop.set()
    thread.join()
    assert (ann.texts, lamp.texts) == ({"age": "25-34", "city": None}, {"brand": "7"})
    follower.close()


def test_the_applier_needs_the_streams_salt(tmp_path: Path) -> None:
    settings = Settings(attributes=WANTED)
    settings = replace(settings, paths=replace(settings.paths, salt_file=str(tmp_path / "none")))
    with pytest.raises(MissingSalt, match="no salt"):
        AttributesFollower(settings, tmp_path / "attributes", ApplierMetrics(CollectorRegistry()), ROOM)
