"""A foreign record in the training log stops the trainer and nothing else; `up` says what to type, and with that it goes on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deploy import status
from state.log import Topics, Writer
from tests.e2e.running import Loop, until
from tests.e2e.watching import Watching


@pytest.mark.nightly
def test_answers_go_on_while_the_trainer_cannot_until_the_record_is_left_out(loop: Loop, watching: Watching) -> None:
    kafka = loop.settings.kafka
    worker, stream = loop.pid("worker"), loop.pid("stream")
    begin = len(loop.said())
    with Writer(kafka) as writer:
        writer.send(kafka.microbatches_topic, 0, None, b"hello")
        writer.flush()
    with Topics(kafka) as topics:
        end = topics.ends(kafka.microbatches_topic)[0][1]
    died = r"trainer died \(exit 1\): .*offset (\d+): a value of 5 bytes is no micro-batch.*after \d+ deaths in a row"
    until(lambda: re.search(died, loop.said()[begin:]), "the trainer does not die twice")
    found = re.search(died, loop.said()[begin:])
    assert found is not None
    offset = int(found[1])
    assert offset < end
    # The terminal's line is short; the log has what to type.
    words = f"springtide train (or up) --skip-record {offset} --reason TEXT"
    assert words in (loop.settings.logs_dir / "trainer.log").read_text()
    # 1. Nobody else is harmed.
    assert loop.running
    assert (loop.pid("worker"), loop.pid("stream")) == (worker, stream)
    loop.click([("while-it-cannot", "tent", "outdoors", "purchase")] * 3)
    answer = until(lambda: known(loop, "while-it-cannot"), "clicks do not reach answers")
    assert answer["purchase.count_7d"] == 3
    dying = until(lambda: state_of(loop)["figures"]["dying"], "status does not say it")
    assert dying["trainer"] >= 2
    watching.wait_for("SpringtidePartDying", part="trainer")
    # 2. The operator types it.
    assert loop.stop() == 0
    loop.start("--skip-record", str(offset), "--reason", "a test wrote it")
    loop.answer_trained_on("once-it-can", loop.click([("once-it-can", "tent", "outdoors", "purchase")]))
    assert loop.metrics("trainer").value("springtide_trainer_records_left_out_total") == 1
    account = until(lambda: balanced(loop), "the accounts do not balance")
    assert account["trainer"]["records_left_out"] == 1
    watching.wait_until_over("SpringtidePartDying")


def known(loop: Loop, user: str) -> dict[str, int] | None:
    answer = loop.profile(user)
    return answer["features"] if answer and answer["features"]["purchase.count_7d"] else None


def balanced(loop: Loop) -> dict[str, dict[str, int]] | None:
    account: dict[str, dict[str, int]] = state_of(loop)["accounting"]
    return account if account["balanced"] else None


def state_of(loop: Loop) -> dict[str, Any]:
    """What `springtide status -o json` shows, whatever is wrong."""
    return status.document(loop.settings, status.take(loop.settings))
