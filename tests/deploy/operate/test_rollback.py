"""`springtide rollback` on a real registry and log: it goes back to a version that learned nothing masked, or refuses and explains what to do."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.operate import log_view, rollback
from deploy.operate import rollback as digests
from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import (
    LogError,
    SaltMismatch,
    SettingsError,
    SpringtideError,
    UnfitVersion,
    UnknownVersion,
)
from state.events.identity import load_salt, user_id
from state.registry.control import Control
from state.registry.manifest import entries
from state.rows.store import RowStore
from tests.deploy.operating import BAIT, BOT, NOW_MS, TOPIC, USERS, Operator, draft, files, record, users_of
from tests.kills import killed_at
from tests.memory_log import MemoryLog

LOG = Kafka().microbatches_topic


def newest(operator: Operator) -> Control:
    control = operator.registry.control()
    assert control is not None
    return control


def refused(operator: Operator, error: type[SpringtideError], match: str, *words: str) -> None:
    """Asserts that a rollback is refused in these words, and that nothing was changed."""
    before = len(operator.registry.controls())
    with pytest.raises(error, match=match):
        operator("rollback", *words, "--reason", "poison")
    assert len(operator.registry.controls()) == before


# Again, and while another one is under way


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("at", ["control.written", "control.linked", "rollback.proposed", "rollback.answered"])
def test_killed_at_each_step_and_typed_again_control_and_plan_are_those_of_one_that_was_not(
    operator: Operator, tmp_path: Path, mode: str, at: str
) -> None:
    words = ("rollback", "--to", "3", "--skip", "1:360-399", "--mode", mode, "--reason", "x", "-o", "json")
    shutil.copytree(tmp_path, tmp_path / "other")
    whole = json.loads(Operator(tmp_path / "other")(*words))
    with killed_at(at):
        operator(*words)
    for changed in (at == "control.written", False):
        document = json.loads(operator(*words))
        assert (document["changed"], document["control"]) == (changed, whole["control"])
        assert operator.registry.generations.outcome(2, "planned") == whole["plan"]


def test_a_second_rollback_may_name_clicks_that_the_stream_has_yet_to_write_again(operator: Operator) -> None:
    first = ("--to", "3", "--mode", "exact", "--skip", "1:360-399")
    second = ("--to", "3", "--mode", "exact", "--skip-time", "5m..4m")
    operator("rollback", *first, "--reason", "bots")
    operator("rollback", *second, "--reason", "more bots")
    assert (newest(operator).epoch, len(newest(operator).masks)) == (3, 2)
    operator.registry.generations.add_outcome(3, "learned", {})
    refused(operator, SettingsError, "no row of the training log is named", "--to", "3", "--skip-time", "4m..3m")


@pytest.mark.parametrize("skip", ["--skip", "--skip-time", "--skip-users"])
def test_an_exact_rollback_after_a_fast_one_starts_before_what_the_fast_one_left_out(
    operator: Operator, tmp_path: Path, skip: str
) -> None:
    """The fast one only left rows out of training: the training log still has the clicks."""
    salt = load_salt(tmp_path / "salt")
    operator.registry.publish(replace(draft(6, 5), salt=salt.fingerprint), files())
    (tmp_path / "users.txt").write_text("ann\n")
    ours_are_the_bots(operator, user_id(salt, "ann"))
    value = {"--skip": "1:360-399", "--skip-time": "6m..5m", "--skip-users": str(tmp_path / "users.txt")}[skip]
    words = ("rollback", skip, value, "--reason", "bots", "-o", "json")
    fast = json.loads(operator(*words))["control"]
    made = replace(draft(7, fast["base"], epoch=2, records=32), salt=salt.fingerprint, mask_generation=2)
    operator.registry.publish(made, files())
    operator("follow", "--reason", "looks good")
    # What was asked once is not done again.
    assert json.loads(operator(*words))["changed"] is False
    refused(
        operator,
        UnfitVersion,
        rf"version 7 comes after.*of mask 1.*`--to {fast['base']}`",
        "--to",
        "7",
        "--mode",
        "exact",
    )
    exact = json.loads(operator(*words, "--mode", "exact"))
    assert exact["control"]["base"] == fast["base"], "not the newest version, whose log has the clicks"
    assert exact["plan"]["exact"]["clicks"] == 20 * (32 - 5 * fast["base"])
    # Now the log has none of them: versions after them are clean.
    made = replace(made, epoch=3, parent=fast["base"], mask_generation=2)
    operator.registry.publish(replace(made, log=replace(made.log, epoch=2, next=70)), files())
    operator("follow", "--reason", "looks good")
    assert json.loads(operator(*words, "--mode", "exact"))["changed"] is False


def test_an_exact_rollback_without_clicks_excludes_from_the_log_what_fast_ones_left_out(operator: Operator) -> None:
    refused(operator, SettingsError, "neither a version nor clicks", "--mode", "exact")
    operator("rollback", "--skip", "1:360-399", "--reason", "bots")
    operator.registry.publish(replace(draft(6, 3, epoch=2, records=32), mask_generation=2), files())
    operator("rollback", "--mode", "exact", "--reason", "their windows too")
    assert (newest(operator).base, newest(operator).mode) == (3, "exact")
    assert all(one.excluded for one in newest(operator).masks)
    refused(operator, SettingsError, "neither a version nor clicks", "--mode", "exact")


def test_an_exact_rollback_starts_a_branch_of_the_log_at_the_version_and_says_what_is_read_again(
    operator: Operator,
) -> None:
    words = ("rollback", "--to", "3", "--mode", "exact", "--reason", "bots")
    printed = operator(*words, "--dry-run")
    assert "200 clicks are read again" in printed and "the stream's store is not on this machine" in printed
    assert len(operator.registry.controls()) == 1
    document = json.loads(operator(*words, "-o", "json"))
    assert document["plan"]["exact"] == {"clicks": 200, "histories": None, "log_epoch": 2}
    assert (newest(operator).mode, newest(operator).epoch) == ("exact", 2)
    assert [(one.epoch, one.first, one.until) for one in newest(operator).log] == [(1, 0, 30), (2, 64, None)]
    assert [after for _, after in newest(operator).log[1].sources] == [300]


def test_an_exact_rollback_is_refused_where_the_clicks_are_deleted_or_another_topic(
    operator: Operator, log: MemoryLog
) -> None:
    words = ("--to", "3", "--mode", "exact")
    topic = Kafka().clicks_topic
    log.topics().delete_before(topic, {1: 301})
    refused(operator, UnfitVersion, "cannot be read again", *words)
    log.topics().delete(topic)
    log.topics().ensure(topic, 2)
    refused(operator, LogError, "which was recreated", *words)


# What it goes back to


def test_the_plan_counts_what_the_trainer_will_find(operator: Operator) -> None:
    # Version 3 has learned offsets below 300; 17 records are behind it.
    document = json.loads(operator("rollback", "--to", "3", "--skip", "1:360-399", "--reason", "x", "-o", "json"))
    plan = document["plan"]
    assert plan["log"] == {"topic": "microbatches", "partition": 0, "first": 30, "end": 64}
    assert (plan["records"], plan["rows"], plan["masked"]) == (17, 340, 40)
    hit = {user for one in (18, 19) for user in users_of(one)}
    assert plan["users"] == len(hit)
    later = [user for one in range(20, 32) for user in users_of(one)]
    assert plan["after"] == sum(user in hit for user in later)
    assert plan["masks"] == {"1": {"rows": 40, "users": len(hit)}}
    assert operator.registry.generations.outcome(2, "planned") == plan
    assert newest(operator).plan == {"end": 64}


def test_rollback_tells_its_plan_and_creates_the_epoch(operator: Operator) -> None:
    words = ("rollback", "--to", "3", "--skip", "1:360-399", "--follow-when-caught-up")
    printed = operator(*words, "--reason", "poison")
    assert re.search(r"version 3, 7 min 0 s old", printed) and "follow once the trainer has caught up" in printed
    assert "offsets 30 to 64: 340 examples in 17 records" in printed
    assert "partition 1 offsets 360-399: 40 examples" in printed
    assert "later examples of these users still count" in printed
    control = newest(operator)
    assert (control.epoch, control.base, control.serving.version, control.reason) == (2, 3, 3, "poison")
    assert control.mask.offsets == ((42, 1, 360, 400),) and control.serving.then_follow


@pytest.mark.parametrize(
    ("skip", "base"),
    [
        (("--skip", "1:360-399"), 3),
        (("--skip", "1:400-400"), 4),
        (("--skip", "1:399-400"), 3),
        (("--skip", "1:639-639"), 5),
        (("--skip-time", "6m..now"), 4),
        (("--skip-time", "361s..now"), 3),
        (("--minutes", "7"), 3),
        (("--skip-item", f"{BAIT}=7m..now"), 3),
        (("--minutes", "4"), 5),
    ],
)
def test_the_newest_version_that_learned_nothing_masked_is_taken(
    operator: Operator, skip: tuple[str, ...], base: int
) -> None:
    for target in ((), ("--before-mask",)):
        operator("rollback", *target, *skip, "--reason", "x")
        assert newest(operator).base == base
    # Before a time as well: whichever is older.
    operator("rollback", "--before", "450s", *skip, "--reason", "x")
    assert newest(operator).base == min(base, 2)


def test_a_version_that_learned_a_masked_click_is_refused_with_the_newest_that_has_not(operator: Operator) -> None:
    refused(operator, UnfitVersion, "version 4 has learned.*version 3 of", "--to", "4", "--skip", "1:399-450")
    refused(operator, UnfitVersion, "version 5 has learned.*`--to 3`", "--to", "5", "--minutes", "7")
    refused(operator, UnfitVersion, "version 5 has learned.*--before-mask", "--to", "5", "--skip-time", "361s..5m")
    operator("rollback", "--to", "3", "--skip", "1:399-450", "--reason", "x")
    assert newest(operator).base == 3


def test_a_late_click_in_the_masked_span_does_not_count_where_it_was_not_learned_yet(
    operator: Operator, log: MemoryLog
) -> None:
    """Times in the log are in no order: where the first masked row lies is read, not reckoned."""
    from state.microbatch.codec import decode, encode

    late = decode(record(32))
    late_ms = np.where(late.offset == 641, NOW_MS - 480_000 + 5, late.at_ms)
    with log.writer("stream") as writer, writer.transaction():
        writer.send(LOG, 0, None, encode(late.header, late.columns | {"at_ms": late_ms}))
    span = f"{NOW_MS - 480_000 + 1}..{NOW_MS - 480_000 + 10}"
    assert "version 5" in operator("rollback", "--skip-time", span, "--reason", "x")
    assert newest(operator).base == 5


def test_users_are_looked_for_in_the_tables_and_then_in_the_log(operator: Operator, tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "salt")
    registry = operator.registry
    registry.publish(replace(draft(6, 5), salt=salt.fingerprint), files())
    registry.add_base(registry.manifest(3), files({one for number in range(15) for one in users_of(number)}))
    listed = tmp_path / "users.txt"
    listed.write_text("ann\n")
    ours = user_id(salt, "ann")
    # Nobody of that name was ever seen.
    refused(operator, SettingsError, "no row of the training log is named", "--skip-users", str(listed))
    ours_are_the_bots(operator, ours)
    operator("rollback", "--skip-users", str(listed), "--reason", "asked for")
    assert (newest(operator).base, list(newest(operator).mask.users)) == (3, [ours])
    kept = b"".join(path.read_bytes() for path in (tmp_path / "registry" / "control").iterdir())
    assert b"ann" not in kept


def test_users_are_looked_for_in_versions_after_the_base_when_the_log_begins_later(
    operator: Operator, tmp_path: Path
) -> None:
    salt = load_salt(tmp_path / "salt")
    operator.registry.publish(replace(draft(6, 5), salt=salt.fingerprint), files())
    (tmp_path / "users.txt").write_text("ann\n")
    ours_are_the_bots(operator, user_id(salt, "ann"))
    log_view.open_log(Settings()).topics().delete_before(LOG, {0: 20})
    operator("rollback", "--skip-users", str(tmp_path / "users.txt"), "--reason", "a flood")
    assert newest(operator).base == 3


def ours_are_the_bots(operator: Operator, ours: int) -> None:
    """Writes the log again, and the versions that know the bot, with another pseudonym for the bot."""
    registry = operator.registry
    for number in (4, 5):
        known = files([ours, *range(1, USERS + 1)])
        registry.replace(replace(registry.manifest(number), files=entries(known)), known)
    from state.microbatch.codec import decode, encode

    made = MemoryLog(ids=iter((TOPIC, "cd" * 16)).__next__)
    kafka = Kafka()
    made.topics().ensure(kafka.clicks_topic, 2)
    made.topics().ensure(LOG, 1)
    with made.writer() as writer:
        for _ in range(640):
            writer.send(kafka.clicks_topic, 1, None, b"")
    with made.writer("stream") as writer:
        for number in range(32):
            batch = decode(record(number))
            users = np.where(batch.user == BOT, np.uint64(ours), batch.user)
            with writer.transaction():
                writer.send(LOG, 0, None, encode(batch.header, batch.columns | {"user": users}))
    log_view.open_log = lambda settings: made  # the fixture puts it back


def test_users_whom_every_kept_version_knows_are_refused(operator: Operator, tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "salt")
    listed = tmp_path / "users.txt"
    listed.write_text("ann\n")
    registry = operator.registry
    registry.remove("base", 1)
    registry.publish(replace(draft(6, 5), salt=salt.fingerprint), files())
    registry.add_base(registry.manifest(5), files([user_id(salt, "ann")]))
    refused(operator, UnfitVersion, "no kept version has learned none.*fewer users", "--skip-users", str(listed))


def test_a_dry_run_tells_the_plan_and_changes_nothing(operator: Operator) -> None:
    assert "nothing was changed" in operator("rollback", "--to", "3", "--reason", "look", "--dry-run")
    document = json.loads(operator("rollback", "--to", "3", "--reason", "look", "--dry-run", "-o", "json"))
    assert (document["plan"]["records"], document["plan"]["answers"]["serves"]) == (17, False)
    assert len(operator.registry.controls()) == 1
    assert operator.registry.generations.outcome(2, "planned") is None


def test_the_plan_says_how_answers_turn(operator: Operator) -> None:
    store = RowStore(operator.state / "serving" / "rows", 1 << 26)
    tensors: dict[str, np.ndarray] = {"dense.w": np.ones(1, np.float32), "popular": np.array([5], np.uint64)}
    store.apply(operator.registry.manifest(1), tensors, now_ms=NOW_MS)
    store.close()
    words = ("--reason", "x", "--dry-run", "-o", "json")
    here = json.loads(operator("rollback", "--to", "1", *words))["plan"]["answers"]
    assert (here["in_row_store"], here["seconds"]) == (True, 0.0)
    away = json.loads(operator("rollback", "--to", "3", *words))["plan"]["answers"]
    sizes = [operator.registry.manifest(one).files["serving.safetensors"].bytes for one in (2, 3)]
    assert (away["in_row_store"], away["bytes"]) == (False, sum(sizes)), "from the nearest that is here"


# What is refused


def test_an_abandoned_epochs_version_is_refused_and_none_is_chosen(operator: Operator) -> None:
    operator("rollback", "--to", "2", "--reason", "poison")
    registry = operator.registry
    registry.publish(draft(6, 2, epoch=2, records=12), files())
    refused(operator, UnfitVersion, "version 4 is of epoch 1, which a rollback abandoned.*take 2", "--to", "4")
    operator("rollback", "--before", "5m", "--reason", "older")
    assert newest(operator).base == 6, "not 4, which was made before it too"


def test_a_click_that_an_earlier_rollback_left_out_does_not_count_as_learned(operator: Operator) -> None:
    """The version of the new epoch is behind the masked click in the log, and has not learned it."""
    operator("rollback", "--to", "3", "--skip", "1:360-399", "--reason", "first")
    operator.registry.publish(draft(6, 3, epoch=2, records=25), files())
    operator("unmask", "1", "--reason", "no")
    operator("rollback", "--to", "6", "--skip", "1:360-399", "--reason", "yes, they were")
    assert newest(operator).base == 6


def test_what_is_beyond_the_logs_beginning_can_only_serve(operator: Operator, log: MemoryLog) -> None:
    log.topics().delete_before(LOG, {0: 25})
    refused(operator, UnfitVersion, "log begins at 25: it can serve.*springtide pin 2", "--to", "2")
    refused(operator, UnfitVersion, "springtide pin 2", "--skip", "1:250-260")
    marked = {line.split()[0]: line for line in operator("versions").splitlines()[1:]}
    assert [number for number, line in marked.items() if "serve only" in line] == ["2", "1"]
    operator("rollback", "--to", "3", "--reason", "x")


def test_a_swept_version_and_one_that_cannot_be_put_together_are_refused(operator: Operator) -> None:
    refused(operator, UnknownVersion, "9 is not kept.*5", "--to", "9")
    operator.registry.remove("delta", 2)
    refused(operator, UnknownVersion, "version 2 is not kept.*use 1 or 3", "--to", "2")
    refused(operator, UnknownVersion, "2 is not kept", "--to", "3")
    operator("rollback", "--before", "6m", "--reason", "x")
    assert newest(operator).base == 1, "the newest that can be put together"


def test_a_damaged_version_is_refused_with_the_one_before_the_damage(operator: Operator) -> None:
    path = operator.registry.folder("delta", 3) / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(operator, UnfitVersion, "version 4 cannot be put together.*fails its digest.*take 2", "--to", "4")
    operator("rollback", "--to", "2", "--reason", "x")


def test_large_versions_that_answer_at_once_are_checked_after_answers_turned(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "CHECKED_FIRST_BYTES", 0)
    store = RowStore(operator.state / "serving" / "rows", 1 << 26)
    tensors: dict[str, np.ndarray] = {"dense.w": np.ones(1, np.float32), "popular": np.array([5], np.uint64)}
    store.apply(operator.registry.manifest(1), tensors, now_ms=NOW_MS)
    store.close()
    path = operator.registry.folder("base", 1) / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(operator, UnfitVersion, "cannot be put together", "--to", "1", "--dry-run")
    with pytest.raises(UnfitVersion, match="cannot be put together"):
        operator("rollback", "--to", "1", "--reason", "x")
    assert newest(operator).serving.version == 1, "answers turned first"
    assert digests.total_bytes(operator.registry, 2) > 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--skip-time", "10m..2100-01-01"), "ends in the future, 2100.*end it at the current time"),
        (("--skip-time", "3m..now"), "no row of the training log is named.*springtide status"),
        (("--skip", "1:600-640"), "ends before offset 640.*up to 639"),
        (("--skip", "7:1-2"), "no partition 7.*0, 1"),
        (("--skip", "1:9-5"), "write PARTITION:A-B"),
        (("--minutes", "0"), "whole number"),
        ((), "neither a version nor clicks"),
        (("--before-mask",), "neither a version nor clicks"),
        (("--to", "3", "--before", "now"), "--help"),
    ],
)
def test_a_mask_outside_the_log_and_wrong_use_are_refused(
    operator: Operator, words: tuple[str, ...], match: str
) -> None:
    refused(operator, SettingsError, match, *words)


def test_times_before_all_that_is_kept_are_refused(operator: Operator) -> None:
    refused(operator, UnfitVersion, "no kept version.*oldest is version 1", "--skip-time", "2020-01-01..2020-01-02")
    refused(operator, UnknownVersion, "oldest is version 1", "--before", "2001-01-01")


def test_masking_users_with_another_salt_is_refused(operator: Operator, tmp_path: Path) -> None:
    load_salt(tmp_path / "salt")
    listed = tmp_path / "users.txt"
    listed.write_text("ann\n")
    refused(operator, SaltMismatch, "restore the salt file", "--to", "3", "--skip-users", str(listed))


# Without Kafka, twice, and two at once


@pytest.fixture
def without_kafka(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(settings: object) -> MemoryLog:
        raise LogError("no broker answers")

    monkeypatch.setattr(log_view, "open_log", away)


@pytest.mark.usefixtures("without_kafka")
def test_where_kafka_is_away_what_versions_say_of_themselves_decides(operator: Operator) -> None:
    refused(operator, UnfitVersion, "version 4 has learned", "--to", "4", "--minutes", "7")
    refused(operator, LogError, "without --mode exact", "--to", "3", "--mode", "exact")
    printed = operator("rollback", "--skip", "1:360-399", "--reason", "x")
    assert "Kafka does not answer" in printed
    assert newest(operator).base == 3


def test_a_rollback_during_a_rollback_goes_farther_back(operator: Operator) -> None:
    operator("rollback", "--skip", "1:400-439", "--reason", "first")
    assert newest(operator).base == 4
    operator("rollback", "--skip", "1:300-399", "--reason", "it began earlier")
    assert (newest(operator).base, newest(operator).epoch) == (3, 3)
    operator("rollback", "--skip", "1:100-110", "--reason", "and earlier")
    assert newest(operator).base == 1
    assert len(newest(operator).masks) == 3, "what was masked stays masked"
