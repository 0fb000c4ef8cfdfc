"""Windows per user with quixstreams: reads clicks from Kafka, counts each user's clicks of an hour, writes each count.

    PYTHON -m tests.bench.peers.windows_quixstreams BOOTSTRAP_SERVERS TOPIC EVENTS

PYTHON has quixstreams (`pip install quixstreams`), which is no requirement of
this project; `tests.bench.stream --quixstreams PYTHON` runs it. It does far less than the stream, which computes 128 features and
24 categories for each click, and writes exactly once. The last line is the rate
per second of process CPU between 15 % and 97 % of the events, as in
`tests.bench.stream`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

from quixstreams import Application  # of PYTHON, not of this project


def main(bootstrap_servers: str, topic: str, events: int) -> None:
    """Runs the peer until it has passed `events` clicks."""
    with tempfile.TemporaryDirectory() as state:
        app = Application(
            broker_address=bootstrap_servers,
            consumer_group=f"peer-{time.time_ns()}",
            auto_offset_reset="earliest",
            state_dir=state,
            loglevel="WARNING",
        )
        clicks = app.topic(topic, value_deserializer="json", key_deserializer="str")
        counts = app.topic(f"peer-counts-{time.time_ns()}", value_serializer="json", key_serializer="str")
        passed = 0
        marks: list[tuple[int, float]] = []

        def note(value: Any) -> None:
            nonlocal passed
            passed += 1
            if passed in (int(0.15 * events), int(0.97 * events)):
                marks.append((passed, time.process_time()))
            if passed >= int(0.97 * events):
                app.stop()

        rows = app.dataframe(clicks)
        rows = rows.tumbling_window(timedelta(hours=1), grace_ms=3_600_000).count().current()
        rows = rows.update(note).to_topic(counts)
        app.run()
        (first, first_cpu_s), (last, last_cpu_s) = marks
        print(f"{(last - first) / (last_cpu_s - first_cpu_s):.0f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
