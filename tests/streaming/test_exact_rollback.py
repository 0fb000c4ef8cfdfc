"""After an exact rollback a stream with labels is, record by record, one that never saw the masked clicks.

Kills on the way, and rollbacks without labels, are in `tests/e2e/test_rollback_steps.py`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from state import layout
from state.config.sections import Features, LabelSettings
from state.config.settings import Settings
from state.events.identity import load_salt, user_id
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.history.store import HistoryStore
from state.log import Reader, Topics
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, LogLine, counts, turned
from streaming.rebuild import progress_on, rebuild
from tests.conftest import KafkaFactory
from tests.streaming.streams import BEGIN_MS, FOREVER, click, headers_of, running, send, settings_for, until

BATCH = 50
GOOD, ALL = 12 * BATCH, 24 * BATCH
WHO: dict[str, Any] = {"actor": "ann", "reason": "bots", "now_ms": 5}


def clicks() -> list[bytes]:
    """Good clicks; then 60 s of flipped actions, a flood of one category by fifty users, and a user gone mad among them."""
    made = [
        click(number, action="favorite" if number % 5 == 0 else ("view", "cart")[number % 2]) for number in range(GOOD)
    ]
    for number in range(GOOD, ALL):
        if GOOD + 100 <= number < GOOD + 160:
            made.append(click(number, action="purchase"))
        elif GOOD + 200 <= number < GOOD + 400 and number % 2:
            made.append(click(number, user=f"bot-{number % 50}", category="flooded", item="flooded-item"))
        elif number % 9 == 0 and number < ALL - BATCH:
            made.append(click(number, user="mad"))
        else:
            made.append(click(number, action="favorite" if number % 5 == 0 else ("view", "cart")[number % 2]))
    made[GOOD + 7] = made[7] = b"{not json"
    return made


@dataclass
class Deployment:
    """One stream with a registry beside it."""

    settings: Settings
    log: Path

    @property
    def controls(self) -> Controls:
        return Controls(self.settings.registry_dir)

    def store(self) -> HistoryStore:
        return HistoryStore(self.settings.stream_dir / layout.HISTORIES, self.settings.features.history, 1 << 30, True)

    def end(self) -> int:
        with Topics(self.settings.kafka) as topics:
            return topics.ends(self.settings.kafka.microbatches_topic)[0][1]

    def has(self, position: int, epoch: int = 1) -> bool:
        """Whether so many clicks are committed, in that epoch of the log."""
        if not self.log.exists() or " reading " not in self.log.read_text():
            return False
        store = self.store()
        try:
            line = store.extra("log_line") or b""
            return max(store.positions().values(), default=0) >= position and (
                epoch == 1 or b'"epoch": %d' % epoch in line
            )
        finally:
            store.close()


def mask_of(settings: Settings, topic_id: str) -> Mask:
    salt = load_salt(settings.salt_path)
    bots = [f"bot-{number}" for number in range(50)]
    word = Source(topic_id, 0).topic
    return Mask(
        generation=2,
        offsets=((word, 0, GOOD + 300, GOOD + 310),),
        times=((BEGIN_MS + (GOOD + 100) * 1000, BEGIN_MS + (GOOD + 160) * 1000),),
        users=MaskedUsers.of([user_id(salt, one) for one in [*bots, "mad"]]),
    )


def records(settings: Settings, line: LogLine) -> list[MicroBatch]:
    """What counts in a log."""
    with Topics(settings.kafka) as topics:
        end = topics.ends(settings.kafka.microbatches_topic)[0][1]
    found: list[MicroBatch] = []
    with Reader(settings.kafka, settings.kafka.microbatches_topic, [0]) as reader:
        while reader.position(0) < end:
            for batch in reader.poll(0.2):
                for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                    made = decode(value or b"")
                    if counts(line, made.header.log_epoch, offset):
                        found.append(made)
    return found


def contents(batches: Sequence[MicroBatch]) -> list[tuple[Any, ...]]:
    """Of each micro-batch its ranges, and its columns as bytes."""
    return [(one.header.ranges, {name: column.tobytes() for name, column in one.columns.items()}) for one in batches]


def content(one: Deployment) -> dict[str, Any]:
    store = one.store()
    try:
        return {
            "digest": store.digest(),
            "counts": store.counts(),
            "users": store.users(),
            "waiting": dict(store.waiting()),
        }
    finally:
        store.close()


def made(kafka_settings: KafkaFactory, tmp_path: Path, name: str, topic: str, labels: bool) -> Deployment:
    settings = settings_for(
        kafka_settings(clicks_topic=topic), tmp_path / name, tmp_path / "salt",
        cut_ms=60_000, cut_rows=BATCH, batch_events=BATCH,
    )  # fmt: skip
    settings = replace(settings, features=Features(history=24))
    if labels:
        settings = replace(settings, labels=LabelSettings(impressions=("favorite",), outcomes=("cart",), wait_s=90.0))
    one = Deployment(settings, tmp_path / f"{name}-log")
    one.controls.propose(start(actor="trainer", reason="first start", now_ms=0))
    return one


def test_the_log_histories_and_accounts_are_those_of_a_stream_that_never_saw_the_masked_clicks(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    topic = kafka_settings().clicks_topic
    ours = made(kafka_settings, tmp_path, "ours", topic, labels=True)
    kafka, values = ours.settings.kafka, clicks()
    with Topics(kafka) as topics:
        topic_id = topics.ensure(topic, 1, FOREVER).topic_id
    mask = mask_of(ours.settings, topic_id)
    send(kafka, values[:GOOD], partition=lambda _: 0)
    # 1. The good clicks; a version stands at their end. Then the poison.
    with running(ours.settings, ours.log) as stream:
        until(lambda: ours.has(GOOD), "the good clicks are not committed", 30.0)
        place = ours.end()
        send(kafka, values[GOOD:], GOOD, partition=lambda _: 0)
        until(lambda: ours.has(ALL - BATCH), "the poison is not committed", 30.0)
        # 2. Control goes back.
        line = turned(WHOLE, 1, place, ours.end(), ((Source(topic_id, 0), GOOD),))
        ours.controls.change(lambda now: roll_back(now, 3, mask, **WHO, log=line))
        until(lambda: ours.has(ALL, epoch=2), "the stream did not go back and read again")
        assert stream.stop() == 0, stream.lines
        assert any("histories rebuilt from the log" in said for said in stream.lines)
        assert not any("0 histories rebuilt" in said for said in stream.lines), "somebody had overflowed"

    # 3. A stream that has the mask from the beginning.
    theirs = made(kafka_settings, tmp_path, "theirs", topic, labels=True)
    theirs.controls.change(lambda now: roll_back(now, 3, mask, **WHO))
    with running(theirs.settings, theirs.log) as stream:
        until(lambda: theirs.has(ALL), "the other stream did not read all")
        assert stream.stop() == 0, stream.lines

    assert content(ours) == content(theirs)
    (found,) = content(ours)["counts"].values()
    assert found["masked"] > 200
    outcomes = ("rows", "dead", "filtered", "absent", "masked", "opened", "feedback")
    assert sum(found.get(name, 0) for name in outcomes) == ALL
    assert contents(records(ours.settings, line)) == contents(records(theirs.settings, WHOLE))
    # 4. A store that is lost now comes back along the same line.
    before = content(ours)
    rebuild(ours.settings, None, progress_on(io.StringIO()))
    assert content(ours) == before
    letters = [headers_of(one.settings.kafka, one.settings.kafka.dead_letters_topic) for one in (ours, theirs)]
    assert [one["offset"] for one in letters[0]] == [one["offset"] for one in letters[1]] == ["7", str(GOOD + 7)]
