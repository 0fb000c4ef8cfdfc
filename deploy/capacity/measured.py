"""The measured figures that sizes are computed from, each with the command that gives it.

All were taken on two shared cores (AMD EPYC, 2 of them, 25 GB, Python 3.11) with
the settings' defaults. Processor time depends on the machine more than anything
else here: run the command on yours and give its value, `--measured NAME=VALUE`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from dataclasses import field as declared

from state.errors import SettingsError

SOAK = "python -m tests.e2e.soak"
"""10,000 clicks/s of 20,000 users and 4,000 items; processor time out of /proc/PID/stat over 152 s from its eighth minute on."""


def _figure(value: float, unit: str, bench: str, means: str) -> float:
    made: float = declared(default=value, metadata={"unit": unit, "bench": bench, "means": means})
    return made


@dataclass(frozen=True)
class MeasuredCosts:
    """What one thing takes. The metadata of each field says its unit, the command and what it is."""

    stream_us: float = _figure(33.2, "us a click", SOAK, "processor time of the stream")
    stream_most: float = _figure(
        64_900.0, "clicks/s", "python -m tests.bench.stream", "what one stream does that never waits, with 4 partitions"
    )
    flink_us: float = _figure(
        116.0,
        "us a click",
        "python -m tests.bench.flink",
        "processor time of TaskManager and Python worker on Flink, 3.5 times the local form; 222 at 3,000 clicks/s, 89 at 7,000",
    )
    flink_bytes: float = _figure(
        4.4e8, "bytes", "python -m tests.bench.flink", "memory of a TaskManager with little state"
    )
    flink_worker_bytes: float = _figure(
        6.3e8,
        "bytes",
        "python -m tests.bench.flink",
        "memory of a Python worker on Flink, histories of 20,000 users included",
    )
    trainer_us: float = _figure(
        26.7, "us a row", SOAK, "processor time of the trainer less its publications; one thread does the steps"
    )
    publish_ms: float = _figure(
        7.7,
        "ms a version",
        "python -m tests.bench.publish",
        "how long a publication of 10,000 rows keeps steps waiting",
    )
    applier_us: float = _figure(
        38.9, "us a click", SOAK, "processor time of an applier less its rows: histories, parity, upkeep"
    )
    history_us: float = _figure(
        11.2,
        "us a row",
        "python -m tests.bench.new_host",
        "processor time of a host that reads the training log to catch up",
    )
    apply_us: float = _figure(
        3.4, "us a row", "python -m tests.bench.serving", "processor time to apply a row of a version (10,000 in 34 ms)"
    )
    validation_us: float = _figure(7.0, "us a row", SOAK, "processor time of the validation, Kafka's client included")
    broker_us: float = _figure(7.8, "us a click", SOAK, "processor time of the broker, one copy of each record")
    lean_us: float = _figure(
        100.0, "us an answer", "python -m tests.bench.serving", "processor time of a worker for a profile, lean"
    )
    full_us: float = _figure(219.0, "us an answer", "python -m tests.bench.serving", "the same with all fields")
    recommend_us: float = _figure(
        6_830.0,
        "us an answer",
        "python -m tests.bench.recommend",
        "the same for 20 recommendations out of a million items",
    )
    explain_us: float = _figure(
        12_000.0, "us an answer", "python -m tests.bench.explain", "the same for an explanation"
    )
    log_row_bytes: float = _figure(288.0, "bytes a row", SOAK, "the training log, compressed")
    event_bytes: float = _figure(
        60.0, "bytes an event", SOAK, "an event in a store of histories: 40 bytes, in pages that are two thirds full"
    )
    user_bytes: float = _figure(
        890.0, "bytes a user", "python -m tests.bench.new_host", "what a user takes there beside the events"
    )
    served_row_bytes: float = _figure(
        640.0,
        "bytes a row",
        SOAK,
        "an entry of serving's rows: 128 bytes and a key, in a file whose pages come and go all the time",
    )
    base_row_bytes: float = _figure(
        260.0,
        "bytes a row",
        "python -m tests.bench.publish",
        "a row with its accumulators in a base (2.6 GB at 1e7 rows)",
    )
    durable_row_bytes: float = _figure(208.0, "bytes a row", SOAK, "a changed row in a durable version, packed")
    durable_bytes: float = _figure(
        1.1e6, "bytes a version", SOAK, "dense weights with their slots in a durable version"
    )
    recent_row_bytes: float = _figure(
        136.0, "bytes a row", SOAK, "a changed row in a version that is not durable: id, 32 floats"
    )
    recent_bytes: float = _figure(4.2e5, "bytes a version", SOAK, "dense weights in a version that is not durable")
    stream_bytes: float = _figure(2.5e8, "bytes", SOAK, "memory of a stream less its cache of histories")
    trainer_bytes: float = _figure(5.4e8, "bytes", SOAK, "memory of a trainer with small tables, TensorFlow loaded")
    applier_bytes: float = _figure(2.2e8, "bytes", SOAK, "memory of an applier less its stores")
    worker_bytes: float = _figure(1.05e8, "bytes", SOAK, "memory of a worker less the stores that it shares")
    beside_bytes: float = _figure(1.9e8, "bytes", SOAK, "memory of console and validation together")
    load_bytes_s: float = _figure(
        1.3e8, "bytes/s", "python -m tests.bench.rollback", "a base read, checked and applied (1 M rows in 2.0 s)"
    )
    shared_request_us: float = _figure(
        2_000.0,
        "us a request",
        "python -m tests.bench.share",
        "processor time of a host that asks a shared registry's object store for a file that is not there",
    )
    transaction_ms: float = _figure(
        7.4,
        "ms",
        "python -m tests.bench.log",
        "a transaction of the training log (100 kB, median); one follows another",
    )


def names() -> list[str]:
    """The names of all figures.

    >>> "stream_us" in names()
    True
    """
    return [one.name for one in fields(MeasuredCosts)]


def with_own(figures: MeasuredCosts, written: list[str]) -> MeasuredCosts:
    """The figures with those of another machine in their place.

    Args:
        figures: To begin with.
        written: `NAME=VALUE` each.

    >>> with_own(MeasuredCosts(), ["stream_us=20"]).stream_us
    20.0

    Raises:
        SettingsError: A name is none, or a value no number above 0.
    """
    found: dict[str, float] = {}
    for one in written:
        name, _, text = one.partition("=")
        if name not in names():
            raise SettingsError(f"--measured {one}: there is no figure {name}", f"the figures are {', '.join(names())}")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < float("inf"):
            raise SettingsError(f"--measured {one}: the value must be a number above 0", "write NAME=VALUE")
    return replace(figures, **found)
