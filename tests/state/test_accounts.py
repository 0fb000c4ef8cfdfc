"""Accounts: those of one cut balance, or each fault is named."""

from __future__ import annotations

from state.accounts import BrokerAccount, StreamAccount, TrainerAccount, check_accounts
from state.positions import Source


def test_the_trainers_account_must_balance_too() -> None:
    assert check_accounts(trainer=TrainerAccount(rows=5, trained=2, skipped=1, duplicate=1, in_flight=1)) == ()
    (finding,) = check_accounts(trainer=TrainerAccount(rows=5, trained=2))
    assert finding.startswith("trainer: 5 rows")


def test_faults_come_in_the_order_of_the_data() -> None:
    stream = StreamAccount(positions=9, rows=8, opened=2)
    trainer = TrainerAccount(rows=7, trained=6)
    broker = [BrokerAccount(Source("ab" * 16, 0), next=5, begin=6, end=9)]
    found = check_accounts(stream, trainer, broker, waiting=1)
    assert [one.partition(":")[0] for one in found] == ["stream", "trainer", "log", f"clicks {'ab' * 16}", "labels"]
