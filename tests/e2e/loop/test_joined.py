"""Labels that arrive later and attributes, in the loop that all end-to-end tests share: learned once, named, measured."""

from __future__ import annotations

from typing import Any

from deploy.watch import accounts
from state.attributes.values import tables_of
from state.events.identity import load_salt, public_id, user_id
from state.log import Reader, Topics
from state.microbatch.batch import Kind, MicroBatch, trained
from state.microbatch.codec import decode
from tests.e2e.running import Loop, until

USER, ITEM, OTHER = "vera-of-the-labels", "lamp-of-the-labels", "vase-of-the-labels"


def test_an_impression_is_learned_from_once_with_its_label_and_the_attributes_of_its_moment(loop: Loop) -> None:
    kafka, settings = loop.settings.kafka, loop.settings
    loop.know("user", USER, {"age_band": "made-up-band", "memberLevel": None})
    loop.know("item", ITEM, {"brand": "acme", "price": 12})

    # 1. An answer names them, also of somebody who has never clicked.
    def named() -> dict[str, Any] | None:
        answer = loop.profile(USER, item=ITEM)
        return answer if answer and answer["attributes"] and answer["engagement"]["attributes"] else None

    answer = until(named, "no answer names the attributes")
    assert answer["attributes"] == {"age_band": "made-up-band", "level": None}
    assert answer["engagement"]["attributes"] == {"brand": "acme", "price": "10-50"}
    known = "springtide_stream_attributes_known"
    until(
        lambda: set(loop.metrics("stream").by(known, "side").values()) == {1.0},
        "the stream does not know the attributes",
    )

    # 2. An impression and its click, and one that nobody clicks.
    with Topics(kafka) as topics:
        begin = topics.ends(kafka.microbatches_topic)[0][1]
    loop.click([(USER, ITEM, "lighting", "favorite"), (USER, ITEM, "lighting", "cart")])
    loop.answer_trained_on(USER, loop.click([(USER, OTHER, "lighting", "favorite")]))
    user = user_id(load_salt(settings.salt_path), USER)
    batches: list[MicroBatch] = []
    with Reader(kafka, kafka.microbatches_topic, [0], {0: begin}) as reader:

        def learnable() -> list[MicroBatch] | None:
            for polled in reader.poll(0.1):
                found = [decode(value) for value in polled.values if value is not None]
                batches.extend(batch.take(batch.user == user) for batch in found)
            return batches if sum(int(trained(batch.kind).sum()) for batch in batches) >= 2 else None

        until(learnable, "no label of the impressions is in the training log")
    rows = [
        (Kind(batch.kind[row]), int(batch.item[row]), float(batch.label[row]))
        for batch in batches
        for row in range(len(batch))
        if trained(batch.kind)[row]
    ]
    assert rows == [(Kind.JOINED, public_id(ITEM), 1.0), (Kind.EXPIRED, public_id(OTHER), 0.0)]
    tables = tables_of(settings.attributes)
    for batch in batches:
        for row in range(len(batch)):
            assert batch.user_attributes[row].tolist() == tables["user"].ids(["made-up-band", None])
            is_known = batch.item[row] == public_id(ITEM)
            wanted = tables["item"].ids(["acme", "10-50"]) if is_known else tables["item"].unknown.tolist()
            assert batch.item_attributes[row].tolist() == wanted

    # 3. The measures by value have them, and no row was learned twice or never.
    until(
        lambda: loop.metrics("trainer").value(
            "springtide_trainer_slice_rows", attribute="age_band", value="made-up-band"
        ),
        "no measure of the value",
    )

    def compared() -> dict[str, Any] | None:
        found = accounts.account(settings)
        return found if found["compared"] else None

    account = until(compared, "the accounts cannot be compared")
    assert account["faults"] == []
    assert min(account["stream"][name] for name in ("opened", "feedback", "joined", "expired")) >= 1
