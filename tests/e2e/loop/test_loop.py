"""A running loop: clicks are learned from, and every answer says what it rests on."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from deploy.serving.requests.grpc_server import message
from deploy.watch import accounts
from deploy.watch.scrape import serving_address
from state.attributes.values import tables_of
from state.events.identity import load_salt, public_id, user_id
from state.log import Reader, Topics, Writer
from state.microbatch.batch import Kind, MicroBatch, trained
from state.microbatch.codec import decode
from state.process.environment import wall_ms
from state.registry.registry import Registry
from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import Loop, counting, led_by, until


def test_the_first_answer_comes_while_up_says_each_step(loop: Loop) -> None:
    said = loop.said()
    steps = [line.split()[2] for line in said.splitlines() if line[:1] == " " and "/9" in line]
    # Other tests may have started it again.
    assert steps[:9] == [f"{number}/9" for number in range(1, 10)]
    assert "curl -s http://127.0.0.1:" in said
    assert loop.get("/readyz")[0] == 200
    until(lambda: "degraded" not in loop.get("/readyz")[1], "/readyz lists parts without updates")
    assert loop.get("/healthz")[0] == 200


def test_a_burst_in_a_category_that_never_existed_leads_the_answer(loop: Loop) -> None:
    user, category = "ada-of-the-burst", "category-born-just-now"
    before = loop.profile(user)
    assert before is not None
    assert before["cold_start"]
    assert category not in [interest["label"] for interest in before["interests"]]
    ends = loop.click([(user, f"new-item-{number}", category, "purchase") for number in range(20)])
    answer = loop.answer_trained_on(user, ends, led_by(category), item="new-item-3", category=category)
    assert answer["known"]
    assert not answer["cold_start"]
    assert answer["engagement"]["item"] == "new-item-3"
    assert 0.0 <= answer["engagement"]["probability"] <= 1.0


def test_a_new_item_is_recommended_soon_after_its_first_click(loop: Loop) -> None:
    """To somebody else who looks into its category; `tests.bench.recommend` says how soon."""
    item = f"item-born-at-{time.time_ns()}"
    loop.click([("mary-of-the-new-item", item, "category-of-the-new-item", "view")])

    def is_recommended() -> bool:
        status, answer = loop.get("/v1/recommendations/shopper-2?category=category-of-the-new-item")
        return status == 200 and f"{public_id(item):016x}" in {one["id"] for one in answer["items"]}

    until(is_recommended, "the new item is not recommended")


def test_a_clock_that_is_50_minutes_ahead_is_its_own_users_business(loop: Loop) -> None:
    ada = "ada-whose-clock-is-right"
    loop.answer_trained_on(ada, loop.click([(ada, "kettle", "kitchen", "view")] * 3), counting("view.count_1h", 3))
    ahead_ms = wall_ms() + 3_000_000
    with Writer(loop.settings.kafka) as writer:
        click = {"user": "bob", "item": "kettle", "category": "kitchen", "action": "view", "time": ahead_ms}
        writer.send(loop.settings.kafka.clicks_topic, None, b"bob", json.dumps(click).encode(), (), ahead_ms)
        writer.flush()
    answer = loop.answer_trained_on(ada, loop.ends())
    assert abs(answer["at_ms"] - wall_ms()) < 60_000
    assert answer["features"]["view.count_1h"] == 3
    until(lambda: loop.springtide("status")["figures"]["clocks_off"].get("ahead"), "the clock is not named")


def test_status_shows_every_part_running(loop: Loop) -> None:
    def all_run() -> bool:
        state = loop.springtide("status")
        assert state["registry"]["control"]["serving"] == "follow"
        return all(part["answers"] for part in state["processes"].values()) and bool(state["kafka"]["answers"])

    until(all_run, lambda: f"{loop.springtide('status')['processes']}")


def test_each_process_prepares_its_kernels_before_it_needs_them(loop: Loop) -> None:
    logs = {path.name: path.read_text() for path in loop.settings.logs_dir.glob("*.log")}
    assert {"applier.log", "stream.log", "trainer.log", "worker.log"} <= logs.keys()
    late = [line for text in logs.values() for line in text.splitlines() if "was not prepared" in line]
    assert late == []


def test_answers_use_the_features_that_were_trained(loop: Loop) -> None:
    def compared() -> dict[str, int] | None:
        rows: dict[str, int] = loop.springtide("status")["parity"] or {}
        return rows if rows.get("equal") or rows.get("differs") else None

    assert until(compared, "no row was compared")["differs"] == 0, loop.logs()


def test_what_the_loop_writes_is_its_owners_alone(loop: Loop) -> None:
    state = loop.settings.state_dir
    open_to_others = []
    paths = [Path(folder, name) for folder, folders, files in os.walk(state) for name in (*folders, *files)]
    for path in (state, *paths):
        try:
            if path.stat().st_mode & 0o077:
                open_to_others.append(path.relative_to(state))
        except FileNotFoundError:  # a version that was published or swept meanwhile
            continue
    assert open_to_others == []


USER = "one-of-two-hosts@example.org"


def both_answer(loop: Loop, host: ServingHost, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The answers of both hosts about the user, once each is as wanted."""

    def found() -> list[dict[str, Any]] | None:
        answers = [loop.profile(USER), host.profile(USER)]
        return [one for one in answers if one] if all(one and wanted(one) for one in answers) else None

    return until(found, host.said)


