"""The budget: each period is paid for before it is learned, its end holds training whatever restarts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploy.operate import privacy
from state.errors import RegistryError, SettingsError
from state.features.mask import Mask
from state.log import Log
from state.registry import privacy_ledger
from state.registry.control import roll_back
from state.registry.registry import Registry
from tests.trainer.clicks import microbatch
from tests.trainer.logs import learner, started, written
from tests.trainer.privacy.batches import at, settings, shared
from trainer.learner import Learner
from trainer.versions import checkpoint

RECORDS = [microbatch(number) for number in range(14)]
"""Four in a period: 2.5 minutes of log time each."""


def run(registry: Registry, log: Log, path: Path, *flags: str) -> Learner:
    """A learner at the end of the log, or where the budget ended."""
    made = shared()
    made.clear()
    running = learner(registry, log, *at(path), *flags, trainer=made)
    while not (running.caught_up or running._budget.held):
        running.tick(0.0)
    return running


def gauge(running: Learner, name: str) -> float:
    return float(getattr(running._metrics, f"privacy_{name}")._value.get())


def test_at_its_end_training_holds_also_after_a_restart_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    own = settings(tmp_path / "state")
    registry, log = started(own.registry_dir), written(RECORDS)
    running = run(registry, log, tmp_path / "state")
    ledger = privacy_ledger.read(own.privacy_ledger_path)
    assert ledger is not None and ledger.held
    assert [one.epoch for one in ledger.periods] == [1, 1] and ledger.periods[0].number + 1 == ledger.periods[1].number
    assert ledger.spent == pytest.approx(8.0) and ledger.epsilon == 8.0
    assert (gauge(running, "held"), gauge(running, "epsilon_spent")) == (1.0, ledger.spent)
    where, steps = running.place.next, running._trainer.counters.steps
    assert 4 < steps <= 8 and where <= 2 * steps
    digest = checkpoint.digest(running._trainer)
    running.tick(0.0)
    assert running.place.next == where, "it rests"
    running.close()
    newest = registry.newest(1) or 0
    assert registry.manifest(newest).steps == steps, "what was learned is answered from"

    running = run(registry, log, tmp_path / "state")
    assert (running.place.next, checkpoint.digest(running._trainer)) == (where, digest)
    assert privacy_ledger.read(own.privacy_ledger_path) == ledger
    found = privacy.look(own)
    assert found is not None and found["left"] < 0.05
    assert privacy.as_text(found)[0] == "SPENT"
    running.close()

    larger = ("--privacy.epsilon", "20")
    running = run(registry, log, tmp_path / "state", *larger)
    assert running.caught_up and running._trainer.counters.steps == len(RECORDS)
    after = privacy_ledger.read(own.privacy_ledger_path)
    assert after is not None and not after.held and after.periods[:2] == ledger.periods
    assert ledger.spent < after.spent <= 20.0
    running.close()


def test_a_rollback_tells_its_rows_again_and_spends_for_it(tmp_path: Path) -> None:
    own = settings(tmp_path / "state")
    registry, log = started(own.registry_dir), written(RECORDS[:3])
    running = run(registry, log, tmp_path / "state")
    running.close()
    first = privacy_ledger.read(own.privacy_ledger_path)
    registry.change(lambda one: roll_back(one, 1, Mask.NONE, actor="ann", reason="look", now_ms=5))
    running = run(registry, log, tmp_path / "state")
    again = privacy_ledger.read(own.privacy_ledger_path)
    assert first is not None and again is not None
    assert [one.epoch for one in again.periods][-1] == 2 and again.periods[: len(first.periods)] == first.periods
    assert again.spent > first.spent
    running.close()


def test_a_ledger_that_is_gone_or_of_another_key_or_unit_is_refused(tmp_path: Path) -> None:
    own = settings(tmp_path / "state")
    registry, log = started(own.registry_dir), written(RECORDS[:2])
    run(registry, log, tmp_path / "state").close()
    ledger = privacy_ledger.read(own.privacy_ledger_path)
    assert ledger is not None
    for other, name in (
        (dataclasses.replace(ledger, key="00"), "key_file"),
        (dataclasses.replace(ledger, unit="example"), "unit"),
    ):
        privacy_ledger.write(own.privacy_ledger_path, other)
        with pytest.raises(SettingsError, match=name):
            run(registry, log, tmp_path / "state")
    own.privacy_ledger_path.write_bytes(b"{")
    with pytest.raises(RegistryError, match="cannot be read"):
        run(registry, log, tmp_path / "state")
    own.privacy_ledger_path.unlink()
    with pytest.raises(RegistryError, match="there is no ledger"):
        run(registry, log, tmp_path / "state")
