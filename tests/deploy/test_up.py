"""`up` refuses in one line, and stops what it started."""

from __future__ import annotations

import gc
import signal
import socket
from pathlib import Path

import pytest

from deploy import up
from deploy.startup.hints import repeated_flags
from deploy.startup.steps import STOP_ORDER, ports, process_plans
from state.config.loading import load
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.process.commands import parser_of
from state.process.network import free_port
from state.process.part import Signals

PORTS = (
    "serving.port",
    "serving.grpc_port",
    "stream.metrics_port",
    "trainer.metrics_port",
    "serving.metrics_port",
    "up.metrics_port",
    "kafka.port",
    "console.port",
)


pytestmark = pytest.mark.usefixtures("undisturbed_signals")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A state directory and free ports of this test."""
    chosen = [word for name in PORTS for word in (f"--{name}", str(free_port()))]
    return [*chosen, "--paths.state", str(tmp_path / "state")]


def complaint(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Runs `up`, which must refuse with exit 1; returns the one line that it says."""
    assert up.main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_taken_port_is_one_line_with_the_setting_to_change(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = complaint(capsys, [*flags, "--serving.port", str(port)])
    assert f"port {port} is in use" in line
    assert "serving.port" in line


def test_a_broker_that_is_named_at_the_local_port_is_not_started_and_up_says_why(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    port = flags[flags.index("--kafka.port") + 1]
    named = ["--kafka.bootstrap_servers", f"127.0.0.1:{port}", "--kafka.request_timeout_s", "1"]
    assert up.main([*flags, *named]) == 1
    said = capsys.readouterr().out
    assert (
        f"kafka.bootstrap_servers is set (flag --kafka.bootstrap_servers), so that no broker is started; for a local one at 127.0.0.1:{port} leave it out"
        in said
    )


def test_a_lost_salt_is_one_line_before_anything_starts_and_none_is_made_in_its_place(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    spec = tmp_path / "state" / "registry" / "specs" / "abc" / "spec.json"
    spec.parent.mkdir(parents=True)
    spec.write_text("{}")
    assert f"there is no salt at {tmp_path / 'state' / 'salt'}; restore the file" in complaint(capsys, flags)
    assert not (tmp_path / "state" / "salt").exists()
    assert not (tmp_path / "state" / "kafka").exists()


# The Kafka client leaves its sockets to the garbage collector when nobody answers.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_unreachable_broker_is_one_line_and_starts_no_process(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    line = complaint(capsys, [*flags, "--bootstrap-servers", nobody, "--kafka.request_timeout_s", "1"])
    gc.collect()
    assert nobody in line
    assert not (tmp_path / "state" / "logs").exists()
    assert not (tmp_path / "state" / "kafka").exists()


def test_a_second_run_on_the_same_state_names_the_first(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    with DirectoryLock(tmp_path / "state"):
        line = complaint(capsys, flags)
    assert "is in use by process" in line


def test_an_accepted_gap_names_its_topic_and_reaches_stream_and_trainer_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert up.main(["--accept-gap", "0:5-9", "--reason", "old clicks"]) == 2
    assert "write TOPIC_ID:PARTITION:A-B" in capsys.readouterr().err
    args, rest = parser_of("up").parse_known_args(
        ["--accept-gap", "abababab:0:5-9", "--reason", "old clicks", "--kafka.port", "9"]
    )
    assert rest == ["--kafka.port", "9"]
    accepted = up.AcceptedLosses.of(args)
    assert told(accepted) == {"stream": tuple(accepted.stream), "trainer": tuple(accepted.stream)}


def test_a_record_to_leave_out_reaches_the_trainer_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert up.main(["--skip-record", "7"]) == 2
    assert "--skip-record needs --reason TEXT" in capsys.readouterr().err
    assert up.main(["--skip-record", "seven", "--reason", "odd"]) == 2
    assert "--skip-record seven: write the record's OFFSET" in capsys.readouterr().err
    words = ("--skip-record", "7", "--skip-record", "9-12", "--reason", "a test wrote them")
    accepted = up.AcceptedLosses.of(parser_of("up").parse_args(words))
    assert told(accepted) == {"trainer": words}


def told(accepted: up.AcceptedLosses) -> dict[str, tuple[str, ...]]:
    """The words behind each process's module, of those that the operator accepted."""
    plans = process_plans(accepted=accepted.stream, accepted_by_trainer=accepted.trainer)
    return {name: one.command[3:] for name, one in plans.items() if "--reason" in one.command}


def test_the_local_kafka_needs_its_port_and_a_cluster_of_the_users_does_not() -> None:
    named = {port.setting for port in ports(Settings(), local_kafka=True)}
    assert named == set(PORTS)
    assert named - {port.setting for port in ports(Settings(), local_kafka=False)} == {"kafka.port"}


def test_producers_stop_before_what_they_write_to() -> None:
    order = [name for name in STOP_ORDER if name not in ("bootstrap", "kernels", "rebuild-history")]
    assert order == [
        "console",
        "probe",
        "shoppers",
        "stream",
        "retrain",
        "experiments",
        "trainer",
        "validation",
        "segments",
        "applier",
        "worker",
        "rollout-host",
        "prometheus",
    ]
    assert {*process_plans(), "prometheus", "retrain", "experiments", "rollout-host"} == set(STOP_ORDER)


def test_other_commands_are_shown_with_the_flags_of_this_run_and_no_password() -> None:
    settings = load(
        ["--kafka.port", "9192"], {"SPRINGTIDE_KAFKA_SASL_PASSWORD": "hush", "SPRINGTIDE_STREAM_CUT_MS": "50"}
    )
    assert repeated_flags(settings) == " --kafka.port 9192"


def test_signals_ask_once_to_stop_and_twice_to_hurry() -> None:
    signals = Signals()
    assert not signals.stop()
    signal.raise_signal(signal.SIGINT)
    assert signals.stop()
    assert not signals.hurry()
    signal.raise_signal(signal.SIGTERM)
    assert signals.hurry()
