"""A click in Kafka changes an answer: the whole line, with the real processes and the real Kafka."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from state.events.identity import public_id
from state.log import Writer
from state.process.wall_clock import wall_ms
from tests.e2e.running import Loop, counting, led_by, until


def test_the_first_answer_comes_while_up_says_each_step(loop: Loop) -> None:
    said = loop.said()
    steps = [line.split()[2] for line in said.splitlines() if line[:1] == " " and "/9" in line]
    # Other tests may have started it again.
    assert steps[:9] == [f"{number}/9" for number in range(1, 10)]
    assert "curl -s http://127.0.0.1:" in said
    assert loop.get("/readyz")[0] == 200
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


def test_an_answer_says_all_that_it_rests_on(loop: Loop) -> None:
    user = "grace-of-the-fields"
    ends = loop.click([(user, "kettle", "kitchen", "view")] * 3)
    answer = loop.answer_trained_on(user, ends, counting("view.count_1h", 3))
    assert answer["user_id"] == user
    assert len(answer["vector"]) == 128
    assert answer["version"]["number"] > 0
    assert answer["version"]["epoch"] >= 1
    assert 0.0 <= answer["version"]["age_s"] < 60.0
    assert answer["clock"] == "event"
    assert abs(sum(interest["probability"] for interest in answer["interests"]) - 1.0) < 1e-3
    probabilities = [interest["probability"] for interest in answer["interests"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(answer["features"]) == 128
    assert all(isinstance(value, int) for value in answer["features"].values())
    assert answer["features"]["purchase.count_1h"] == 0


def test_a_new_item_is_recommended_soon_after_its_first_click(loop: Loop) -> None:
    """To somebody else who looks into its category; `tests.bench.recommend` says how soon."""
    item = f"item-born-at-{time.time_ns()}"
    loop.click([("mary-of-the-new-item", item, "category-of-the-new-item", "view")])

    def is_recommended() -> bool:
        status, answer = loop.get("/v1/recommendations/shopper-2?category=category-of-the-new-item")
        return status == 200 and f"{public_id(item):016x}" in {one["id"] for one in answer["items"]}

    until(is_recommended, "the new item is not recommended")


def test_a_refused_record_is_counted_with_its_reason_and_holds_nobody_up(loop: Loop) -> None:
    name = "springtide_stream_dead_letters_total"
    before = loop.metrics("stream").by(name, "reason").get("undecodable", 0.0)
    writer = Writer(loop.settings.kafka)
    writer.send(loop.settings.kafka.clicks_topic, 0, None, b"no json")
    writer.flush()
    writer.close()
    until(
        lambda: loop.metrics("stream").by(name, "reason").get("undecodable", 0.0) == before + 1,
        "the dead letter is not counted",
    )
    user = "linus-after-the-dead-letter"
    loop.answer_trained_on(user, loop.click([(user, "pen", "office", "view")]))


def test_a_clock_that_is_50_minutes_ahead_is_its_own_users_business(loop: Loop) -> None:
    """Both its times are: the event's and the record's in Kafka."""
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