def test_a_second_host_learns_from_clicks_and_a_pin_makes_answers_equal(loop: Loop, tmp_path: Path) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    host = ServingHost("second", tmp_path / "second", loop, {})
    host.start()
    try:
        ends = loop.click([(USER, "lamp", "light", "purchase")] * 7)
        learned = loop.answer_trained_on(USER, ends)["version"]["number"]

        def has_learned(answer: dict[str, Any]) -> bool:
            return bool(answer["version"]["number"] >= learned and answer["features"]["purchase.count_7d"] == 7)

        both_answer(loop, host, has_learned)
        pinned = loop.springtide("pin", str(loop.kept()[0]), "--reason", "a test")
        number = pinned["control"]["serving"]["version"]
        moment = str(both_answer(loop, host, lambda one: one["version"]["number"] == number)[0]["at_ms"])
        first, second = (one.profile(USER, at=moment) or {} for one in (loop, host))
        for answer in (first, second):
            del answer["version"]["age_s"]
        for ours, theirs in zip(first["interests"], second["interests"], strict=True):
            # An erasure deleted records of the log. A name that they announced is announced again ten minutes later.
            theirs["label"] = ours["label"] if theirs["label"] == theirs["id"] else theirs["label"]
        assert first == second
        loop.springtide("follow", "--reason", "a test ends")
        both_answer(loop, host, lambda one: one["version"]["number"] > number)
    finally:
        host.stop()
        forget_memory(tmp_path)


CHURN_USER = "shopper-1"


def test_profiles_say_how_probable_it_is_that_the_user_leaves(loop: Loop) -> None:
    def said() -> dict[str, Any] | None:
        found = loop.profile(CHURN_USER)
        return found if found is not None and "churn" in found else None

    answer = until(said, "nothing is learned of who leaves")
    assert 0.0 <= answer["churn"] <= 1.0
    unknown = loop.profile("nobody-who-ever-came")
    assert unknown is not None and "churn" not in unknown
    asked = urllib.request.Request(
        serving_address(loop.settings, "/v1/profiles:batch"),
        json.dumps({"users": [CHURN_USER, "nobody-who-ever-came"]}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30.0) as response:
        both = json.load(response)["profiles"]
    assert 0.0 <= both[0]["churn"] <= 1.0 and "churn" not in both[1]
    with grpc.insecure_channel(f"127.0.0.1:{loop.settings.serving.grpc_port}") as channel:
        kinds = [message(f"springtide.v1.{name}") for name in ("GetProfileRequest", "Profile")]
        ask = channel.unary_unary("/springtide.v1.Profiles/GetProfile", kinds[0].SerializeToString, kinds[1].FromString)
        told = ask(kinds[0](question={"user_id": CHURN_USER}), timeout=60)
    assert told.HasField("churn") and 0.0 <= told.churn <= 1.0


def test_its_measures_are_on_metrics_in_status_and_in_versions(loop: Loop) -> None:
    def learned() -> float | None:
        return loop.metrics("trainer").value("springtide_trainer_churn_examples")

    until(lambda: (learned() or 0.0) > 100.0, "too little is learned of who leaves")
    found = loop.springtide("status")["churn"]
    assert found["examples"] > 100 and found["waiting"] > 0
    assert 0.0 < found["log_loss"] < 2.0 and 0.0 < found["auc"] < 1.0 and 0.0 < found["left"] < 1.0
    registry = Registry(loop.settings.registry_dir)

    def kept() -> bool:
        return registry.manifest(loop.kept()[0]).metrics.get("churn.total.rows", 0.0) > 100

    until(kept, "no version says what was learned of who leaves")


JOINED_USER, ITEM, OTHER = "vera-of-the-labels", "lamp-of-the-labels", "vase-of-the-labels"


def test_an_impression_is_learned_from_once_with_its_label_and_the_attributes_of_its_moment(loop: Loop) -> None:
    kafka, settings = loop.settings.kafka, loop.settings
    loop.know("user", JOINED_USER, {"age_band": "made-up-band", "memberLevel": None})
    loop.know("item", ITEM, {"brand": "acme", "price": 12})

    # 1. An answer names them, also of somebody who has never clicked.
    def named() -> dict[str, Any] | None:
        answer = loop.profile(JOINED_USER, item=ITEM)
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
    loop.click([(JOINED_USER, ITEM, "lighting", "favorite"), (JOINED_USER, ITEM, "lighting", "cart")])
    loop.answer_trained_on(JOINED_USER, loop.click([(JOINED_USER, OTHER, "lighting", "favorite")]))
    user = user_id(load_salt(settings.salt_path), JOINED_USER)
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
