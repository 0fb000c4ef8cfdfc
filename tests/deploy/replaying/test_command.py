"""The command `springtide replay FILE...` against a real Kafka: wrong use, kills, and times that are kept."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from deploy.replay import main
from deploy.replaying.sender import Progress
from state.config.sections import Kafka
from state.log import Reader, Topics, partition_of
from state.process.killpoints import VARIABLE
from tests import forked
from tests.conftest import KafkaFactory

ROOT = Path(__file__).parents[3]
BEGIN_S = 1_700_000_000
ROWS = 9000  # three pieces


def recording(folder: Path, rows: int = ROWS) -> Path:
    path = folder / "clicks.csv"
    lines = [f"u{n % 101},i{n},c{n % 7},view,{BEGIN_S + n}" for n in range(rows)]
    path.write_text("\n".join(["user,item,category,action,time", *lines, ""]))
    return path


def line(kafka: Kafka, folder: Path, *words: object) -> list[str]:
    return [
        *map(str, words),
        f"--kafka.bootstrap_servers={kafka.bootstrap_servers}",
        f"--kafka.clicks_topic={kafka.clicks_topic}",
        f"--paths.state={folder / 'state'}",
    ]


def process(kafka: Kafka, folder: Path, *words: object, kill_at: str = "") -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "deploy.replay", *line(kafka, folder, *words)],
        cwd=ROOT,
        env={**os.environ, **({VARIABLE: kill_at} if kill_at else {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def records(kafka: Kafka) -> list[tuple[int, bytes, bytes, int]]:
    """All records of the clicks topic: partition, key, value, timestamp."""
    with Topics(kafka) as topics:
        left = {partition: end for partition, (_, end) in topics.ends(kafka.clicks_topic).items() if end}
    found: list[tuple[int, bytes, bytes, int]] = []
    with Reader(kafka, kafka.clicks_topic) as reader:
        while left:
            for batch in reader.poll(1.0):
                found += [
                    (batch.partition, key or b"", value or b"", at_ms)
                    for key, value, at_ms in zip(batch.keys, batch.values, batch.timestamps_ms.tolist(), strict=True)
                ]
                if batch.next >= left.get(batch.partition, batch.next + 1):
                    del left[batch.partition]
    return found


@pytest.mark.parametrize("kill_at", ["replay.promised:2", "replay.acknowledged:1"])
def test_after_a_kill_each_row_is_there_once(kafka_settings: KafkaFactory, tmp_path: Path, kill_at: str) -> None:
    kafka, path = kafka_settings(), recording(tmp_path)
    assert process(kafka, tmp_path, path, kill_at=kill_at).returncode == -signal.SIGKILL
    done = process(kafka, tmp_path, path)
    assert done.returncode == 0, done.stderr
    missing = "4,096" if "promised" in kill_at else "0"
    assert f"in the middle of 4,096 rows: {missing} had not arrived" in done.stderr
    assert "9,000 clicks, 0 dead letters; complete" in done.stdout
    found = records(kafka)
    assert Counter(json.loads(value)["item"] for _, _, value, _ in found) == Counter(f"i{n}" for n in range(ROWS))
    newest_ms = max(json.loads(value)["time"] for _, _, value, _ in found)
    for partition, key, value, kafka_ms in found:
        assert partition == partition_of(key, 4)
        assert json.loads(value)["user"] == key.decode()
        assert kafka_ms == newest_ms


@pytest.mark.usefixtures("undisturbed_signals")
def test_kept_times_carry_no_timestamp(
    kafka_settings: KafkaFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka, path = kafka_settings(), recording(tmp_path, 50)
    assert main(line(kafka, tmp_path, path, "--keep-time", "--sort", "assume", "--limit", 40)) == 0
    assert "40 clicks, 0 dead letters; row 40; the same command resumes" in capsys.readouterr().out
    found = records(kafka)
    assert {kafka_ms for _, _, _, kafka_ms in found} == {-1}
    assert sorted(json.loads(value)["time"] for _, _, value, _ in found) == [(BEGIN_S + n) * 1000 for n in range(40)]


@pytest.mark.usefixtures("undisturbed_signals")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to replay"),
        (["x.csv", "--synthetic"], "name what to replay"),
        (["x.csv", "--rate", "5"], "--rate and --seed"),
        (["--synthetic", "--dry-run"], "--dry-run is for files"),
        (["{csv}", "--speed", "fast"], "--speed fast"),
        (["{csv}", "--longest-wait", "-1"], "--longest-wait -1"),
        (["{csv}", "--constant", "colour=red"], "no field 'colour'"),
        (["{csv}", "--events.action", "item", "--events.outcomes", "item"], "an outcome"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(
    kafka_settings: KafkaFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    path = recording(tmp_path, 5)
    assert main(line(kafka_settings(), tmp_path, *(word.format(csv=path) for word in words))) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("springtide replay: ")
    assert message in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "lines"), [(Terminal(), 400), (io.StringIO(), 10)])
def test_progress_moves_on_a_terminal_and_is_a_line_every_ten_seconds_elsewhere(out: io.StringIO, lines: int) -> None:
    now_s = [0.0]
    progress = Progress(out, lambda: now_s[0])
    for sent in range(400):
        now_s[0] += 0.25
        progress.show(sent, sent, 400, 1)
    progress.say("a line of its own")
    shown = out.getvalue()
    assert shown.count("rows/s") == lines
    assert "[#########-----------]  49 %  199 of 400 rows  4 rows/s  1 dead letter" in shown
    assert shown.count("\n") == (1 if out.isatty() else lines + 1)
