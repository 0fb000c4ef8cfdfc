"""Impressions and clicks as events of their own, through the real stream and the real Kafka: each learned once."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from state.config.sections import Events, LabelSettings
from state.config.settings import Settings
from state.history.store import HistoryStore
from state.log import Topics
from state.microbatch.batch import Kind, MicroBatch, trained
from streaming.accounts import faults
from streaming.rebuild import progress_on, rebuild
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    FOREVER,
    Follower,
    click,
    deduplicated,
    following,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

EVENTS = 400
USERS = 10
WAIT_S = 60
ACTIONS = ("view", "impression", "click")


def event(number: int) -> bytes:
    """Each user in turn, each second one: an impression, a view, a click (of a third of the users on that impression), an impression."""
    turn, user = divmod(number, USERS)
    action = ("impression", "view", "click", "impression")[turn % 4]
    item = f"item-{turn - 2}" if action == "click" and user % 3 == 0 else f"item-{turn}"
    return click(number, user=f"user-{user}", item=item, action=action)


def expected() -> tuple[dict[int, tuple[Kind, float]], int]:
    """By number what each row to learn from must say, and how many impressions still wait."""
    rows: dict[int, tuple[Kind, float]] = {}
    waiting = 0
    for number in range(EVENTS):
        turn, user = divmod(number, USERS)
        clicked = turn % 4 == 0 and user % 3 == 0 and number + 2 * USERS < EVENTS
        newest = EVENTS - 2 + number % 2
        if turn % 4 == 1:
            rows[number] = Kind.ROW, -1.0
        elif clicked:
            rows[number] = Kind.JOINED, 1.0
        elif turn % 4 != 2 and newest - number > WAIT_S:
            rows[number] = Kind.EXPIRED, 0.0
        elif turn % 4 != 2:
            waiting += 1
    return rows, waiting


def learned(batches: list[MicroBatch]) -> dict[int, tuple[Kind, float]]:
    """The rows to learn from by the number of their event, each once."""
    found: dict[int, tuple[Kind, float]] = {}
    for batch in batches:
        for index in np.flatnonzero(trained(batch.kind)).tolist():
            partition = batch.header.ranges[batch.source[index]].source.partition
            number = 2 * int(batch.opened[index]) + partition
            assert number not in found
            found[number] = Kind(int(batch.kind[index])), float(np.nan_to_num(batch.label[index], nan=-1.0))
    return found


def prepared(kafka_settings: KafkaFactory, folder: Path) -> Settings:
    """Settings with labels that arrive later, and the clicks in their topic."""
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    send(kafka, [event(number) for number in range(EVENTS)])
    settings = settings_for(kafka, folder / "state", folder / "salt")
    return replace(
        settings,
        events=Events(actions=ACTIONS, action_weights=(1.0, 1.0, 3.0)),
        labels=LabelSettings(impressions=("impression",), outcomes=("click",), wait_s=WAIT_S),
    )


def taken(log: Follower) -> None:
    until(lambda: next_offsets(log.poll()) == {0: EVENTS // 2, 1: EVENTS // 2}, "all events in the log")


def store_of(settings: Settings) -> HistoryStore:
    return HistoryStore(settings.stream_dir / "histories", map_bytes=1 << 30)


@pytest.mark.parametrize(
    "kill_at", ["stream.acknowledged:3", pytest.param("stream.committed:4", marks=pytest.mark.nightly)]
)
def test_after_kill_9_each_impression_is_learned_once_with_its_label_and_the_store_comes_back_from_the_log(
    kafka_settings: KafkaFactory, tmp_path: Path, kill_at: str
) -> None:
    settings = prepared(kafka_settings, tmp_path)
    rows, waiting = expected()
    with following(settings.kafka, settings.kafka.microbatches_topic) as log:
        with running(settings, tmp_path / "log", kill_at) as stream:
            assert stream.wait() == -signal.SIGKILL, stream.lines
        with running(settings, tmp_path / "log") as stream:
            taken(log)
            assert stream.stop() == 0, stream.lines
        assert learned(deduplicated(log.poll())[0]) == rows
    store = store_of(settings)
    assert (faults(store), store.waiting_rows()) == ((), waiting)

    elsewhere = replace(settings, paths=replace(settings.paths, state=str(tmp_path / "elsewhere")))
    rebuild(elsewhere, None, progress_on(io.StringIO()))
    again = store_of(elsewhere)
    assert (list(again.waiting()), again.cut()) == (list(store.waiting()), store.cut())
    again.close()

    # Where the log is gone, the clicks tell as much.
    with Topics(settings.kafka) as topics:
        topics.delete_before(
            settings.kafka.microbatches_topic, {0: topics.ends(settings.kafka.microbatches_topic)[0][1]}
        )
    from_clicks = replace(settings, paths=replace(settings.paths, state=str(tmp_path / "from-clicks")))
    rebuild(from_clicks, None, progress_on(io.StringIO()))
    again = store_of(from_clicks)
    assert (list(again.waiting()), again.cut()) == (list(store.waiting()), store.cut())
    again.close()
    store.close()
