"""The validation as a process of its own, on a real Kafka: it judges a window, offers it on /metrics, and ends when asked to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy import sections
from deploy.kafka.configuration import free_port
from deploy.watch.scrape import scrape
from state.log import Log
from tests import forked
from tests.conftest import KafkaFactory
from tests.deploy.validation.live import bootstrapped, minutes, settings_at

DEADLINE_S = 120.0


def test_the_process_judges_windows_of_a_real_log_and_ends_when_asked_to(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka, port = kafka_settings(), free_port()
    flags = [
        *("--kafka.bootstrap_servers", kafka.bootstrap_servers),
        *("--kafka.microbatches_topic", kafka.microbatches_topic),
        *("--validation.metrics_port", str(port)),
    ]
    settings = settings_at(tmp_path / "state", *flags)
    bootstrapped(settings)
    log, topic = Log(settings.kafka), settings.kafka.microbatches_topic
    with log.topics() as topics:
        topics.ensure(topic, 1)
    with log.writer("stream") as writer:
        for value in minutes(4):
            with writer.transaction():
                writer.send(topic, 0, None, value)
    changed = ("paths.state", "validation.window_s", "validation.min_rows", "events.context")
    own = [word for name in changed for word in (f"--{name}", str_of(settings.value(name)))]
    process = forked.Popen(
        [sys.executable, "-m", "deploy.validation.process", *own, *flags],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = {"validation": f"http://127.0.0.1:{port}/metrics"}
        end_s = time.monotonic() + DEADLINE_S
        judged = None
        while (judged or 0) < 2 and time.monotonic() < end_s and process.poll() is None:
            found = scrape(address)["validation"]
            judged = found.value("springtide_validation_windows_total", outcome="judged")
            time.sleep(0.05)
        assert judged == 2
        assert found.value("springtide_validation_window_rows") == 400
        assert len(found.values) < 300
        # `springtide status` says it too.
        told = sections.live_clicks(settings)
        assert told is not None and (told["rows"], told["baseline"]) == (400, 0)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, said
    assert sections.live_clicks(settings) is None


def str_of(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
