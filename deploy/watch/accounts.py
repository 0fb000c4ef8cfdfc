"""Reads one consistent account of all rows, for `springtide status`: broker, stream, training log and trainer.

The order of reading makes the account exact while everything runs:

1. The newest version: the outcomes of the trainer's rows, and the next offset of each source.
2. The stream's store: the outcomes of the positions it has committed.
3. The training log from the version's position on: the rows in flight, up to the store's position.
4. The broker's first and last offsets.

A row is in the log before the store counts it, and in the store soon after. So if the version is ahead of the store,
the store is read again.

If the stream runs on a distributed runner, its stores are on other machines. Its account is then what it reports on
/metrics, up to a second old, and is not compared with the trainer's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deploy.formats import shown
from deploy.watch import scrape
from state import layout
from state.accounts import BrokerAccount, StreamAccount, TrainerAccount, check_accounts
from state.config.settings import Settings
from state.errors import SpringtideError
from state.history.branch_records import branch_records
from state.history.store import HistoryStore
from state.log import Reader, Topics, accepted_gaps
from state.microbatch.batch import MicroBatch, trained, trim
from state.microbatch.codec import decode_events
from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, onward
from state.registry.manifest import Manifest
from state.registry.registry import Registry

LONGEST_TAIL = 20_000

Counts = Mapping[Source, Mapping[str, int]]
LONGEST_S = 3.0
SETTLE_S = 1.0
OUTCOMES = ("rows", "dead", "filtered", "absent", "gap")
RARE = ("opened", "feedback", "masked")
AS_SHOWN = "no stream has a store here: its account comes from /metrics and is not compared with the trainer's"


@dataclass(frozen=True)
class InFlight:
    """Rows between the trainer's position and the stream's, counted separately.

    Attributes:
        duplicate: Rows written again by a stream that crashed; `rows` are new.
        marks: The next offset of each source afterwards.
        complete: Whether the log was read to its end.
    """

    rows: int
    duplicate: int
    marks: dict[Source, int]
    complete: bool = True


def in_flight(batches: Iterable[MicroBatch], marks: Mapping[Source, int], until: Mapping[Source, int]) -> InFlight:
    """Counts the rows of `batches` from `marks` up to, but not including, `until`."""
    rows = duplicate = 0
    at = dict(marks)
    for batch in batches:
        fresh, after = trim(batch, at)
        ends = np.array([until.get(part.source, 0) for part in batch.header.ranges] or [0], np.int64)
        is_counted = trained(batch.kind) & (batch.offset < ends[batch.source])
        rows += int((fresh & is_counted).sum())
        duplicate += int((~fresh & is_counted).sum())
        at = after
    return InFlight(rows, duplicate, at)


def stream_account(counts: Counts) -> StreamAccount:
    """Returns the account over all sources.

    >>> one = {"first": 0, "next": 3, "rows": 2, "dead": 1, "filtered": 0, "absent": 0}
    >>> stream_account({Source("ab" * 16, 0): one, Source("ab" * 16, 1): one}).rows
    4
    """
    parts = [StreamAccount.of(source) for source in counts.values()]
    return StreamAccount(
        *(sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(StreamAccount))
    )


def _trainer_account(version: Manifest, flying: InFlight) -> TrainerAccount:
    rows_by_outcome = {
        name: int(version.metrics.get(f"account.{name}", 0))
        for name in ("rows", "trained", "skipped", "duplicate", "masked", "gap", "other_features")
    }
    return TrainerAccount(
        rows=rows_by_outcome["rows"] + flying.rows + flying.duplicate,
        trained=rows_by_outcome["trained"],
        skipped=rows_by_outcome["skipped"],
        duplicate=rows_by_outcome["duplicate"] + flying.duplicate,
        in_flight=flying.rows,
        masked=rows_by_outcome["masked"],
        gap=rows_by_outcome["gap"],
        other_features=rows_by_outcome["other_features"],
    )


def comparable(counts: Counts, version: Manifest, flying: InFlight) -> str:
    """Returns why the rows of stream and trainer cannot be compared; empty if they can."""
    if not flying.complete:
        return f"the trainer is more than {LONGEST_TAIL:,} positions behind: rows in flight are not counted"
    ahead = sum(max(0, mark - counts[source]["next"]) for source, mark in version.marks.items() if source in counts)
    if ahead:
        return f"the trainer has {ahead:,} positions that the stream has still to commit"
    if unknown := [str(source) for source in version.marks if source not in counts]:
        return f"the trainer has sources that no store here counts: {', '.join(unknown)}"
    began = sum(outcomes["first"] for source, outcomes in counts.items() if source in flying.marks)
    if "account.before" not in version.metrics:
        return "the version is of a release that did not record where its branch began"
    if flying.marks.keys() == version.marks.keys() and int(version.metrics["account.before"]) != began:
        return "the trainer's branch and the stream's store begin at different positions: the log was truncated, or the store is new"
    return ""


class Stores(NamedTuple):
    """What all stores of this machine count: by source, accepted gaps as JSON values, and rows that wait for their label."""

    counts: dict[Source, dict[str, int]]
    accepted: list[dict[str, Any]]
    waiting: int


def _read_stores(settings: Settings) -> Stores:
    counts: dict[Source, dict[str, int]] = {}
    accepted: list[dict[str, Any]] = []
    waiting = 0
    for path in layout.streams(settings.state_dir):
        store = HistoryStore(path, settings.features.history, readonly=True)
        try:
            of_store, waits = store.cut()
            counts |= of_store
            waiting += waits
            accepted += [gap.to_json() for gap in accepted_gaps.decode(store.extra(layout.GAPS))]
        finally:
            store.close()
    if not counts:
        raise SpringtideError(f"no stream has committed anything under {settings.state_dir} yet")
    return Stores(counts, accepted, waiting)


class Shown(NamedTuple):
    """The account that a stream reports on /metrics; None if no stream answers, or it has committed nothing.

    Attributes:
        waiting: Rows that wait for their label.
        unread: Positions of the clicks that it has not read yet.
    """

    account: StreamAccount | None = None
    waiting: int | None = None
    unread: int = 0


def _read_shown(settings: Settings) -> Shown:
    stream = scrape.scrape_one(settings, "stream")
    shown = stream.by("springtide_accounting_labels", "outcome") | stream.by(
        "springtide_accounting_positions", "outcome"
    )
    if not shown.get("positions"):
        return Shown()
    account = StreamAccount(**{outcome.name: int(shown[outcome.name]) for outcome in dataclasses.fields(StreamAccount)})
    return Shown(account, int(shown["waiting"]), int(stream.value("springtide_stream_lag_events") or 0))


def _read_tail(settings: Settings, version: Manifest, until: Mapping[Source, int], line: LogLine) -> InFlight:
    kafka = settings.kafka.within(LONGEST_S)
    partition, offset = version.log.partition, onward(line, version.log.next)
    with Topics(kafka) as topics:
        _, end = topics.ends(version.log.topic, committed_only=True)[partition]
    if end - offset > LONGEST_TAIL:
        return InFlight(0, 0, version.marks, complete=False)
    if end <= offset:
        return InFlight(0, 0, version.marks)
    batches: list[MicroBatch] = []
    deadline_s = time.monotonic() + LONGEST_S
    with Reader(kafka, version.log.topic, [partition], {partition: offset}) as reader:
        # The trainer stops at a record that is no micro-batch, or leaves it out.
        for _, batch in branch_records(reader, offset, end, line, decode_events, LONGEST_S):
            if time.monotonic() > deadline_s:
                return InFlight(0, 0, version.marks, complete=False)
            batches.append(batch)
    return in_flight(batches, version.marks, until)


def _settled(settings: Settings, version: Manifest) -> Stores:
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        stores = _read_stores(settings)
        counts = stores.counts
        ahead = any(mark > counts[source]["next"] for source, mark in version.marks.items() if source in counts)
        if not ahead or time.monotonic() >= deadline_s:
            return stores


def account(settings: Settings) -> dict[str, Any]:
    """Returns the whole account as JSON values; a part that cannot be read has a reason, and the rest is still checked."""
    document: dict[str, Any] = {"answers": True, "problem": "", "notes": [], "faults": []}
    (version, line), counts, waiting, unread = _newest(settings, document), None, None, 0
    stream: StreamAccount | None = None
    # 2.
    try:
        stores = _read_stores(settings) if version is None else _settled(settings, version)
        counts, document["gaps_accepted"], waiting = stores
        stream = stream_account(counts)
    except SpringtideError as error:
        stream, waiting, unread = _read_shown(settings)
        document["notes"].append(str(error) if stream is None else AS_SHOWN)
    # 3.
    trainer = compared = None
    if version is not None:
        flying = InFlight(0, 0, version.marks, complete=False)
        try:
            if counts is not None:
                until = {source: outcomes["next"] for source, outcomes in counts.items()}
                flying = _read_tail(settings, version, until, line)
        except SpringtideError as error:
            document["notes"].append(f"rows in flight are not counted: {error}")
        trainer = _trainer_account(version, flying)
        why = "" if counts is None else comparable(counts, version, flying)
        compared = trainer if counts is not None and not why else None
        if why:
            document["notes"].append(why)
        document["trainer"] = {
            **dataclasses.asdict(trainer),
            "version": version.version,
            "records_left_out": int(version.metrics.get("account.left_out", 0)),
            "in_flight_counted": flying.complete,
        }
    # 4.
    broker = _broker(settings, counts or {}, document)
    document["faults"] += [
        fault for source in (counts or {}).values() for fault in check_accounts(StreamAccount.of(source))
    ]
    checked = check_accounts(stream, compared, broker, waiting)
    document["faults"] += [fault for fault in checked if fault not in document["faults"]]
    if trainer is not None and compared is None:
        document["faults"] += check_accounts(trainer=trainer)
    if stream is not None:
        unread = sum(source.unread for source in broker) if counts else unread
        document["stream"] = {**dataclasses.asdict(stream), "waiting": waiting, "unread": unread}
    document["balanced"] = None if stream is None and trainer is None else not document["faults"]
    document["compared"] = compared is not None
    return document


def _newest(settings: Settings, document: dict[str, Any]) -> tuple[Manifest | None, LogLine]:
    # 1.
    try:
        if not (settings.registry_dir / "versions").is_dir():
            raise SpringtideError(f"no registry at {settings.registry_dir}")
        registry = Registry(settings.registry_dir)
        control = registry.control()
        line = WHOLE if control is None else control.log
        return None if control is None else registry.latest(control.epoch), line
    except (SpringtideError, OSError) as error:
        document["notes"].append(str(error))
        return None, WHOLE


def _broker(settings: Settings, counts: Counts, document: dict[str, Any]) -> list[BrokerAccount]:
    if not counts:
        return []
    try:
        with Topics(settings.kafka.within(LONGEST_S)) as topics:
            topic_id = topics.describe(settings.kafka.clicks_topic).topic_id
            ends = topics.ends(settings.kafka.clicks_topic)
    except SpringtideError as error:
        document["notes"].append(f"the broker's offsets are not known: {error}")
        return []
    return [
        BrokerAccount(source, outcomes["next"], *ends[source.partition])
        for source, outcomes in sorted(counts.items())
        if source.topic_id == topic_id and source.partition in ends
    ]


def as_text(document: Mapping[str, Any]) -> str:
    """Formats the account in one line.

    >>> as_text({"balanced": None, "notes": ["no registry"], "faults": []})
    'no registry'
    """
    parts = []
    if stream := document.get("stream"):
        named = [*OUTCOMES, *(name for name in RARE if stream[name])]
        outcomes = " + ".join(f"{shown(stream[name])} {name}" for name in named)
        parts.append(f"{shown(stream['positions'])} positions = {outcomes}, {shown(stream['unread'])} unread")
        if stream["opened"]:
            fates = " + ".join(f"{shown(stream[name])} {name}" for name in ("joined", "expired", "dropped", "waiting"))
            parts.append(f"{shown(stream['opened'])} opened = {fates}")
    if trainer := document.get("trainer"):
        named = [
            "trained",
            "skipped",
            "duplicate",
            "masked",
            *(["other_features"] if trainer.get("other_features") else []),
        ]
        outcomes = " + ".join(f"{shown(trainer[name])} {name.replace('_', ' ')}" for name in (*named, "in_flight"))
        parts.append(f"{shown(trainer['rows'])} rows = {outcomes}")
        if trainer.get("records_left_out"):
            parts.append(f"{shown(trainer['records_left_out'])} records of the training log left out, as accepted")
    return "; ".join([*parts, *document["faults"], *document["notes"]])
