"""The command line: the operator's commands on a real registry, and processes started with their flags."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy import cli, command_line
from deploy.operate import control, plan
from deploy.serve import run as run_serving
from state.config.settings import load
from state.errors import ControlConflict, ProcessFailed, RegistryError, SaltMismatch, SettingsError, UnknownVersion
from state.events.identity import load_salt
from state.features.mask import Mask
from state.positions import Source
from state.registry.control import start
from state.registry.manifest import Draft, LogRange
from state.registry.registry import Registry
from state.rows.store import RowStore

NOW_MS = 1_800_000_000_000
TOPIC = "0000002a" + "0" * 24
ROOT = Path(__file__).parents[2]


class Operator:
    """Somebody at the command line of one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.printed: list[str] = []
        self.became: list[tuple[str, list[str]]] = []

    def __call__(self, *words: str) -> str:
        """Gives a command; returns what it printed."""
        self.printed.clear()
        line = [*words, "--paths.state", str(self.state)]
        cli.run(line, lambda module, flags: self.became.append((module, flags)), NOW_MS, self.printed.append)
        return "\n".join(self.printed)

    @property
    def registry(self) -> Registry:
        return Registry(self.state / "registry")


def draft(number: int, parent: int | None, epoch: int = 1) -> Draft:
    return Draft(
        kind="base" if parent is None else "delta",
        epoch=epoch,
        parent=parent,
        log=LogRange("microbatches", "cd" * 16, 0, 10 * (number - 1), 10 * number),
        sources=((Source(TOPIC, 1), 100 * number),),
        steps=number,
        rows=1000 * number,
        created_at_ms=NOW_MS - (10 - number) * 60_000,
        event_time_ms=NOW_MS,
        spec="spec",
        program="program",
        salt="salt",
        metrics={"log_loss": 3.0 - number / 10, "auc": 0.5 if number > 1 else float("nan")},
    )


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator of a registry with versions 1 to 5 and nothing else running."""
    monkeypatch.setattr(control, "log_end", lambda settings: 64)
    registry = Registry(tmp_path / "registry")
    registry.propose(start(actor="trainer", reason="first start", now_ms=NOW_MS - 3_600_000))
    for number in range(1, 6):
        registry.publish(draft(number, number - 1 or None), {"serving.safetensors": b"rows"})
    return Operator(tmp_path)


def test_versions_lists_the_newest_first_with_age_log_and_metrics(operator: Operator) -> None:
    lines = operator("versions").splitlines()
    assert lines[0].split()[:5] == ["version", "epoch", "age", "kind", "log"]
    assert [line.split()[0] for line in lines[1:]] == ["5", "4", "3", "2", "1"]
    assert "40-50" in lines[1] and "2.5000" in lines[1] and "5 min 0 s" in lines[1]
    assert "nan" not in lines[-1]


def test_versions_as_json_is_json_even_where_a_metric_is_not_a_number(operator: Operator) -> None:
    entries = json.loads(operator("versions", "-o", "json"), parse_constant=lambda text: pytest.fail(text))
    assert (entries[0]["metrics"]["log_loss"], entries[0]["metrics"].get("auc")) == (2.9, None)
    assert entries[-1]["log"] == {"topic": "microbatches", "partition": 0, "first": 40, "next": 50}


def test_versions_says_how_many_more_there_are(operator: Operator) -> None:
    assert "3 older ones" in operator("versions", "--last", "2")
    assert "older ones" not in operator("versions", "--all")


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


def test_versions_marks_what_answers_use(operator: Operator) -> None:
    store = RowStore(operator.state / "serving" / "rows", 1 << 26)
    tensors = {"dense.w": np.ones(1, np.float32), "popular": np.array([5], np.uint64)}
    store.apply(operator.registry.manifest(1), tensors, now_ms=NOW_MS)
    store.serve(1)
    store.close()
    marked = next(line for line in operator("versions", "--last", "1").splitlines() if "served" in line)
    assert marked.startswith("1 "), "also where it is older than those asked for"


def test_a_host_that_has_not_served_yet_marks_nothing(operator: Operator) -> None:
    (operator.state / "serving" / "rows").mkdir(parents=True)
    assert "served" not in operator("versions")


def test_a_corrupt_version_is_listed_as_such_and_passed_over(operator: Operator) -> None:
    (operator.state / "registry" / "versions" / f"{3:012d}" / "manifest.json").write_text("{")
    assert "corrupt" in next(line for line in operator("versions").splitlines() if line.startswith("3"))
    assert "version 2," in operator("rollback", "--before", "6m", "--reason", "older", "--dry-run")


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


def test_looking_does_not_make_a_registry(tmp_path: Path) -> None:
    operator = Operator(tmp_path / "absent")
    for command in ("versions", "history"):
        with pytest.raises(RegistryError, match="no registry here"):
            operator(command)
    assert not operator.state.exists()


@pytest.mark.parametrize(
    ("command", "module"), [(name, module) for name, (module, _) in command_line.PROCESSES.items()]
)
def test_a_process_gets_its_own_flags_and_the_settings(operator: Operator, command: str, module: str) -> None:
    own = ["--synthetic"] if command in command_line.OWN_HELP else []
    operator(command, *own, "--stream.cut_ms", "50")
    assert operator.became == [(module, [*own, "--stream.cut_ms", "50", "--paths.state", str(operator.state)])]


@pytest.mark.parametrize("command", sorted({*command_line.PROCESSES} - {*command_line.OWN_HELP}))
def test_a_process_without_options_of_its_own_is_not_started_with_one(operator: Operator, command: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown argument --synthetic; see `springtide {command} --help`"):
        operator(command, "--synthetic")
    assert operator.became == []


def test_a_wrong_setting_is_refused_before_a_process_starts(operator: Operator) -> None:
    with pytest.raises(SettingsError, match=r"stream\.cut_ms"):
        operator("stream", "--stream.cut_ms", "soon")
    assert operator.became == []


def test_config_shows_values_with_their_origin_and_masks_secrets(operator: Operator) -> None:
    text = operator("config", "--kafka.sasl_password", "hunter2", "--kafka.port", "1234")
    assert "hunter2" not in text and 'sasl_password = "********"' in text
    assert re.search(r"port = 1234 +# flag --kafka.port", text)
    entries = json.loads(operator("config", "-o", "json", "--kafka.sasl_password", "hunter2"))
    assert next(one for one in entries if one["name"] == "kafka.sasl_password")["value"] == "********"


def test_config_shows_a_part_of_the_settings_and_one_in_full(operator: Operator) -> None:
    part = operator("config", "registry")
    assert part.splitlines()[0] == "[registry]" and "[kafka]" not in part
    (line,) = [line for line in operator("config", "--changed").splitlines() if " = " in line]
    assert line.startswith("state = ") and line.endswith("# flag --paths.state")
    page = operator("config", "kafka.port", "--kafka.port", "1234")
    for part in ("kafka.port = 1234", "from      flag --kafka.port", "default   9092", "allowed   1 to 65535"):
        assert part in page
    assert "SPRINGTIDE_KAFKA_PORT=..., or --kafka.port ..." in page
    (entry,) = json.loads(operator("config", "serving.clock", "-o", "json"))
    assert (entry["value"], entry["allowed"], entry["origin"]) == ("event", "event or wall", "default")


@pytest.mark.parametrize(("name", "hint"), [("kafak", "kafka"), ("kafka.prot", "kafka.port")])
def test_config_of_an_unknown_name_says_the_nearest(operator: Operator, name: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=f"nearest is {hint}$"):
        operator("config", name)


def test_a_printed_file_neither_names_a_cluster_nor_a_masked_password(operator: Operator, tmp_path: Path) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text(operator("config", "--kafka.port", "1234", "--kafka.sasl_password", "hunter2"))
    again = load([], env={}, path=path)
    assert "kafka.bootstrap_servers" not in again.origins
    assert again.kafka.bootstrap_servers == "127.0.0.1:1234"
    assert again.kafka.sasl_password == ""


def test_config_prints_a_file_that_reads_back(operator: Operator, tmp_path: Path) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text(operator("config", "--stream.cut_ms", "50"))
    assert load([], env={}, path=path).stream.cut_ms == 50


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["versions"], 1),
        (["config", "--kafka.prot", "1"], 2),
        (["config", "--kafka.port"], 2),
        (["stream", "--no-such"], 2),
        (["versions", "--last", "0"], 2),
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
    ],
)
def test_a_failure_is_one_line_and_a_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(words) == status
    except SystemExit as end:  # argparse's, after its help
        assert (end.code, status) == (0, 0)
    said = capsys.readouterr()
    if status:
        assert said.err.startswith("springtide: ") and len(said.err.splitlines()) == 1
        assert said.out == ""
    else:
        assert said.out


def test_the_process_ends_with_the_status_and_the_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "rollbac"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("springtide: ") and len(done.stderr.splitlines()) == 1


SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_serving_stops_its_processes_together(tmp_path: Path) -> None:
    looks: list[int] = []

    def stopping() -> bool:
        looks.append(1)
        return len(looks) > 1

    run_serving([("applier", SLEEP), ("worker 0", SLEEP)], os.environ, stopping)


def test_serving_ends_when_one_of_its_processes_does() -> None:
    dead = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(ProcessFailed, match=r"worker 0 ended unasked \(exit 3\)"):
        run_serving([("applier", SLEEP), ("worker 0", dead)], os.environ, lambda: False)


@pytest.mark.parametrize("text", ["yesterday", "", "-5", "-5y", "12:00"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="ISO 8601"):
        plan.parse_time(text, NOW_MS)


@pytest.mark.parametrize("text", ["now", "now..10m", "5..5"])
def test_a_range_of_times_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--skip-time"):
        plan.parse_times(text, NOW_MS)


def test_a_place_needs_one_clear_topic() -> None:
    other = "0000002b" + "0" * 24
    assert plan.parse_place(f"{other}:3:5-5", [TOPIC, other]) == (43, 3, 5, 6)
    for text, topics in (("3:5-5", [TOPIC, other]), ("3:5-5", []), ("3:6-5", [TOPIC]), ("5-6", [TOPIC])):
        with pytest.raises(SettingsError, match="--skip"):
            plan.parse_place(text, topics)


def test_a_plan_across_a_rollback_does_not_count_rows_of_another_line(operator: Operator) -> None:
    registry = operator.registry
    to, newest = registry.manifest(3), replace(registry.manifest(5), visible=((5, 5), (1, 2)))
    planned: Callable[..., plan.Plan] = plan.rollback_plan
    assert planned(to, newest, Mask.NONE, now_ms=NOW_MS, log_end=None).rows is None


def test_a_gap_is_accepted_at_the_start_of_a_reader_with_a_reason(operator: Operator) -> None:
    operator("stream", "--accept-gap", "0:5-9", "--accept-gap", "1:2-2", "--reason", "old clicks")
    module, flags = operator.became[-1]
    assert module == "streaming.pipeline"
    assert flags[:6] == ["--accept-gap", "0:5-9", "--accept-gap", "1:2-2", "--reason", "old clicks"]
    operator("train")
    assert operator.became[-1][1][:1] != ["--accept-gap"]
    operator("up", "--accept-gap", "abababab:0:5-9", "--reason", "old clicks", "--no-shoppers")
    assert operator.became[-1][1][:5] == ["--accept-gap", "abababab:0:5-9", "--reason", "old clicks", "--no-shoppers"]
    with pytest.raises(SettingsError, match="needs --reason"):
        operator("train", "--accept-gap", "0:5-9")
    with pytest.raises(SettingsError, match="PARTITION:A-B"):
        operator("train", "--accept-gap", "9-5", "--reason", "x")


def test_verify_becomes_the_trainers_own_process(operator: Operator) -> None:
    operator("verify", "3", "--from", "1", "-o", "json")
    module, flags = operator.became[-1]
    assert (module, flags[:5]) == ("trainer.verify", ["3", "--from", "1", "-o", "json"])
