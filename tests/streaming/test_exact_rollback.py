"""An exact rollback on a real Kafka: the process reverts its histories by itself, and a rebuild follows the same branch.

That rows, histories and accounts are those of a stream that never saw the masked clicks is proved in
`tests/e2e/test_rollback_steps.py`.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from state.config.sections import LabelSettings
from state.config.settings import Settings
from state.features.mask import Mask
from state.log import Topics
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import roll_back, start
from state.registry.controls import Controls
from state.registry.log_line import WHOLE, turned
from streaming.rebuild import rebuild
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
    click,
    following,
    headers_of,
    histories_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

GOOD, ALL = 600, 1200
MASKED_S = GOOD + 100, GOOD + 160


def values() -> list[bytes]:
    actions = ("favorite", "cart", "view", "view", "view")
    made = [click(number, action=actions[number % 5]) for number in range(ALL)]
    made[7] = made[GOOD + 7] = b"{not json"
    return made


def content(settings: Settings) -> dict[str, Any]:
    with histories_of(settings) as store:
        return {"digest": store.digest(), "counts": store.counts(), "waiting": dict(store.waiting())}


@pytest.mark.nightly
def test_the_stream_reverts_reads_again_and_is_rebuilt_along_the_new_branch(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    settings = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt")
    labels = LabelSettings(impressions=("favorite",), outcomes=("cart",), wait_s=90.0)
    settings = replace(settings, labels=labels)
    kafka, controls = settings.kafka, Controls(settings.registry_dir)
    controls.propose(start(actor="trainer", reason="first start", now_ms=0))

    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        source = Source(topics.ensure(kafka.clicks_topic, 1, FOREVER).topic_id, 0)
        send(kafka, values()[:GOOD], partition=lambda _: 0)
        with running(settings, tmp_path / "log") as stream:
            # 1. A version stands at the end of the good clicks.
            until(lambda: next_offsets(log.poll()) == {0: GOOD}, "the good clicks")
            place = topics.ends(kafka.microbatches_topic)[0][1]
            send(kafka, values()[GOOD:], GOOD, partition=lambda _: 0)
            until(lambda: next_offsets(log.poll()) == {0: ALL}, "the later clicks")
            # 2. Control goes back there.
            branch = turned(WHOLE, 1, place, topics.ends(kafka.microbatches_topic)[0][1], ((source, GOOD),))
            mask = Mask(generation=2, times=((BEGIN_MS + MASKED_S[0] * 1000, BEGIN_MS + MASKED_S[1] * 1000),))
            controls.change(lambda now: roll_back(now, 3, mask, actor="ann", reason="bots", now_ms=5, log=branch))
            until(lambda: topics.committed(kafka.group, kafka.clicks_topic) == {0: ALL}, "the clicks are committed")
            until(lambda: sum(" reading " in line for line in stream.lines) == 2, "the stream is opened again")
            until(lambda: _masked(log.poll()) == MASKED_S[1] - MASKED_S[0], "they are read again")
            assert stream.stop() == 0, stream.lines
    before = content(settings)
    assert before["counts"][source]["masked"] == MASKED_S[1] - MASKED_S[0]
    assert before["counts"][source]["next"] == ALL and before["waiting"]
    # 3. Each dead letter is written once.
    offsets = [letter["offset"] for letter in headers_of(kafka, kafka.dead_letters_topic)]
    assert offsets == ["7", str(GOOD + 7)]
    # 4. A lost store comes back along the branch.
    rebuild(settings, None, io.StringIO())
    assert content(settings) == before


def _masked(records: list[bytes]) -> int:
    """Masked positions in the micro-batches of the second epoch, once all of it is there."""
    headers = [header for record in records if (header := decode(record).header).log_epoch == 2]
    reached = max((part.next for header in headers for part in header.ranges), default=0)
    return sum(part.masked for header in headers for part in header.ranges) if reached == ALL else -1
