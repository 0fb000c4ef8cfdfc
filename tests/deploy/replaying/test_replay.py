"""The command `springtide replay`: what is sent when, what is refused, and what its dry run says."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.replay import main
from deploy.replaying import recording as replaying
from deploy.replaying.recording import SLICE_ROWS, Options, Outcome, RecordingSource, Replay, ReplayJournal
from deploy.replaying.sender import LARGEST_VALUE, Outbox, Piece, Progress, Record, missing
from state.config.sections import Events
from state.errors import CorruptStore, LogError, SettingsError
from state.recordings.files import Recording, find, refuse_beyond_memory

NOW_MS = 1_800_000_000_000
BEGIN_S = 1_700_000_000
ROWS = 40


@dataclass
class Topic(Outbox):
    """A topic of two partitions that can break: before, in the middle of, or after a piece."""

    records: list[Record] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    log: list[tuple[int, int, Record]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    break_at: int = -1
    arriving: str = ""

    def send(self, piece: Piece) -> dict[int, int]:
        self.sizes.append(len(piece))
        broken = len(self.sizes) - 1 == self.break_at
        for record in piece.records():
            partition = sum(record[0]) % 2
            if broken and (self.arriving == "nothing" or (self.arriving == "a partition" and partition)):
                continue
            self.log.append((partition, self.places[partition], record))
            self.places[partition] += 1
        if broken:
            raise LogError("gone")
        return dict(self.places)

    def arrived_since(self, ends: Mapping[int, int]) -> list[Record]:
        return [record for partition, offset, record in self.log if offset >= ends[partition]]

    def ends(self) -> dict[int, int]:
        return dict(self.places)

    @property
    def values(self) -> list[bytes]:
        return [value for _, _, (_, value, _) in self.log]

    def clicks(self) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self.values]


class Wall:
    """A clock that somebody waiting moves on."""

    def __init__(self) -> None:
        self.now_ms = float(NOW_MS)
        self.stopped = threading.Event()
        self.stopped.wait = self._wait  # type: ignore[method-assign]  # waiting moves this clock

    def _wait(self, timeout: float | None = None) -> bool:
        self.now_ms += (timeout or 0) * 1000
        return self.stopped.is_set()

    def __call__(self) -> int:
        return int(self.now_ms)


def write(folder: Path, rows: list[str], name: str = "clicks.csv") -> Recording:
    path = folder / name
    path.write_text("user,item,category,action,time\n" + "\n".join(rows) + "\n")
    return Recording(find([str(path)]))


def some_rows() -> list[str]:
    """Of five users, mixed in time, every tenth time unreadable, two rows equal."""
    rows = [f"u{n % 5},i{n},c{n % 3},view,{BEGIN_S + (n * 17) % ROWS * 60 if n % 10 else 'soon'}" for n in range(ROWS)]
    return [*rows, rows[-1]]


def run(
    recording: Recording,
    folder: Path,
    topic: Topic,
    wall: Wall | None = None,
    out: io.StringIO | None = None,
    **how: Any,
) -> Outcome:
    wall = wall or Wall()
    folder.mkdir(exist_ok=True)
    progress = Progress(out or io.StringIO(), lambda: 0.0)
    events = how.pop("events", Events())
    source = RecordingSource(recording, events, Options(**how))
    return Replay(source, topic, ReplayJournal(folder), progress, wall.stopped, wall).run()


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "SLICE_ROWS", 16)


def test_rows_are_sent_by_time_and_the_newest_is_of_now(tmp_path: Path) -> None:
    topic = Topic()
    outcome = run(write(tmp_path, some_rows()), tmp_path / "j", topic)
    assert (outcome.sent, outcome.total, outcome.clicks, outcome.late) == (41, 41, 37, 0)
    assert outcome.position.complete
    assert outcome.position.refused == {"wrong_type": 4}
    times = [click["time"] for click in topic.clicks() if click["time"] != "soon"]
    assert times == sorted(times)
    assert times[-1] == NOW_MS
    # What no time could be read of is there, as it was.
    assert Counter(click["item"] for click in topic.clicks()) == Counter(row.split(",")[1] for row in some_rows())


def test_a_second_run_sends_nothing_and_a_restart_all_again(tmp_path: Path) -> None:
    recording, topic = write(tmp_path, some_rows()), Topic()
    run(recording, tmp_path / "j", topic)
    again = run(recording, tmp_path / "j", topic)
    assert (again.sent, again.position.complete, len(topic.log)) == (0, True, 41)
    ReplayJournal(tmp_path / "j").forget()
    assert run(recording, tmp_path / "j", topic).sent == 41


@pytest.mark.parametrize("how", [{"sort": "memory"}, {"sort": "assume"}, {"keep": True}, {"speed": 600.0}])
def test_limits_add_up_to_the_undisturbed_replay(tmp_path: Path, how: dict[str, Any]) -> None:
    recording, whole, parts = write(tmp_path, some_rows()), Topic(), Topic()
    assert run(recording, tmp_path / "whole", whole, **how).sent == 41
    sent = [run(recording, tmp_path / "parts", parts, limit=15, **how).sent for _ in range(3)]
    assert sent == [15, 15, 11]
    if how.get("speed"):  # a later run begins at a later now
        assert [click["item"] for click in parts.clicks()] == [click["item"] for click in whole.clicks()]
    else:
        assert parts.log == whole.log
    assert run(recording, tmp_path / "parts", parts, **how).position.complete


@given(
    break_at=st.integers(0, 3),
    arriving=st.sampled_from(["nothing", "a partition", "everything"]),
    how=st.sampled_from([{"sort": "memory"}, {"sort": "assume"}, {"keep": True}, {"speed": 600.0}]),
    other=st.booleans(),
)
def test_an_outage_at_any_piece_loses_nothing_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory, break_at: int, arriving: str, how: dict[str, Any], other: bool
) -> None:
    folder = tmp_path_factory.mktemp("outage")
    recording, topic, wall = write(folder, some_rows()), Topic(break_at=break_at, arriving=arriving), Wall()
    try:
        run(recording, folder / "j", topic, wall, **how)
    except LogError:
        if other:  # somebody else writes into the topic meanwhile
            topic.send(Piece([b"x"], [b'{"item": "of somebody else"}'], np.array([5])))
        outcome = run(recording, folder / "j", topic, wall, **how)
        assert outcome.position.complete
    clicks = [click for click in topic.clicks() if click["item"] != "of somebody else"]
    assert Counter(click["item"] for click in clicks) == Counter(row.split(",")[1] for row in some_rows())
    assert run(recording, folder / "j", topic, wall, **how).position.refused == {"wrong_type": 4}
    # Each user's clicks are in the order of an undisturbed replay.
    calm = Topic()
    run(recording, folder / "calm", calm, Wall(), **how)
    for user in {click["user"] for click in clicks}:
        assert [click["item"] for click in clicks if click["user"] == user] == [
            click["item"] for click in calm.clicks() if click["user"] == user
        ]


def test_a_stop_ends_between_two_pieces(tmp_path: Path) -> None:
    recording, topic, wall = write(tmp_path, some_rows()), Topic(), Wall()
    send = topic.send

    def stop_then_send(piece: Piece) -> dict[int, int]:
        wall.stopped.set()
        return send(piece)

    topic.send = stop_then_send  # type: ignore[method-assign]  # of this topic alone
    outcome = run(recording, tmp_path / "j", topic, wall)
    assert (outcome.sent, outcome.position.complete) == (16, False)
    assert run(recording, tmp_path / "j", topic).sent == 25


def test_a_paced_replay_takes_the_recordings_time_by_its_speed(tmp_path: Path) -> None:
    recording, topic, wall = write(tmp_path, some_rows()), Topic(), Wall()
    run(recording, tmp_path / "j", topic, wall, speed=60.0)
    # 39 minutes at a minute a second.
    assert 38_000 <= wall.now_ms - NOW_MS <= 40_500
    stamps = [kafka_ms for _, _, (_, _, kafka_ms) in topic.log]
    assert stamps == sorted(stamps)
    for (_, _, (_, value, kafka_ms)), _ in pairwise(topic.log):
        time = json.loads(value)["time"]
        assert time in ("soon", kafka_ms)
    assert max(topic.sizes) <= 3


def test_rows_out_of_order_are_late_where_order_is_assumed(tmp_path: Path) -> None:
    rows = [f"u,i{n},c,view,{BEGIN_S + second}" for n, second in enumerate([0, 60, 30, 90])]
    topic = Topic()
    outcome = run(write(tmp_path, rows), tmp_path / "j", topic, sort="assume")
    assert outcome.late == 1
    assert [click["time"] - NOW_MS for click in topic.clicks()] == [-90_000, -30_000, -60_000, 0]


@pytest.mark.parametrize("how", [{"sort": "memory"}, {"sort": "assume"}, {"speed": 60.0}])
def test_one_late_row_is_told_apart_and_the_rest_has_the_times_it_has_without_it(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    rows = [f"u{n % 5},i{n},c,view,{BEGIN_S + n * 3600}" for n in range(ROWS)]
    late = f"u,late,c,view,{BEGIN_S + 60 * 86_400}"
    out, topic, alone, limits = io.StringIO(), Topic(), Topic(), Topic()
    with_late = write(tmp_path, [*rows[:7], late, *rows[7:]])
    outcome = run(with_late, tmp_path / "j", topic, out=out, **how)
    run(write(tmp_path, rows, "alone.csv"), tmp_path / "alone", alone, **how)
    assert [click for click in topic.clicks() if click["item"] != "late"] == alone.clicks()
    assert outcome.position.refused == {"implausible_time by events.max_future_s": 1}
    said = out.getvalue()
    assert (
        "WARNING: clicks.csv:9: 1 row of 41 is left out: its time (2024-01-13T22:13:20Z) is more than 30 days from "
        "the rest (2023-11-14T22:13:20Z to 2023-11-16T13:13:20Z)"
    ) in said.replace(f"{tmp_path}/", "")
    assert "clicks.csv:9: no click: implausible_time by events.max_future_s" in said
    # A run that goes on keeps to what the first one found.
    for _ in range(3):
        run(with_late, tmp_path / "limits", limits, limit=15, **how)
    if how.get("speed") is None:
        assert limits.log == topic.log


HOWS: list[dict[str, Any]] = [{}, {"sort": "assume"}, {"speed": 1e6}, {"keep": True}, {"keep": True, "speed": 1e6}]


@pytest.mark.parametrize("how", HOWS)
def test_a_recording_longer_than_the_setting_is_sent_whole(tmp_path: Path, how: dict[str, Any]) -> None:
    rows = [f"u,i{n},c,view,{BEGIN_S + n * 86_400}" for n in range(90)]
    topic = Topic()
    outcome = run(write(tmp_path, rows), tmp_path / "j", topic, **how)
    assert (outcome.clicks, outcome.position.refused) == (90, {})
    assert len(topic.clicks()) == 90


@pytest.mark.parametrize("how", HOWS)
def test_strays_before_a_long_recording_are_left_out_however_many_come_first(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    rows = [f"u,i{n},c,view,{BEGIN_S + n * 86_400 // 10}" for n in range(900)]
    strays = [f"u,early,c,view,{second}" for second in range(30)]
    out, topic, recording = io.StringIO(), Topic(), write(tmp_path, [*strays, *rows])
    for _ in range(4):
        # A run that continues knows which rows are strays.
        outcome = run(recording, tmp_path / "j", topic, out=out, limit=300, **how)
    assert outcome.clicks == 900
    assert outcome.position.refused == {"implausible_time by events.max_age_s": 30}
    assert out.getvalue().count("WARNING:") == 1
    assert "30 rows of 930 are left out: their times (1970-01-01T00:00:00Z to 1970-01-01T00:00:29Z)" in out.getvalue()


def test_a_row_too_large_for_a_record_is_named_and_counted(tmp_path: Path) -> None:
    rows = [f"u,i{n},c,view,{BEGIN_S + n}" for n in range(20)]
    rows[4] = f"u,{'x' * LARGEST_VALUE},c,view,{BEGIN_S}"
    out, topic = io.StringIO(), Topic()
    outcome = run(write(tmp_path, rows), tmp_path / "j", topic, out=out)
    assert (outcome.sent, outcome.position.unsendable, len(topic.log)) == (20, 1, 19)
    assert "clicks.csv:6: not sent: more than 900,000 bytes" in out.getvalue()


def test_the_first_refused_rows_are_named_without_their_ids(tmp_path: Path) -> None:
    rows = [f"secret-{n},i,c,{'stare' if n >= 12 else 'view'},{BEGIN_S + n}" for n in range(20)]
    out = io.StringIO()
    assert run(write(tmp_path, rows), tmp_path / "j", Topic(), out=out).position.refused == {"unknown_action": 8}
    assert "clicks.csv:14: no click: unknown_action" in out.getvalue()
    assert out.getvalue().count("no click:") == 5
    assert "secret" not in out.getvalue()


@pytest.mark.parametrize("how", [{}, {"sort": "assume"}, {"speed": 60.0}, {"keep": True}])
def test_a_recording_without_times_is_of_now(tmp_path: Path, how: dict[str, Any]) -> None:
    rows = [f"u,i{n},c,view,ignored" for n in range(20)]
    topic = Topic()
    outcome = run(write(tmp_path, rows), tmp_path / "j", topic, events=replace(Events(), time=""), **how)
    assert (outcome.sent, outcome.clicks) == (20, 20)
    assert [(click["item"], len(click)) for click in topic.clicks()] == [(f"i{n}", 4) for n in range(20)]
    assert {kafka_ms for _, _, (_, _, kafka_ms) in topic.log} == {NOW_MS}


@pytest.mark.parametrize("sort", ["memory", "assume"])
def test_a_time_that_is_the_same_in_every_row_is_moved_to_now(tmp_path: Path, sort: str) -> None:
    recording, topic = write(tmp_path, [f"u,i{n},c,view,ignored" for n in range(20)]), Topic()
    run(replace(recording, constants={"time": str(BEGIN_S)}), tmp_path / "j", topic, sort=sort)
    assert {click["time"] for click in topic.clicks()} == {NOW_MS}


def test_an_unreadable_journal_says_so(tmp_path: Path) -> None:
    recording = write(tmp_path, some_rows())
    run(recording, tmp_path / "j", Topic(), limit=5)
    (journal,) = (tmp_path / "j").iterdir()
    assert "u1" not in journal.read_text(), "it holds no click"
    journal.write_text("{")
    with pytest.raises(CorruptStore, match="--restart"):
        run(recording, tmp_path / "j", Topic())


def test_what_memory_would_not_hold_is_refused_before_it_is_read(tmp_path: Path) -> None:
    recording = write(tmp_path, some_rows())
    with pytest.raises(SettingsError, match="--sort assume"):
        refuse_beyond_memory(recording, 1000)
    refuse_beyond_memory(recording, 10**9)


@given(st.lists(st.integers(0, 3), max_size=10), st.data())
def test_missing_and_arrived_make_the_piece(kinds: list[int], data: st.DataObject) -> None:
    piece = Piece([b"k%d" % kind for kind in kinds], [b"v"] * len(kinds), np.array(kinds, np.int64))
    arrived = data.draw(st.lists(st.sampled_from(piece.records()), max_size=5)) if kinds else []
    left = missing(piece, arrived)
    assert Counter(left.records()) == Counter(piece.records()) - Counter(arrived)


HEADER = "user,item,category,action,time"
NOWHERE = "--kafka.bootstrap_servers=127.0.0.1:1"

pytestmark = pytest.mark.usefixtures("undisturbed_signals")


def write_of_dry_run(folder: Path, rows: list[str], name: str = "clicks.csv", header: str = HEADER) -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows, ""]))
    return path


def clicks(count: int) -> list[str]:
    return [f"u{n % 5},i{n},c{n % 3},view,{BEGIN_S + n * 60}" for n in range(count)]


def test_it_says_what_would_be_sent_and_asks_no_kafka(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clicks(SLICE_ROWS + 100)
    rows[0] = rows[0].replace("view", "stare")
    rows[7:7] = ["u,i,c,view,soon", *(f"u,i,c,view,{BEGIN_S - 40 * 86_400}" for _ in range(7))]
    path = write_of_dry_run(tmp_path, rows)
    assert main([str(path), "--dry-run", NOWHERE, f"--paths.state={tmp_path / 'state'}"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    counts, warning, *reasons, stray, times, first, one, two, three, end = said.out.splitlines()
    assert counts == (
        f"{SLICE_ROWS + 108:,} rows of 1 file: {SLICE_ROWS + 99:,} clicks, "
        "9 dead letters (7 implausible_time by events.max_age_s, 1 unknown_action, 1 wrong_type)"
    )
    assert warning.startswith("WARNING: 0.21 % of the rows are left out: 9 dead letters")
    assert f"{path}:10 and others: 7 rows of 4,203 are left out: their times" in stray
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
    path = write_of_dry_run(tmp_path, [*clicks(50), f"u,i,c,view,{BEGIN_S + 60 * 86_400}"])
    assert main([str(path), "--dry-run", NOWHERE, "--limit", "20", "--sort", "assume"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("20 rows of 1 file: 20 clicks, 0 dead letters\n")
    assert f"{path}:52: 1 row of 51 is left out: its time" in said


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_files_columns_and_mapping_are_looked_at_before_kafka(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    good, other = (
        write_of_dry_run(tmp_path, clicks(20)),
        write_of_dry_run(tmp_path, clicks(20), "other.csv", HEADER.replace("item", "sku")),
    )
    stares = write_of_dry_run(tmp_path, [row.replace("view", "stare") for row in clicks(20)], "stares.csv")
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
    path = write_of_dry_run(tmp_path, [*(row.replace("view", "stare") for row in clicks(1500)), *clicks(1500)])
    assert main([str(path), "--dry-run", NOWHERE]) == 0
    said = capsys.readouterr().out
    assert "1,500 clicks, 1,500 dead letters (1,500 unknown_action)" in said
    assert "WARNING: 50 % of the rows are left out: 1,500 dead letters (1,500 unknown_action)" in said


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
