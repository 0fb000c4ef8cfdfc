"""Pin, follow, rollback and history on a real registry: each a generation with actor and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.operate import control, plan
from state.errors import ControlConflict, SaltMismatch, SettingsError, UnknownVersion
from state.events.identity import load_salt
from state.features.mask import Mask
from tests.deploy.operating import NOW_MS, Operator, draft


def test_a_pin_and_a_follow_are_generations_with_actor_and_reason(operator: Operator) -> None:
    assert "version 3" in operator("pin", "3", "--reason", "odd answers")
    assert "pinned" in next(line for line in operator("versions").splitlines() if line.startswith("3"))
    operator("follow")
    first, pinned, followed = operator.registry.controls()
    assert first.action == "start"
    assert (pinned.serving.version, pinned.reason, pinned.actor) == (3, "odd answers", control.actor())
    assert (followed.serving.mode, followed.epoch) == ("follow", 1)


def test_a_command_given_twice_changes_nothing_the_second_time(operator: Operator) -> None:
    operator("pin", "3")
    assert "nothing was changed" in operator("pin", "3", "--reason", "again")
    document = json.loads(operator("pin", "3", "-o", "json"))
    assert document["changed"] is False
    assert len(operator.registry.controls()) == 2


@pytest.mark.parametrize("command", [("pin", "9"), ("rollback", "--to", "9", "--reason", "x")])
def test_an_unknown_version_is_refused_with_the_nearest(operator: Operator, command: tuple[str, ...]) -> None:
    with pytest.raises(UnknownVersion, match=r"9 is not kept.*5"):
        operator(*command)
    assert len(operator.registry.controls()) == 1


def test_rollback_prints_its_plan_and_then_creates_the_epoch(operator: Operator) -> None:
    printed = operator("rollback", "--to", "3", "--skip-time", "10m..now", "--skip", "1:100-199", "--reason", "poison")
    assert re.search(r"version 3, 7 min 0 s old", printed)
    assert "offsets 30 to 64: 34 positions, 2,000 rows trained since" in printed
    assert "partition 1 offsets 100-199" in printed
    newest = operator.registry.control()
    assert newest is not None
    assert (newest.epoch, newest.base, newest.serving.version, newest.reason) == (2, 3, 3, "poison")
    assert newest.mask.offsets == ((42, 1, 100, 200),)
    assert newest.mask.times == ((NOW_MS - 600_000, NOW_MS),)


def test_a_dry_run_prints_the_plan_and_changes_nothing(operator: Operator) -> None:
    assert "nothing was changed" in operator("rollback", "--to", "3", "--reason", "look", "--dry-run")
    document = json.loads(operator("rollback", "--to", "3", "--reason", "look", "--dry-run", "-o", "json"))
    assert document["plan"]["records"] == 34
    assert len(operator.registry.controls()) == 1


def test_rollback_before_a_time_takes_the_newest_older_version(operator: Operator) -> None:
    operator("rollback", "--before", "6m", "--reason", "older")
    newest = operator.registry.control()
    assert newest is not None and newest.base == 3
    with pytest.raises(UnknownVersion, match="oldest is version 1"):
        operator("rollback", "--before", "2001-01-01", "--reason", "too old")


def test_the_same_rollback_again_starts_no_second_epoch(operator: Operator) -> None:
    for _ in range(2):
        operator("rollback", "--to", "3", "--reason", "poison")
    assert [one.epoch for one in operator.registry.controls()] == [1, 2]


def test_a_rollback_needs_a_reason_and_one_target(operator: Operator) -> None:
    for words in (["--to", "3"], ["--reason", "x"], ["--to", "3", "--before", "now", "--reason", "x"]):
        with pytest.raises(SettingsError, match="--help"):
            operator("rollback", *words)


def test_when_kafka_does_not_answer_the_plan_says_so(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "log_end", lambda settings: None)
    printed = operator("rollback", "--to", "3", "--reason", "x", "--dry-run")
    assert "30 to at least 50 (Kafka was not asked)" in printed


def test_history_tells_who_did_what_and_why(operator: Operator) -> None:
    operator("rollback", "--to", "2", "--skip-time", "10m..now", "--reason", "poisoned feed")
    text = operator("history")
    assert "poisoned feed" in text and "rollback" in text and "clicks from" in text
    document = json.loads(operator("history", "-o", "json"))
    assert [one["action"] for one in document] == ["start", "rollback"]


def test_masked_users_become_pseudonyms_and_are_only_counted(operator: Operator, tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "salt")
    registry = operator.registry
    registry.publish(replace(draft(6, 5), salt=salt.fingerprint), {"serving.safetensors": b"rows"})
    listed = tmp_path / "users.txt"
    listed.write_text("ann\nbob\n\n")
    words = ["rollback", "--to", "3", "--skip-users", str(listed), "--reason", "asked for"]
    assert json.loads(operator(*words, "-o", "json"))["control"]["mask"]["users"] == 2
    newest = operator.registry.control()
    assert newest is not None and len(newest.mask.users) == 2
    kept = b"".join(path.read_bytes() for path in (tmp_path / "registry" / "control").iterdir())
    assert b"ann" not in kept and b"bob" not in kept


def test_masking_users_with_another_salt_is_refused(operator: Operator, tmp_path: Path) -> None:
    load_salt(tmp_path / "salt")
    listed = tmp_path / "users.txt"
    listed.write_text("ann\n")
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        operator("rollback", "--to", "3", "--skip-users", str(listed), "--reason", "asked for")
    assert len(operator.registry.controls()) == 1


def test_a_race_between_two_operators_has_one_winner(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Operator(operator.state)
    real = control.log_end

    def meanwhile(settings: object) -> int | None:
        other("pin", "4", "--reason", "first")
        return real(settings)  # type: ignore[arg-type]

    monkeypatch.setattr(control, "log_end", meanwhile)
    with pytest.raises(ControlConflict, match="history"):
        operator("rollback", "--to", "3", "--reason", "second")
    assert [one.action for one in operator.registry.controls()] == ["start", "pin"]


def test_a_plan_across_a_rollback_does_not_count_rows_of_another_line(operator: Operator) -> None:
    registry = operator.registry
    to, newest = registry.manifest(3), replace(registry.manifest(5), visible=((5, 5), (1, 2)))
    planned: Callable[..., plan.Plan] = plan.rollback_plan
    assert planned(to, newest, Mask.NONE, now_ms=NOW_MS, log_end=None).rows is None
