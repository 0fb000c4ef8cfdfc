"""The trainer's account: lost and doubled rows are found, gaps stop it until somebody accepts them, restarts keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from state.accounts import StreamAccount, TrainerAccount, check_accounts
from state.errors import GapError
from state.layout import GAPS
from state.log.accepted_gaps import Accepted, Consent, Journal, parse_allowance
from state.metrics import TrainerMetrics
from state.microbatch.codec import decode
from state.positions import MOST_LEARNED, Gap, Source
from tests.trainer.clicks import TOPIC, microbatch
from tests.trainer.logs import LOG, TOPIC_ID, account_in, append, kill, learner, run_to_end, started, written
from trainer import accounts
from trainer.accounts import Passages
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
    return TrainerAccount(**{name: counted.get(name, 0) for name in accounts.NAMES})


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
    account = dict.fromkeys(accounts.NAMES, 0) | {"rows": 9, "trained": 8}
    known = accounts.show(account, metrics)
    assert known
    assert accounts.show(account, metrics, known) == known
    assert caplog.text.count("does not balance") == 1
    assert registry.get_sample_value("springtide_accounting_trainer_faults") == 1
    assert accounts.show(account | {"masked": 1}, metrics, known) == ()
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
