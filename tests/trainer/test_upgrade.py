"""An upgrade goes on from what was learned, in a new epoch; what cannot be learned any more is passed over and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from state.accounts import TrainerAccount, check_accounts
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, ModelMismatch, RegistryError, SaltMismatch, SpecMismatch, UnknownVersion
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.registry.control import roll_back
from state.registry.model_fit import former_specs, require_same_model
from state.registry.registry import Registry
from tests.kills import killed_at
from tests.memory_log import MemoryLog
from tests.trainer.clicks import SPEC, microbatch, small_settings
from tests.trainer.logs import ABOUT, account_in, append, learner, run_to_end, settle, started, write_transform, written
from trainer import upgrade
from trainer.engine.step import Trainer
from trainer.learner import Learner
from trainer.loop import upgrade_to_this_release
from trainer.verify import verify
from trainer.versions import checkpoint

WINDOWS = ("--features.windows_s", "1800,604800")
HIDDEN = ("--model.hidden", "24,8")
OTHER = FeatureSpec.from_settings(small_settings(*WINDOWS))
RECORDS = [microbatch(number) for number in range(12)]


@pytest.fixture(scope="module")
def trainers() -> dict[str, Trainer]:
    """Traced once: as it was, with a wider layer, with other windows."""
    return {
        "old": Trainer(small_settings(), SPEC),
        "hidden": Trainer(small_settings(*HIDDEN), SPEC),
        "windows": Trainer(small_settings(*WINDOWS), OTHER),
    }


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = started(tmp_path / "registry")
    found.specs.add_spec(SPEC.digest, {**ABOUT, "spec": SPEC.to_json()}, write_transform)
    return found


def settings(registry: Registry, *flags: str) -> Settings:
    return small_settings("--paths.state", str(registry.path.parent), *flags)


def decided(registry: Registry, *flags: str, from_scratch: bool = False) -> list[str]:
    said: list[str] = []
    assert upgrade.run(settings(registry, *flags), False, from_scratch, "wider", said.append, 7) is not None
    return said


def learned(registry: Registry, log: MemoryLog, trainer: Trainer, **more: Any) -> Learner:
    running = learner(registry, log, trainer=trainer, **more)
    run_to_end(running)
    running.close()
    return running


def test_an_upgrade_continues_where_the_old_model_was_and_back_again(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    log = written(RECORDS[:6])
    before = learned(registry, log, trainers["old"])
    version, digest = before.place.parent, checkpoint.digest(trainers["old"])
    with pytest.raises(ModelMismatch, match="springtide upgrade --dry-run"):
        require_same_model(settings(registry, *HIDDEN))
    said = decided(registry, *HIDDEN)
    require_same_model(settings(registry, *HIDDEN))
    control = registry.control()
    assert control is not None
    assert (control.action, control.epoch, control.base, control.serving.mode) == ("upgrade", 2, version, "follow")
    assert control.plan is not None
    assert control.plan["model"]["hidden"] == "(24, 8)"
    assert f"from version {version}, epoch 1:" in said
    assert "  model.hidden was 16,8 and is 24,8" in said
    assert any(line.startswith("  weight tower.kernel_0: ") for line in said)

    # A crash before the first version leaves the same to be done.
    with killed_at("publish.checked"):
        learner(registry, log, trainer=trainers["hidden"])
    append(log, RECORDS[6:9])
    ours = learner(registry, log, trainer=trainers["hidden"])
    first = registry.manifest(ours.place.parent)
    assert (first.parent, first.epoch, first.kind) == (version, 2, "delta")
    end = registry.manifest(version).log.next
    assert (first.log.first, first.log.next) == (end, end)
    users = len(trainers["hidden"].tables["user"])
    assert users == len(trainers["old"].tables["user"])
    run_to_end(ours)
    ours.close()
    assert trainers["hidden"].counters.steps == 9
    after = checkpoint.digest(trainers["hidden"])
    # Started again it just goes on.
    again = learner(registry, log, trainer=trainers["hidden"])
    assert (checkpoint.digest(trainers["hidden"]), again.place.parent) == (after, ours.place.parent)
    again.close()

    # Back: the old settings and the version before the upgrade.
    registry.change(lambda now: roll_back(now, version, Mask.NONE, actor="ann", reason="worse", now_ms=9))
    with pytest.raises(ModelMismatch, match=r"hidden was 16,8 and is 24,8"):
        require_same_model(settings(registry, *HIDDEN))
    back = learner(registry, log, trainer=trainers["old"])
    assert (back.place.parent, checkpoint.digest(trainers["old"])) == (version, digest)
    run_to_end(back)
    back.close()
    assert trainers["old"].counters.steps == 9


def test_records_with_former_windows_are_skipped_and_counted(registry: Registry, trainers: dict[str, Trainer]) -> None:
    log = written(RECORDS[:4])
    before = learned(registry, log, trainers["old"])
    # The old trainer was stopped a little before the stream: one record of the old windows was not learned.
    append(log, [RECORDS[4], *(microbatch(number, spec=OTHER) for number in (5, 6))])
    behind = learner(registry, log, trainer=trainers["old"])
    with pytest.raises(SpecMismatch, match=r"springtide upgrade --dry-run"):
        run_to_end(behind)
    behind.close()
    assert trainers["old"].counters.steps == 5  # nothing of the stream's new records is lost
    with pytest.raises(ModelMismatch, match=r"features.windows_s was 3600,86400,604800 and is 1800,604800"):
        require_same_model(settings(registry, *WINDOWS), features_only=True)
    said = decided(registry, *WINDOWS)
    assert "  features.windows_s was 3600,86400,604800 and is 1800,604800" in said
    require_same_model(settings(registry, *WINDOWS), features_only=True)
    # A record of the old windows that came late.
    append(log, [RECORDS[7], microbatch(8, spec=OTHER)])
    ours = learned(registry, log, trainers["windows"], spec=OTHER)
    counted = ours.place.counts()
    assert (trainers["windows"].counters.steps, counted["other_features"]) == (8, 40)
    assert counted["rows"] == 9 * 40
    account = {name: account_in(ours)[name] for name in ("rows", "trained", "skipped", "duplicate", "masked")}
    assert check_accounts(trainer=TrainerAccount(**account, other_features=40)) == ()
    newest = registry.manifest(ours.place.parent)
    assert newest.metrics["account.other_features"] == 40
    assert (newest.spec, newest.parent is not None) == (OTHER.digest, True)
    control = registry.control()
    assert control is not None
    assert former_specs(registry.controls()) == {SPEC.digest, OTHER.digest}
    assert former_specs(registry.generations.beginnings()) == {SPEC.digest, OTHER.digest}

    # Back to the version before: the records of the other windows are passed over likewise.
    to = before.place.parent
    registry.change(lambda now: roll_back(now, to, Mask.NONE, actor="ann", reason="worse", now_ms=9))
    back = learned(registry, log, trainers["old"])
    assert (trainers["old"].counters.steps, back.place.other_features) == (6, 3 * 40)


def test_versions_behind_an_upgrade_are_recomputed_from_it(registry: Registry, trainers: dict[str, Trainer]) -> None:
    log = written(RECORDS[:3])
    before = learned(registry, log, trainers["old"])
    decided(registry, *WINDOWS)
    append(log, [RECORDS[3], *(microbatch(number, spec=OTHER) for number in range(4, 9))])
    ours = learned(registry, log, trainers["windows"], spec=OTHER)
    wanted = small_settings(*WINDOWS)
    found = verify(wanted, registry, ours.place.parent, None, lambda: trainers["windows"], log)
    assert (found.outcome, found.steps) == ("equal", 5)
    with pytest.raises(UnknownVersion, match="there is an upgrade between"):
        verify(wanted, registry, ours.place.parent, before.place.parent, lambda: trainers["windows"], log)


def test_learning_anew_starts_from_scratch_and_serving_waits_until_it_has_caught_up(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    log = written(RECORDS[:6])
    before = learned(registry, log, trainers["old"])
    said = decided(registry, *HIDDEN, from_scratch=True)
    assert any("nothing is carried over" in line for line in said)
    control = registry.control()
    assert control is not None
    assert (control.base, control.serving.version, control.serving.then_follow) == (None, before.place.parent, True)
    ours = learner(registry, log, trainer=trainers["hidden"])
    assert trainers["hidden"].counters.steps == 0
    control = registry.control()
    assert control is not None
    assert control.serving.mode == "pin"
    run_to_end(ours)
    while ours._publications.busy or ours.place.changed:
        ours.tick(0.0)
        settle(ours)
    ours.tick(0.0)
    ours.close()
    assert trainers["hidden"].counters.steps == 6
    control = registry.control()
    assert control is not None
    assert (control.action, control.serving.mode, control.epoch) == ("follow", "follow", 2)
    assert control.reason == "caught up, as the upgrade asked"


def test_a_new_registry_on_an_old_log_looks_for_the_first_record_of_its_windows(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    log = written([*RECORDS[:3], *(microbatch(number, spec=OTHER) for number in range(3, 6)), RECORDS[6]])
    fresh = learner(registry, log, trainer=trainers["windows"], spec=OTHER)
    with pytest.raises(SpecMismatch, match="offset 12"):
        run_to_end(fresh)
    fresh.close()
    assert (trainers["windows"].counters.steps, fresh.place.other_features) == (3, 120)


def test_a_new_state_directory_on_an_old_log_learns_what_its_own_stream_reads_again(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    """The salt was lost, and with it the histories: clicks come again from their beginning, under other pseudonyms."""
    ours = [microbatch(number, salt="fedcba9876543210") for number in range(3)]
    log = written([*RECORDS[:4], *ours])
    fresh = learned(registry, log, trainers["old"], about={**ABOUT, "salt": "fedcba9876543210"})
    assert (trainers["old"].counters.steps, fresh.place.other_features) == (3, 160)
    append(log, [RECORDS[4]])
    again = learner(registry, log, trainer=trainers["old"], about={**ABOUT, "salt": "fedcba9876543210"})
    with pytest.raises(SaltMismatch):
        run_to_end(again)
    again.close()


def test_a_release_with_another_model_upgrades_automatically_and_other_settings_do_not(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    log = written(RECORDS[:3])
    learned(registry, log, trainers["old"])
    here = settings(registry)
    upgrade_to_this_release(registry, here, SPEC, trainers["old"])
    assert len(registry.controls()) == 1
    with pytest.raises(ModelMismatch):
        upgrade_to_this_release(registry, settings(registry, *HIDDEN), SPEC, trainers["hidden"])
    # The settings are the version's, and the weights of this release are others.
    upgrade_to_this_release(registry, here, SPEC, trainers["hidden"])
    control = registry.control()
    assert control is not None
    assert (control.action, control.epoch, control.actor.startswith("trainer:")) == ("upgrade", 2, True)
    assert control.reason.startswith("this release has another model")


def test_nothing_is_changed_by_a_dry_run_nor_beside_a_trainer_nor_where_nothing_differs(
    registry: Registry, trainers: dict[str, Trainer]
) -> None:
    with pytest.raises(RegistryError, match="nothing was learned"):
        decided(registry, *HIDDEN)
    learned(registry, written(RECORDS[:2]), trainers["old"])
    said: list[str] = []
    assert upgrade.run(settings(registry, *HIDDEN), True, False, "", said.append, 7) is None
    assert said[-1] == "dry run: nothing was changed"
    assert upgrade.run(settings(registry), False, False, "why", said.append, 7) is None
    assert said[-1].endswith("there is nothing to upgrade")
    with DirectoryLock(registry.path, "trainer.lock"), pytest.raises(LockHeld):
        decided(registry, *HIDDEN)
    assert len(registry.controls()) == 1
    assert upgrade.main(["--paths.state", str(registry.path.parent)]) == 2
