"""The account of one cut: broker, stream, log and trainer agree, or it is said in what they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.sections import account_text
from deploy.watch import accounts
from deploy.watch import accounts as rows_in_flight
from deploy.watch import accounts as stored_accounts
from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import Topics, Writer, accepted_gaps
from state.log.accepted_gaps import Accepted
from state.microbatch.batch import Header, MicroBatch
from state.microbatch.codec import encode
from state.positions import Gap, Range, Source
from state.registry import control
from state.registry.manifest import Draft, LogRange, Manifest
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.deploy.test_status import settings_of
from tests.microbatches import columns

CLICKS = Source("ab" * 16, 0)
COUNTS = {"first": 0, "next": 30, "rows": 28, "dead": 1, "filtered": 0, "absent": 1}


def batch(source: Source, first: int, rows: int, dead: int = 0) -> MicroBatch:
    """A micro-batch of `rows` rows and `dead` dead offsets behind them."""
    offset = np.arange(first, first + rows, dtype=np.int64)
    part = Range(source, first, first + rows + dead, rows=rows, dead=dead)
    made = columns(rows, user=offset, item=offset, category=offset, at_ms=offset, offset=offset)
    return MicroBatch(Header("spec", "salt", (part,), 0), **made)


def draft(log: LogRange, marks: dict[Source, int], **account: int) -> Draft:
    counted = {"rows": 0, "trained": 0, "skipped": 0, "duplicate": 0, "masked": 0, "gap": 0, "before": 0} | account
    return Draft(
        kind="base",
        epoch=1,
        parent=None,
        log=log,
        sources=tuple(marks.items()),
        steps=1,
        rows=counted["trained"],
        created_at_ms=0,
        event_time_ms=0,
        spec="spec",
        program="program",
        salt="salt",
        metrics={f"account.{name}": float(value) for name, value in counted.items()},
    )


def version_of(path: Path, made: Draft) -> Manifest:
    registry = Registry(path)
    if registry.control() is None:
        registry.propose(control.start(actor="trainer", reason="first start", now_ms=0))
    return registry.publish(made, {"serving.safetensors": b""})


def test_rows_in_flight_are_counted_up_to_where_the_stream_is() -> None:
    written = [batch(CLICKS, 10, 5), batch(CLICKS, 10, 5), batch(CLICKS, 15, 5, dead=2)]
    flying = rows_in_flight.in_flight(written, {CLICKS: 12}, {CLICKS: 18})
    assert (flying.rows, flying.duplicate) == (3 + 3, 2 + 5)
    assert flying.marks == {CLICKS: 22}
    assert rows_in_flight.in_flight(written, {}, {}).rows == 0


def test_a_cut_in_which_the_trainer_is_ahead_or_began_elsewhere_is_not_compared(tmp_path: Path) -> None:
    flying = rows_in_flight.InFlight(0, 0, {CLICKS: 30})
    version = version_of(tmp_path, draft(LogRange(), {CLICKS: 30}))
    assert rows_in_flight.comparable({CLICKS: COUNTS}, version, flying) == ""
    assert "still to commit" in rows_in_flight.comparable({CLICKS: COUNTS | {"next": 20}}, version, flying)
    assert "begin at different positions" in rows_in_flight.comparable({CLICKS: COUNTS | {"first": 3}}, version, flying)
    assert "no store here" in rows_in_flight.comparable({}, version, flying)
    assert "not counted" in rows_in_flight.comparable(
        {CLICKS: COUNTS}, version, rows_in_flight.InFlight(0, 0, {}, False)
    )


@pytest.fixture
def loop(
    kafka_settings: KafkaFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Settings, Kafka, Source]:
    """Twenty clicks in a topic, taken up by a store, written as two micro-batches; the trainer has the first one."""
    monkeypatch.setattr(stored_accounts, "LONGEST_S", 60.0)
    kafka = kafka_settings()
    settings = settings_of(tmp_path, kafka)
    settings = load([*_flags(settings), "--kafka.request_timeout_s", "60"], env={})
    with Topics(kafka) as topics, Writer(kafka) as writer:
        source = Source(topics.ensure(kafka.clicks_topic, 1).topic_id, 0)
        log_id = topics.ensure(kafka.microbatches_topic, 1).topic_id
        for _ in range(25):
            writer.send(kafka.clicks_topic, 0, None, b"{}")
        for one in (batch(source, 0, 8, dead=2), batch(source, 10, 10)):
            writer.send(kafka.microbatches_topic, 0, None, encode(one.header, one.columns))
        writer.flush()
    store = HistoryStore(settings.stream_dir / "histories", map_bytes=1 << 30)
    store.commit(Appends.none(), [Range(source, 0, 20, rows=18, dead=2)])
    store.close()
    log = LogRange(kafka.microbatches_topic, log_id, 0, 0, 1)
    version_of(settings.registry_dir, draft(log, {source: 10}, rows=8, trained=8))
    return settings, kafka, source


def _flags(settings: Settings) -> list[str]:
    return [word for name in settings.origins for word in (f"--{name}", str(settings.value(name)))]


def test_a_cut_through_the_whole_loop_balances(loop: tuple[Settings, Kafka, Source]) -> None:
    settings, _, _ = loop
    found = accounts.account(settings)
    assert (found["balanced"], found["compared"], found["faults"], found["notes"]) == (True, True, [], [])
    assert (found["trainer"]["in_flight"], found["trainer"]["rows"], found["stream"]["unread"]) == (10, 18, 5)
    assert accounts.as_text(found) == (
        "20 positions = 18 rows + 2 dead + 0 filtered + 0 absent + 0 gap, 5 unread; "
        "18 rows = 8 trained + 0 skipped + 0 duplicate + 0 masked + 10 in flight"
    )
    assert account_text(found)[0] == "balances"
    json.dumps(found)


def test_a_lost_row_a_doubled_row_and_a_lost_record_are_faults(loop: tuple[Settings, Kafka, Source]) -> None:
    settings, kafka, source = loop
    log = Registry(settings.registry_dir).manifest(1).log
    # The trainer lost one row of the first record.
    version_of(settings.registry_dir, draft(log, {source: 10}, rows=7, trained=7))
    assert accounts.account(settings)["faults"] == [
        "log: the stream made 18 rows, but the log holds 17 without duplicates: 1 lost"
    ]
    # It learned one twice.
    version_of(settings.registry_dir, draft(log, {source: 10}, rows=9, trained=9))
    (fault,) = accounts.account(settings)["faults"]
    assert fault.endswith("1 came twice")
    # It counted one that has no outcome.
    version_of(settings.registry_dir, draft(log, {source: 10}, rows=8, trained=7))
    (fault,) = accounts.account(settings)["faults"]
    assert fault.startswith("trainer: 18 rows, but 7 trained")
    # Retention passed the stream.
    version_of(settings.registry_dir, draft(log, {source: 10}, rows=8, trained=8))
    with Topics(kafka) as topics:
        topics.delete_before(kafka.clicks_topic, {0: 23})
    found = accounts.account(settings)
    assert found["faults"] == [
        f"clicks {source}: the stream is at 20 and the broker begins at 23: 3 positions were deleted unread"
    ]
    assert account_text(found)[0] == "WRONG"


def test_an_accepted_gap_is_listed_and_balances(loop: tuple[Settings, Kafka, Source]) -> None:
    settings, kafka, source = loop
    with Topics(kafka) as topics:
        topics.delete_before(kafka.clicks_topic, {0: 23})
    store = HistoryStore(settings.stream_dir / "histories", map_bytes=1 << 30)
    one = Accepted(Gap(source, 20, 23), "ann", "old", 5)
    store.commit(Appends.none(), [Range(source, 20, 23, gap=3)], {"gaps": accepted_gaps.encode([one])})
    store.close()
    found = accounts.account(settings)
    assert (found["balanced"], found["compared"], found["stream"]["gap"]) == (True, True, 3)
    assert found["gaps_accepted"][0]["actor"] == "ann"


def test_without_anything_it_says_what_is_missing(tmp_path: Path) -> None:
    found = accounts.account(settings_of(tmp_path / "none"))
    assert found["balanced"] is None
    assert "no registry" in accounts.as_text(found)
    assert "no stream has committed anything" in accounts.as_text(found)
    assert not (tmp_path / "none").exists()
