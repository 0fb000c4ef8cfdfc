"""The command line: processes started with their flags, failures in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli, command_line
from state.errors import SettingsError
from tests import forked
from tests.deploy.operating import Operator

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("command", "module"), [*command_line.PROCESSES.items()])
def test_a_process_gets_its_own_flags_and_the_settings(operator: Operator, command: str, module: str) -> None:
    own = ["--synthetic"] if command in command_line.OWN_HELP else []
    operator(command, *own, "--stream.cut_ms", "50")
    assert operator.became == [(module, [*own, "--stream.cut_ms", "50", "--paths.state", str(operator.state)])]


@pytest.mark.parametrize("command", sorted({*command_line.PROCESSES} - {*command_line.OWN_HELP}))
def test_a_process_without_options_of_its_own_is_not_started_with_one(operator: Operator, command: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown argument --synthetic; see `springtide {command} --help`"):
        operator(command, "--synthetic")
    assert operator.became == []


@pytest.mark.parametrize(("words", "near"), [(["statsu"], "status"), (["experiment", "strat", "wider"], "start")])
def test_an_unknown_word_names_the_nearest_one(operator: Operator, words: list[str], near: str) -> None:
    with pytest.raises(
        SettingsError, match=f"^'[a-z]*' is unknown; did you mean `{near}`\\? `springtide.*` lists all$"
    ):
        operator(*words)
    with pytest.raises(SettingsError, match=r"^'xyzzy' is unknown; `springtide --help` lists all$"):
        operator("xyzzy")


def test_a_wrong_setting_is_refused_before_a_process_starts(operator: Operator) -> None:
    with pytest.raises(SettingsError, match=r"stream\.cut_ms"):
        operator("stream", "--stream.cut_ms", "soon")
    assert operator.became == []


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


def test_a_directory_named_as_a_package_of_ours_hides_it_from_no_process(tmp_path: Path) -> None:
    """The console script never looks into the current directory; what it becomes must not either."""
    for name in ("state", "deploy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('theirs, not ours')")
    script = "import sys; from deploy.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "replay", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "replay" in done.stdout


def test_a_gap_is_accepted_at_the_start_of_a_reader_with_a_reason(operator: Operator) -> None:
    operator("stream", "--accept-gap", "0:5-9", "--accept-gap", "1:2-2", "--reason", "old clicks")
    module, flags = operator.became[-1]
    assert module == "streaming.pipeline"
    assert flags[:6] == ["--accept-gap", "0:5-9", "--accept-gap", "1:2-2", "--reason", "old clicks"]
    operator("train")
    assert operator.became[-1][1][:1] != ["--accept-gap"]
    operator("up", "--accept-gap", "abababab:0:5-9", "--reason", "old clicks", "--no-shoppers")
    assert operator.became[-1][1][:5] == ["--accept-gap", "abababab:0:5-9", "--reason", "old clicks", "--no-shoppers"]
    operator("up", "--upgrade", "--reason", "wider rows", "--no-shoppers")
    assert operator.became[-1][1][:4] == ["--upgrade", "--reason", "wider rows", "--no-shoppers"]
    with pytest.raises(SettingsError, match="needs --reason"):
        operator("train", "--accept-gap", "0:5-9")
    with pytest.raises(SettingsError, match="PARTITION:A-B"):
        operator("train", "--accept-gap", "9-5", "--reason", "x")


@pytest.mark.parametrize("words", [["config", "--explain"], ["status", "-o", "json"], ["replay", "{csv}", "--dry-run"]])
def test_a_reader_that_has_had_enough_is_no_failure(tmp_path: Path, words: list[str]) -> None:
    """As `springtide status | head` has it: nothing reads what is still to be written."""
    path = tmp_path / "clicks.csv"
    path.write_text("user,item,category,action,time\n" + "u,i,c,view,1700000000\n" * 20)
    line = [*(word.format(csv=path) for word in words), "--paths.state", str(tmp_path / "state")]
    flags = ["--bootstrap-servers", "127.0.0.1:1", "--kafka.request_timeout_s", "1"]
    reader, written = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "deploy.cli", *line, *flags]
    done = forked.run(command, cwd=ROOT, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.stderr, done.returncode) == ("", 0)
