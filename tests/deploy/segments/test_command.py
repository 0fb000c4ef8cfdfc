"""The command of segments: what it cannot do it says, in one line, and an export is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from deploy.segments import command
from state.layout import SEGMENTS, SERVING
from state.segments.members import Membership, SegmentStore

NAMED = ("--segments.expressions", "busy=events.visible > 1")


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    """Flags of a state directory in which two users are in a segment."""
    store = SegmentStore(tmp_path / SERVING / SEGMENTS, 1 << 24)
    store.commit({("busy", user): Membership(1_800_000_000_123, 7) for user in (0xAB, 0x1)})
    store.close()
    return ["--paths.state", str(tmp_path), *NAMED]


def test_members_are_listed_and_exported(state: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", *state]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["busy", "2", "events.visible", ">", "1"]
    file = tmp_path / "members.parquet"
    assert command.main(["export", "busy", "--to", str(file), *state]) == 0
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert [(row["pseudonym"], row["version"]) for row in rows] == [(f"{user:016x}", 7) for user in (0x1, 0xAB)]
    assert {row["since"].isoformat() for row in rows} == {"2027-01-15T08:00:00.123000+00:00"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export", "nobody", "--to", "x.parquet"], 2, "there is no segment nobody; name one of busy"),
        (["list"], 1, "cannot be opened"),
        (["lookalikes", "busy"], 1, "cannot be opened"),
        (["export", "busy"], 2, "--to"),
        (["list", "--segments.expressions", "busy=views > 1"], 2, "segment busy, column 1: views is no feature"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([words[0], "--paths.state", str(tmp_path), *NAMED, *words[1:]]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_export_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    def some() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch([pa.array(["0" * 16]), pa.array([0.5], pa.float32())], schema=command.LOOKALIKES)
        raise OSError(28, "No space left on device")

    file = tmp_path / "there.parquet"
    file.write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        command.write(file, command.LOOKALIKES, some(), lambda done: None)
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"] and file.read_bytes() == b"before"
