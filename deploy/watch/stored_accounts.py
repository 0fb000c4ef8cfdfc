"""Reads what the account is made of: the stream's stores on this machine, or what it shows, and the end of the training log."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deploy.watch import scrape
from deploy.watch.rows_in_flight import LONGEST_TAIL, InFlight, in_flight
from state import layout
from state.accounts import StreamAccount
from state.config.settings import Settings
from state.errors import MicroBatchError, SpringtideError
from state.history.store import HistoryStore
from state.log import Reader, Topics, accepted_gaps
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, counts, onward
from state.registry.manifest import Manifest

LONGEST_S = 3.0
SETTLE_S = 1.0


class Stores(NamedTuple):
    """What all stores of this machine count.

    Attributes:
        counts: By source.
        accepted: The gaps that were accepted, as JSON values.
        waiting: Rows that wait for their label.
    """

    counts: dict[Source, dict[str, int]]
    accepted: list[dict[str, Any]]
    waiting: int


def read_stores(settings: Settings) -> Stores:
    """What the stores of this machine count.

    Raises:
        SpringtideError: There is none, or one cannot be read.
    """
    counts: dict[Source, dict[str, int]] = {}
    accepted: list[dict[str, Any]] = []
    waiting = 0
    for path in layout.streams(settings.state_dir):
        store = HistoryStore(path, settings.features.history, settings.stream.map_gb << 30, readonly=True)
        try:
            of_store, waits = store.cut()
            counts |= of_store
            waiting += waits
            accepted += [one.to_json() for one in accepted_gaps.decode(store.extra(layout.GAPS))]
        finally:
            store.close()
    if not counts:
        raise SpringtideError(f"no stream has committed anything under {settings.state_dir} yet")
    return Stores(counts, accepted, waiting)


class Shown(NamedTuple):
    """What a stream says of itself on /metrics.

    Attributes:
        account: Over all sources; None where no stream answers, or it has committed nothing.
        waiting: Rows that wait for their label.
        unread: Positions of the clicks that it has still to read.
    """

    account: StreamAccount | None = None
    waiting: int | None = None
    unread: int = 0


def read_shown(settings: Settings) -> Shown:
    """What the stream shows, wherever it runs.

    Raises:
        SettingsError: `metrics.hosts` is not written as it should be.
    """
    stream = scrape.scrape({"stream": scrape.urls(settings)["stream"]})["stream"]
    shown = stream.by("springtide_accounting_labels", "outcome") | stream.by(
        "springtide_accounting_positions", "outcome"
    )
    if not shown.get("positions"):
        return Shown()
    account = StreamAccount(**{one.name: int(shown[one.name]) for one in dataclasses.fields(StreamAccount)})
    return Shown(account, int(shown["waiting"]), int(stream.value("springtide_stream_lag_events") or 0))


def read_tail(settings: Settings, version: Manifest, until: Mapping[Source, int], line: LogLine = WHOLE) -> InFlight:
    """The rows between the version's place in the log and the stream's, along a line of the log.

    Raises:
        LogError: The log cannot be read from there.
    """
    kafka = quick(settings)
    partition, place = version.log.partition, onward(line, version.log.next)
    with Topics(kafka) as topics:
        _, end = topics.ends(version.log.topic)[partition]
    if end - place > LONGEST_TAIL:
        return InFlight(0, 0, version.marks, complete=False)
    if end <= place:
        return InFlight(0, 0, version.marks)
    batches: list[MicroBatch] = []
    deadline_s = time.monotonic() + LONGEST_S
    with Reader(kafka, version.log.topic, [partition], {partition: place}) as reader:
        while reader.position(partition) < end:
            if time.monotonic() > deadline_s:
                return InFlight(0, 0, version.marks, complete=False)
            for batch in reader.poll(0.1):
                for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                    # The trainer stops at what is no micro-batch, or leaves it out.
                    with contextlib.suppress(MicroBatchError):
                        found = decode(value or b"")
                        batches += [found] if counts(line, found.header.log_epoch, offset) else []
    return in_flight(batches, version.marks, until)


def quick(settings: Settings) -> Any:
    """The Kafka settings with a short patience."""
    return dataclasses.replace(settings.kafka, request_timeout_s=min(LONGEST_S, settings.kafka.request_timeout_s))


def settled(
    settings: Settings, version: Manifest, read: Callable[[Settings], Stores] = read_stores, wait_s: float = SETTLE_S
) -> Stores:
    """The stores, once they have what the version has, or after a moment."""
    deadline_s = time.monotonic() + wait_s
    while True:
        stores = read(settings)
        counts = stores.counts
        ahead = any(mark > counts[source]["next"] for source, mark in version.marks.items() if source in counts)
        if not ahead or time.monotonic() >= deadline_s:
            return stores
