"""The process that makes past clicks into rows: of a real topic the rows that the real stream wrote, and an end in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from state.config.settings import Settings
from state.experiments.past import Past, write_past
from state.log import Topics
from state.microbatch.codec import Frames, decode
from state.registry.control import start
from state.registry.registry import Registry
from tests import forked
from tests.conftest import KafkaFactory
from tests.streaming.distributed.shop import rows_of
from tests.streaming.streams import FOREVER, click, following, next_offsets, running, send, settings_for, until
from tests.streaming.test_past import past_of

CLICKS = 600


def child(settings: Settings, past: Past) -> subprocess.Popen[bytes]:
    """The process, with what it is asked for in a trial's registry."""
    registry = Registry(settings.state_dir / "experiments" / "anew" / "registry")
    if registry.control() is None:
        registry.propose(start(actor="ann", reason="to see", now_ms=0))
    write_past(registry.path, past)
    environment: Mapping[str, str] = settings.environment()
    command = [sys.executable, "-m", "streaming.past", f"--paths.registry={registry.path}"]
    return forked.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def settings(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    send(kafka, [click(number) for number in range(CLICKS)])
    return settings_for(kafka, tmp_path / "state", tmp_path / "salt")


def test_its_rows_are_those_in_the_training_log_and_it_ends_in_order(settings: Settings, tmp_path: Path) -> None:
    with (
        following(settings.kafka, settings.kafka.microbatches_topic) as log,
        running(settings, tmp_path / "log") as stream,
    ):
        until(lambda: next_offsets(log.poll()) == {0: CLICKS // 2, 1: CLICKS // 2}, "all clicks in the log")
        assert stream.stop() == 0, stream.lines
        written = log.poll()
    sources = {part.source for value in written for part in decode(value).header.ranges}
    made, frames = child(settings, past_of(dict.fromkeys(sources, CLICKS // 2))), Frames()
    out, errors = made.communicate(timeout=240)
    values = list(frames.take(out))
    assert (made.returncode, frames.ended) == (0, True), errors.decode()
    assert rows_of(values) == rows_of(written) and len(rows_of(values)) == CLICKS

    # Nobody reads on: its trainer was killed.
    registry = settings.state_dir / "experiments" / "anew" / "registry"
    left = forked.Popen(made.args, env=settings.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert left.stdout is not None and left.stderr is not None
    assert left.stdout.read(4)
    left.stdout.close()
    assert left.wait(240) == 0 and "nobody reads on" in left.stderr.read().decode()
    left.stderr.close()
    assert list(registry.glob("past-*")) == []
