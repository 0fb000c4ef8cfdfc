"""`springtide replay FILE... --dry-run` and what is looked at before Kafka is asked: no broker runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.replay import main
from deploy.replaying.recording import SLICE_ROWS
from tests.deploy.replaying.test_replay import BEGIN_S

HEADER = "user,item,category,action,time"
NOWHERE = "--kafka.bootstrap_servers=127.0.0.1:1"

pytestmark = pytest.mark.usefixtures("undisturbed_signals")


def write(folder: Path, rows: list[str], name: str = "clicks.csv", header: str = HEADER) -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows, ""]))
    return path


def clicks(count: int) -> list[str]:
    return [f"u{n % 5},i{n},c{n % 3},view,{BEGIN_S + n * 60}" for n in range(count)]


def test_it_says_what_would_be_sent_and_asks_no_kafka(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clicks(SLICE_ROWS + 100)
    rows[0] = rows[0].replace("view", "stare")
    rows[7:7] = ["u,i,c,view,soon", *(f"u,i,c,view,{BEGIN_S - 40 * 86_400}" for _ in range(7))]
    path = write(tmp_path, rows)
    assert main([str(path), "--dry-run", NOWHERE, f"--paths.state={tmp_path / 'state'}"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    counts, *reasons, times, first, one, two, three, end = said.out.splitlines()
    assert counts == (
        f"{SLICE_ROWS + 108:,} rows of 1 file: {SLICE_ROWS + 99:,} clicks, "
        "9 dead letters (7 implausible_time by events.max_age_s, 1 unknown_action, 1 wrong_type)"
    )
    assert sorted(reasons) == [
        f"implausible_time by events.max_age_s: {path}:10, :11, :12, :13, :14 and 2 more",
        f"unknown_action: {path}:2",
        f"wrong_type: {path}:9",
    ]
    assert times.startswith("recorded 2023-11-14T22:14:20Z to 2023-11-17T20:08:20Z, sent as 20")
    assert first == "the first events as they would be sent to springtide.clicks.v1:"
    events = [json.loads(line) for line in (one, two, three)]
    assert [event["item"] for event in events] == ["i1", "i2", "i3"]
    assert events[2]["time"] - events[0]["time"] == 120_000
    assert end == "nothing was sent: without --dry-run the same command sends the rows"
    assert not (tmp_path / "state").exists()


def test_it_tells_a_late_row_apart_and_keeps_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [*clicks(50), f"u,i,c,view,{BEGIN_S + 60 * 86_400}"])
    assert main([str(path), "--dry-run", NOWHERE, "--limit", "20", "--sort", "assume"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("20 rows of 1 file: 20 clicks, 0 dead letters\n")
    assert f"{path}:52: 1 row is long after all the others" in said


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_files_columns_and_mapping_are_looked_at_before_kafka(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    good, other = write(tmp_path, clicks(20)), write(tmp_path, clicks(20), "other.csv", HEADER.replace("item", "sku"))
    stares = write(tmp_path, [row.replace("view", "stare") for row in clicks(20)], "stares.csv")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet")
    cases = {
        (str(tmp_path / "nowhere.csv"),): "nowhere.csv: no such file",
        (str(good), str(other)): "other.csv: no column 'item'",
        (str(stares),): "none of the first 20 rows is a click: 20 dead letters (20 unknown_action)",
        (str(good), "--columns", "user,item"): "5 columns, but --columns names 2",
        (str(good), str(broken)): "not readable as parquet",
    }
    for files, message in cases.items():
        assert main([*files, *words, NOWHERE, f"--paths.state={tmp_path / 'state'}"]) in (1, 2)
        said = capsys.readouterr()
        assert message in said.err, said
        assert "Kafka" not in said.err


def test_a_file_whose_clicks_come_late_is_no_wrong_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [*(row.replace("view", "stare") for row in clicks(1500)), *clicks(1500)])
    assert main([str(path), "--dry-run", NOWHERE]) == 0
    assert "1,500 clicks, 1,500 dead letters (1,500 unknown_action)" in capsys.readouterr().out


def test_files_without_header_and_actions_are_said_on_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.log").write_text("".join(f"{BEGIN_S + n};{name}{n};x;i;c\n" for n in range(10)))
    words = ["--format", "csv", "--delimiter", ";", "--columns", "time,user,-,item,category"]
    assert main([str(tmp_path / "*.log"), *words, "--constant", "action=cart", "--dry-run", NOWHERE]) == 0
    counts, *said = capsys.readouterr().out.splitlines()
    assert counts == "20 rows of 2 files: 20 clicks, 0 dead letters"
    (first, *_) = [json.loads(line) for line in said if line.startswith("  {")]
    assert first.pop("time") and first == {"user": "a0", "item": "i", "category": "c", "action": "cart"}
