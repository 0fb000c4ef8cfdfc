"""The budget: each period is paid for before it is learned, its end holds training whatever restarts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from deploy import sections
from state.errors import RegistryError, SettingsError
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.log import Log
from state.microbatch.codec import decode, encode
from state.registry import privacy_ledger
from state.registry.control import Decision, erase, roll_back
from state.registry.directory import Directory
from state.registry.privacy_ledger import PrivacyLedger
from state.registry.registry import Registry
from tests.trainer.clicks import microbatch
from tests.trainer.logs import LOG, append, bits_of, kill, learner, started, trainer_of, with_weight, written
from tests.trainer.privacy.batches import CONTEXT, at, settings, shared
from trainer.learner import Learner


def with_context(number: int) -> bytes:
    """Record `number` with a column of context, so that the trainer of the other tests, which is traced, learns it."""
    batch = decode(microbatch(number))
    return encode(batch.header, batch.columns | {"context": np.zeros((len(batch), len(CONTEXT) // 2), np.uint64)})


RECORDS = [with_context(number) for number in range(14)]
"""Four in a period: 2.5 minutes of log time each."""


def run(registry: Registry, log: Log, path: Path, *flags: str) -> Learner:
    """A learner at the end of the log, or where the budget ended."""
    made = shared(*CONTEXT)
    made.clear()
    running = learner(registry, log, *at(path), *CONTEXT, *flags, trainer=made)
    while not (running.caught_up or running._budget.held):
        running.tick(0.0)
    return running


def gauge(running: Learner, name: str) -> float:
    return float(getattr(running._metrics, f"privacy_{name}")._value.get())


def test_a_spent_budget_holds_training_also_after_a_restart_until_it_is_raised(tmp_path: Path) -> None:
    own = settings(tmp_path / "state")
    registry, log = started(own.registry_dir), written(RECORDS)
    running = run(registry, log, tmp_path / "state")
    ledger = privacy_ledger.read(own.privacy_ledger_path)
    assert ledger is not None and ledger.held
    assert [one.epoch for one in ledger.periods] == [1, 1] and ledger.periods[0].number + 1 == ledger.periods[1].number
    assert ledger.spent == pytest.approx(8.0) and ledger.epsilon == 8.0
    assert (gauge(running, "held"), gauge(running, "epsilon_spent")) == (1.0, ledger.spent)
    where, steps = running.place.next, trainer_of(running).counters.steps
    assert 4 < steps <= 8 and where <= 2 * steps
    digest = bits_of(running)
    running.tick(0.0)
    assert running.place.next == where, "it rests"
    running.close()
    newest = registry.newest(1) or 0
    assert registry.manifest(newest).steps == steps, "what was learned is answered from"

    running = run(registry, log, tmp_path / "state")
    assert (running.place.next, bits_of(running)) == (where, digest)
    assert privacy_ledger.read(own.privacy_ledger_path) == ledger
    found = sections.privacy_budget(own)
    assert found is not None and found["left"] < 0.05
    assert sections.privacy_text(found)[0] == "SPENT"
    running.close()

    larger = ("--privacy.epsilon", "20")
    running = run(registry, log, tmp_path / "state", *larger)
    assert running.caught_up and trainer_of(running).counters.steps == len(RECORDS)
    after = privacy_ledger.read(own.privacy_ledger_path)
    assert after is not None and not after.held and after.periods[:2] == ledger.periods
    assert ledger.spent < after.spent <= 20.0
    running.close()


def test_a_rollback_releases_its_rows_again_and_is_charged_for_them(tmp_path: Path) -> None:
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
        (msgspec.structs.replace(ledger, key="00"), "the key of the noise"),
        (msgspec.structs.replace(ledger, unit="example"), "unit"),
    ):
        privacy_ledger.write(Directory(own.registry_dir), own.privacy_ledger_path, other)
        with pytest.raises(SettingsError, match=name):
            run(registry, log, tmp_path / "state")
    own.privacy_ledger_path.write_bytes(b"{")
    with pytest.raises(RegistryError, match="cannot be read"):
        run(registry, log, tmp_path / "state")
    own.privacy_ledger_path.unlink()
    with pytest.raises(RegistryError, match="there is no ledger"):
        run(registry, log, tmp_path / "state")


FIRST_ONLY = ("--trainer.publish_s", "3600", "--privacy.epsilon", "60")
"""Nothing but the first version is published, and there is budget enough to charge periods again."""


def crashed(registry: Registry, log: Log, path: Path, *flags: str) -> tuple[PrivacyLedger, dict[str, np.ndarray], int]:
    """The ledger, the weights and the steps of a learner that ends without its last version; the next one begins at the first."""
    running = run(registry, log, path, *FIRST_ONLY, *flags)
    weights, steps = trainer_of(running).model.weights(), trainer_of(running).counters.steps
    kill(running)
    ledger = privacy_ledger.read(path / "registry" / "privacy" / "ledger.json")
    assert ledger is not None and registry.newest(1) == 1
    return ledger, weights, steps


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return any((value != other[name]).any() for name, value in one.items())


def test_records_that_are_learned_again_with_other_settings_get_other_noise_and_are_charged_again(
    tmp_path: Path,
) -> None:
    path, flags = tmp_path / "state", ("--trainer.max_rows", "5000")
    registry, log = started(settings(path).registry_dir), written(RECORDS[:6])
    first, weights, _ = crashed(registry, log, path)
    same, again, _ = crashed(registry, log, path)
    assert same == first and not differ(weights, again), "a plain restart repeats everything and costs nothing"
    # Of these settings the trainer, which is made once, sees nothing: what differs is the noise.
    other, changed, _ = crashed(registry, log, path, *flags)
    assert other.periods[: len(first.periods)] == first.periods
    assert [one.number for one in other.periods[len(first.periods) :]] == [one.number for one in first.periods]
    assert other.spent > first.spent and differ(weights, changed)
    assert crashed(registry, log, path, *flags)[0] == other, "once"


def test_a_log_that_was_cut_back_behind_the_last_version_is_charged_again_from_there_on(tmp_path: Path) -> None:
    path = tmp_path / "state"
    registry, log = started(settings(path).registry_dir), written(RECORDS[:6])
    first, weights, steps = crashed(registry, log, path)
    log.cut_back(LOG, {0: 8})
    # The same number of records at the same offsets, but others.
    append(log, [with_weight(record, 3.0) for record in RECORDS[4:6]])
    second, other, again = crashed(registry, log, path)
    assert steps == again and differ(weights, other)
    charged = second.periods[len(first.periods) :]
    assert second.periods[: len(first.periods)] == first.periods and second.spent > first.spent
    assert [one.number for one in charged] == [first.periods[-1].number]
    assert crashed(registry, log, path)[0] == second


def test_an_erasure_costs_nothing_unless_records_before_it_are_learned_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    registry, log = started(settings(path).registry_dir), written(RECORDS[:2])
    running = run(registry, log, path, *FIRST_ONLY)
    before = privacy_ledger.read(settings(path).privacy_ledger_path)
    who: Decision = {"actor": "ann", "reason": "asked to", "now_ms": 5}
    registry.change(lambda control: erase(control, MaskedUsers.of([3]), [(1, 0, 1)], **who))
    append(log, RECORDS[2:3])
    running.caught_up = False
    while not (running.caught_up and running.place.erased):
        running.tick(0.0)
    after = privacy_ledger.read(settings(path).privacy_ledger_path)
    assert before is not None and after is not None and after.spent == before.spent
    assert [len(one.lines) for one in after.periods] == [len(one.lines) for one in before.periods[:-1]] + [2]
    kill(running)
    # Now the users are erased before the first record.
    again, _, _ = crashed(registry, log, path)
    assert len(again.periods) == 2 * len(after.periods) and again.spent > after.spent


@pytest.mark.parametrize(
    "document", [b'{"key": "1f", "unit": "user", "format": 3}', b'{"key": "1f", "unit": "user", "x": 1}']
)
def test_a_ledger_with_what_this_release_does_not_know_is_refused(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "ledger.json").write_bytes(document)
    with pytest.raises(RegistryError, match="cannot be read"):
        privacy_ledger.read(tmp_path / "ledger.json")
