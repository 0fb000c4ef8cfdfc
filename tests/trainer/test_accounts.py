"""The trainer's account: gaps and bad records stop it until somebody accepts them, and restarts keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from deploy.watch.accounts import as_text
from state.accounts import StreamAccount, TrainerAccount, check_accounts
from state.errors import GapError, MicroBatchError, SaltMismatch, SpecMismatch, SpringtideError
from state.layout import GAPS
from state.log import PartitionBatch
from state.log.accepted_gaps import Accepted, Consent, Journal, parse_allowance, parse_records
from state.metrics import TrainerMetrics
from state.microbatch.codec import decode, encode
from state.positions import MOST_LEARNED, Gap, Source
from tests.memory_log import MemoryLog, MemoryReader
from tests.trainer.clicks import TOPIC, microbatch
from tests.trainer.logs import LOG, TOPIC_ID, account_in, append, bits_of, kill, learner, run_to_end, started, written
from tests.trainer.test_verify import asked, started_with_spec
from trainer import intake
from trainer.intake import Passages
from trainer.learner import Learner

RECORDS = [microbatch(number) for number in range(12)]
LOG_SOURCE = Source(TOPIC_ID, 0)


def ann(*places: str) -> Consent:
    return Consent(tuple(map(parse_allowance, places)), "ann", "it was old")


def made_by_stream(records: Sequence[bytes]) -> StreamAccount:
    """What the stream counts that wrote `records`."""
    headers = [decode(value).header for value in records]
    return StreamAccount(
        positions=sum(part.next - part.first for header in headers for part in header.ranges),
        rows=sum(part.rows for header in headers for part in header.ranges),
    )


def account_of(running: Learner) -> TrainerAccount:
    counted = account_in(running)
    return TrainerAccount(**{name: counted.get(name, 0) for name in intake.NAMES})


def test_a_restart_keeps_the_account_and_it_balances_with_the_streams(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written([*RECORDS[:4], *RECORDS[2:4], *RECORDS[4:6]])
    first = learner(registry, log)
    run_to_end(first)
    first.close()
    append(log, RECORDS[6:])
    again = learner(registry, log)
    assert account_of(again) == account_of(first)
    run_to_end(again)
    again.close()
    account = account_of(again)
    assert (account.rows, account.duplicate) == (14 * 40, 2 * 40)
    assert check_accounts(made_by_stream(RECORDS), account) == ()
    kept = registry.manifest(registry.newest(1) or 0).metrics
    assert kept["account.rows"] == kept["account.trained"] + kept["account.duplicate"] == 560
    assert kept["account.before"] == 0


def test_a_counter_that_misses_a_row_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    account = dict.fromkeys(intake.NAMES, 0) | {"rows": 9, "trained": 8}
    known = intake.show_account(account, metrics)
    assert known
    assert intake.show_account(account, metrics, known) == known
    assert caplog.text.count("does not balance") == 1
    assert registry.get_sample_value("springtide_accounting_trainer_faults") == 1
    assert intake.show_account(account | {"masked": 1}, metrics, known) == ()
    assert registry.get_sample_value("springtide_accounting_rows", {"outcome": "masked"}) == 1


def test_a_record_missing_from_the_log_stops_the_trainer_until_somebody_accepts_it(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written([*RECORDS[:3], *RECORDS[4:6]])
    running = learner(registry, log)
    with pytest.raises(GapError) as caught:
        run_to_end(running)
    said = str(caught.value)
    assert "offset 6: no record before it holds these clicks: partition 0, positions 60 to 79 (20)" in said
    flags = f"--accept-gap {TOPIC[:8]}:0:60-79 --accept-gap {TOPIC[:8]}:1:60-79"
    assert f"springtide train (or up) {flags} --reason TEXT" in said
    assert running.place.next == 5, "the record behind the gap was not taken"
    running.close()
    # Without the topic's id the training log itself is meant, and one partition is not enough.
    with pytest.raises(GapError) as again:
        run_to_end(learner(registry, log, consent=ann(f"{TOPIC[:8]}:0:60-79", "1:60-79")))
    assert [gap.source.partition for gap in again.value.gaps] == [1]
    running = learner(registry, log, consent=ann(f"{TOPIC[:8]}:0:60-79", f"{TOPIC[:8]}:1:0-99"))
    run_to_end(running)
    account = account_of(running)
    assert (account.gap, account.rows) == (40, 200)
    assert check_accounts(made_by_stream(RECORDS[:6]), account) == ()
    running.close()
    kept = Journal(registry.path / GAPS).accepted()
    assert [(one.gap.positions, one.actor, one.reason) for one in kept] == [(20, "ann", "it was old")] * 2
    # A replay of the same part of the log asks nobody again.
    append(log, RECORDS[6:8])
    later = learner(registry, log)
    run_to_end(later)
    assert account_of(later).gap == 40


def test_records_deleted_from_the_log_stop_the_trainer_until_somebody_accepts_them(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(RECORDS[:4])
    running = learner(registry, log)
    run_to_end(running)
    running.close()
    append(log, RECORDS[4:])
    log.topics().delete_before(LOG, {0: 14})
    with pytest.raises(GapError):
        learner(registry, log)
    running = learner(registry, log, consent=ann("0:7-13"))
    assert running.place.next == 14
    run_to_end(running)
    account = account_of(running)
    assert account.gap == 2 * 3 * 20, "three records of twenty clicks of either partition"
    assert check_accounts(made_by_stream(RECORDS), account) == ()
    kill(running)
    # Killed before it published: the same gap again, accepted already, and the same account.
    again = learner(registry, log)
    run_to_end(again)
    assert account_of(again) == account
    again.close()


def test_records_deleted_while_reading_are_a_gap_too(tmp_path: Path) -> None:
    log = written(RECORDS[:4])
    running = learner(started(tmp_path), log, consent=ann("0:0-99"))
    run_to_end(running)
    append(log, RECORDS[4:])
    log.topics().delete_before(LOG, {0: 12})
    run_to_end(running)
    assert (running.place.next, account_of(running).gap) == (24, 2 * 2 * 20)
    running.close()


def test_an_accepted_gap_is_kept_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gaps")
    assert journal.accepted() == []
    one = Accepted(Gap(LOG_SOURCE, 5, 9), "ann", "old", 3, {str(Source(TOPIC, 0)): 7})
    journal.add(one)
    journal.add(replace(one, actor="bob"))
    journal.add(replace(one, gap=Gap(LOG_SOURCE, 20, 21)))
    assert [kept.gap.first for kept in journal.accepted()] == [5, 20]
    assert journal.accepted()[0] == one


def test_a_log_that_ends_too_early_cannot_be_accepted(tmp_path: Path) -> None:
    passages = Passages(Journal(tmp_path), ann("0:0-99"), TrainerMetrics(CollectorRegistry()), lambda: 0.0)
    with pytest.raises(GapError, match="ends at"):
        passages.pass_log(GapError("the log ends at 4"), {})


outcomes = st.fixed_dictionaries({name: st.integers(0, 1000) for name in ("rows", "dead", "filtered", "absent", "gap")})
learned = st.fixed_dictionaries(
    {name: st.integers(0, 1000) for name in ("trained", "skipped", "masked", "duplicate", "in_flight")}
)


@given(outcomes, st.integers(-3, 3))
def test_one_position_too_many_or_too_few_is_found_in_the_stream(counts: dict[str, int], error: int) -> None:
    account = StreamAccount(positions=sum(counts.values()) + error, **counts)
    assert bool(check_accounts(account)) == (error != 0)


@given(learned, st.integers(-3, 3))
def test_one_row_too_many_or_too_few_is_found_in_the_trainer(counts: dict[str, int], error: int) -> None:
    account = TrainerAccount(rows=sum(counts.values()) + error, **counts)
    assert bool(check_accounts(trainer=account)) == (error != 0)


@given(learned, st.integers(-3, 20), st.integers(0, 10))
def test_between_the_two_only_an_accepted_gap_explains_missing_rows(
    counts: dict[str, int], missing: int, gap: int
) -> None:
    rows = sum(counts.values())
    made = rows - counts["duplicate"] + missing
    if made < 0:
        return
    found = check_accounts(StreamAccount(made, made), TrainerAccount(rows, **counts, gap=gap))
    assert bool(found) == (not 0 <= missing <= gap)


@given(st.integers(0, 30), st.integers(0, 3))
def test_with_impressions_a_lost_position_may_have_had_several_rows(missing: int, gap: int) -> None:
    # Two plain rows are left of a log in which a gap held what the waits of five impressions had made known.
    stream = StreamAccount(positions=7, rows=2, opened=5, joined=1, expired=missing)
    found = check_accounts(stream, TrainerAccount(rows=3, trained=3, gap=gap))
    assert bool(found) == (missing > gap * MOST_LEARNED)
    if found:
        assert found[0].endswith(f": {missing - gap * MOST_LEARNED} lost")


TEN_RECORDS = [microbatch(number) for number in range(10)]
# The bad record's offset: each record is followed by the marker of its transaction.
BAD = 12


def ann_for_records(*offsets: str) -> Consent:
    return Consent(actor="ann", reason="a test wrote it", records=tuple(map(parse_records, offsets)))


def with_header(value: bytes, **changes: Any) -> bytes:
    batch = decode(value)
    return encode(replace(batch.header, **changes), batch.columns)


def digest_of(path: Path, records: Sequence[bytes]) -> str:
    running = learner(started(path), written(records))
    run_to_end(running)
    running.close()
    return bits_of(running)


def left_out(running: Learner) -> tuple[float, float]:
    counted = account_in(running)
    assert check_accounts(trainer=TrainerAccount(**{name: counted.get(name, 0) for name in intake.NAMES})) == ()
    return counted.get("left_out", 0), running._metrics.records_left_out._value.get()


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (b"hello", MicroBatchError, "a value of 5 bytes is no micro-batch"),
        (with_header(TEN_RECORDS[6], spec="ee" * 32), SpecMismatch, "has feature spec eeeeeeeeeeee"),
        (with_header(TEN_RECORDS[6], salt="ffff"), SaltMismatch, "has users of salt ffff"),
    ],
    ids=["foreign", "other features", "another salt"],
)
def test_a_stray_record_is_named_left_out_and_changes_nothing(
    tmp_path: Path, value: bytes, error: type[SpringtideError], said: str
) -> None:
    registry, log = started_with_spec(tmp_path / "registry"), written([*TEN_RECORDS[:6], value, *TEN_RECORDS[6:]])
    running = learner(registry, log)
    with pytest.raises(error) as raised:
        run_to_end(running)
    assert said in str(raised.value) and f"offset {BAD}" in raised.value.what
    assert raised.value.do.endswith(
        f"to continue without this record: springtide train (or up) --skip-record {BAD} --reason TEXT"
    )
    # It stands before the record; the consent for another one does not help.
    assert running.place.next == BAD - 1
    running.close()
    with pytest.raises(error):
        run_to_end(learner(registry, log, consent=ann_for_records(str(BAD + 2))))

    running = learner(registry, log, consent=ann_for_records(str(BAD)))
    run_to_end(running)
    running.close()
    assert left_out(running) == (1, 1)
    assert bits_of(running) == digest_of(tmp_path / "clean", TEN_RECORDS)
    (one,) = Journal(registry.path / GAPS).accepted()
    assert (one.gap.first, one.gap.next, one.actor, one.reason) == (BAD, BAD + 1, "ann", "a test wrote it")
    assert said in one.record

    # Nobody has to accept it again: a restart from before it, and a replay.
    newest = registry.newest(1) or 0
    for version in [each for each in registry.versions() if registry.manifest(each).log.next > BAD]:
        registry.remove("delta", version)
    again = learner(registry, log)
    assert again.place.next <= BAD
    run_to_end(again)
    again.close()
    assert left_out(again) == (1, 1)
    assert bits_of(again) == bits_of(running)
    found = asked(registry, log, registry.newest(1) or 0)
    assert newest and found.outcome == "equal", found.text()


def test_a_damaged_record_of_ours_is_left_out_and_its_clicks_are_counted_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MemoryReader.poll

    def damaged(reader: MemoryReader, timeout_s: float, records: int) -> list[PartitionBatch]:
        """As a reader of Kafka tells of a record batch whose checksum is wrong."""
        found = read(reader, timeout_s, records)
        for number, batch in enumerate(found):
            if batch.first <= BAD < batch.next:
                kept = batch.offsets != BAD
                values = [value for value, keep in zip(batch.values, kept, strict=True) if keep]
                corrupt = ((BAD, BAD + 1, "its checksum is wrong"),)
                found[number] = replace(batch, offsets=batch.offsets[kept], values=values, corrupt=corrupt)
        return found

    monkeypatch.setattr(MemoryReader, "poll", damaged)
    registry, log = started_with_spec(tmp_path), written(TEN_RECORDS)
    running = learner(registry, log)
    with pytest.raises(MicroBatchError, match=rf":0 offset {BAD} cannot be read: its checksum is wrong.*--skip-record"):
        run_to_end(running)
    assert running.place.next == BAD - 1, "all before it is learned; a marker lies between"
    running.close()
    running = learner(registry, log, consent=ann_for_records("0-99"))
    run_to_end(running)
    running.close()
    assert left_out(running) == (1, 1)
    # Both partitions' twenty positions of the record are in no other.
    assert account_in(running)["gap"] == 40
    found = asked(registry, log, registry.newest(1) or 0)
    assert found.outcome == "equal", found.text()


def test_consent_for_a_range_leaves_good_records_in(tmp_path: Path) -> None:
    log: MemoryLog = written([*TEN_RECORDS[:6], b"one", *TEN_RECORDS[6:8], b"two"])
    append(log, TEN_RECORDS[8:])
    running = learner(started(tmp_path / "registry"), log, consent=ann_for_records(f"{BAD - 4}-99"))
    run_to_end(running)
    running.close()
    assert left_out(running) == (2, 2)
    assert bits_of(running) == digest_of(tmp_path / "clean", TEN_RECORDS)


def test_status_says_how_many_were_left_out() -> None:
    trainer = dict.fromkeys(("rows", "trained", "skipped", "duplicate", "masked", "in_flight"), 0)
    found = {"trainer": {**trainer, "records_left_out": 2}, "faults": [], "notes": []}
    assert "2 records of the training log left out, as accepted" in as_text(found)
